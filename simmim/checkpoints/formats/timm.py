"""timm's folders: model.safetensors, and a config.json that `timm.create_model("local-dir:FOLDER")` reads."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER, ExportOptions
from simmim.checkpoints.formats.foreign import ForeignFormat, Rows
from simmim.checkpoints.weight_files import write_safetensors


class TimmRows(Rows):
    """An encoder family of timm.

    Attributes:
        first_conv, classifier: the modules that timm replaces for other input channels and classes.
    """

    first_conv: ClassVar[str]
    classifier: ClassVar[str]

    @abstractmethod
    def architecture_name(self, checkpoint: Checkpoint) -> str:
        """A registered name of timm's, which `model_arguments` turns into this architecture."""

    @abstractmethod
    def model_arguments(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The arguments of `timm.create_model` that make this architecture."""


class TimmFormat(ForeignFormat):
    """A folder with model.safetensors or pytorch_model.bin, and timm's config.json."""

    name = "timm"
    title = "timm"
    library = "timm"
    weight_names = ("model.safetensors", "pytorch_model.bin")
    families: ClassVar[dict[str, str]] = {
        "swinv2": "simmim.checkpoints.formats.swinv2.timm",
        "backbone": "simmim.checkpoints.formats.backbone.timm",  # the last: it takes what is of no other family
    }

    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        write_safetensors(folder / "model.safetensors", self.rows_for(checkpoint.config).state(checkpoint, form))
        self.write_config(checkpoint, form, folder, options)

    def folder_config(self, checkpoint: Checkpoint, form: str, options: ExportOptions) -> dict[str, Any]:
        rows: TimmRows = self.rows_for(checkpoint.config)
        preprocessing = checkpoint.preprocessing
        classes = list(checkpoint.classes) if form == CLASSIFIER else []
        return {
            "architecture": rows.architecture_name(checkpoint),
            "num_classes": len(classes),
            "num_features": checkpoint.config.channels[-1],
            "global_pool": "avg",
            "model_args": rows.model_arguments(checkpoint),
            "pretrained_cfg": {
                "tag": "simmim",
                "custom_load": False,
                "input_size": [checkpoint.config.in_channels, *preprocessing.image_size],
                "fixed_input_size": True,
                "interpolation": preprocessing.interpolation,
                "crop_pct": preprocessing.crop,
                "crop_mode": "squash" if preprocessing.fit == "squash" else "center",
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
                "num_classes": len(classes),
                "first_conv": rows.first_conv,
                "classifier": rows.classifier,
                "license": options.license,
                **({"label_names": classes} if classes else {}),
            },
        }

    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        model, extra = f"local-dir:{path}", "" if form == CLASSIFIER else ", num_classes=0"
        return (
            "import timm\n\n"
            f"model = timm.create_model({model!r}, pretrained=True{extra})\n"
            f"# each stage's maps: timm.create_model({model!r}, pretrained=True, features_only=True)"
        )
