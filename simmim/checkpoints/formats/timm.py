"""timm's folders: model.safetensors, and a config.json that `timm.create_model("local-dir:FOLDER")` reads."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import check_state
from simmim.checkpoints.formats.base import CLASSIFIER, ExportOptions
from simmim.checkpoints.formats.foreign import ForeignFormat, Rows
from simmim.checkpoints.formats.key_tables import KeyTable, prefix_of
from simmim.checkpoints.formats.parts import class_names, parts_of_form, read_head
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile, write_safetensors
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.base import EncoderConfig, Size, State


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

    def global_pool(self, config: EncoderConfig) -> str:
        """timm's name for how the model pools."""
        return "avg"


class TimmTableRows(TimmRows):
    """A family of this toolkit in timm, by a key table.

    Attributes:
        table: its key table.
        buffers: what timm stores beside the weights.
        anchor: the end of the first name of every file.
    """

    table: ClassVar[KeyTable]
    buffers: ClassVar[re.Pattern[str]]
    anchor: ClassVar[str] = "patch_embed.proj.weight"

    @abstractmethod
    def read_architecture(
        self, encoder: State, file: WeightFile, source: Source, overrides: Mapping[str, Any]
    ) -> tuple[EncoderConfig, Preprocessing, tuple[str, ...]]:
        """Architecture and preprocessing from config.json, or without one from the file; and notes.

        Args:
            encoder: the encoder's tensors under timm's names.

        Raises:
            ValueError: if they do not follow from the files.
        """

    def table_for(self, config: EncoderConfig) -> KeyTable:
        """The key table of an architecture."""
        return self.table

    def our_shapes(self, state: State) -> State:
        """Tensors under our names in our shapes."""
        return state

    def their_shapes(self, state: State) -> State:
        """The inverse of `our_shapes`, under their names."""
        return state

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        file = source.weights
        prefix = prefix_of(file.tensors, self.anchor)
        encoder = {
            name.removeprefix(prefix): value
            for name, value in file.tensors.items()
            if name.startswith(prefix) and not self.buffers.search(name)
        }
        config, preprocessing, notes = self.read_architecture(encoder, file, source, overrides)
        state, left_over = self.table_for(config).to_ours(encoder, config)
        extra = [name for name in left_over if name not in {theirs for _, theirs in self.table.head}]
        extra += [name for name in file.tensors if not name.startswith(prefix)]
        state = self.our_shapes(state)
        check_state(config, state | {name: (file.tensors | encoder)[name] for name in extra}, file.source)
        head = read_head(self.table, encoder, file)
        labels = source.config.get("label_names") or source.config.get("pretrained_cfg", {}).get("label_names")
        origin = {"origin": "timm", "architecture": source.config.get("architecture", "unknown")}
        return Checkpoint(
            config,
            state,
            preprocessing,
            file.source,
            "timm",
            provenance=source.description.get("provenance", origin),
            head=head,
            classes=class_names(labels, head),
            notes=notes,
        )

    def state(self, checkpoint: Checkpoint, form: str) -> State:
        weights = self.table_for(checkpoint.config).from_ours(checkpoint.encoder, checkpoint.config)
        return self.their_shapes(weights) | parts_of_form(self.table, checkpoint, form)


class TimmFormat(ForeignFormat):
    """A folder with model.safetensors or pytorch_model.bin, and timm's config.json."""

    name = "timm"
    title = "timm"
    library = "timm"
    weight_names = ("model.safetensors", "pytorch_model.bin")
    families: ClassVar[dict[str, str]] = {
        "swinv2": "simmim.checkpoints.formats.swinv2.timm",
        "swin": "simmim.checkpoints.formats.swin.timm",
        "vit": "simmim.checkpoints.formats.vit.timm",
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
            "global_pool": rows.global_pool(checkpoint.config),
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


def stated_preprocessing(stated: Mapping[str, Any], size: Size) -> Preprocessing:
    """The preprocessing of a `pretrained_cfg`."""
    return Preprocessing(
        size,
        stated.get("mean", IMAGENET_MEAN),
        stated.get("std", IMAGENET_STD),
        stated.get("interpolation", "bicubic"),
        stated.get("crop_pct") or 0.875,
        "squash" if stated.get("crop_mode") == "squash" else "crop",
    )


def under_closed_stage(name: str) -> str:
    """The name that timm gives a tensor of a Swin, with each merging under the number of the stage that it ends."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(parts)


def has_swin_names(source: Source) -> bool:
    """Whether weights of a Swin have timm's names for mergings or head, or its configuration beside them."""
    names = source.weights.tensors
    has_timm_names = any(re.search(r"(^|\.)head\.fc\.|layers[._][1-9]\d*\.downsample\.", name) for name in names)
    # The authors' merging ends a stage, timm's begins the next: of two stages, layers.0 or layers.1 has one.
    has_authors_names = any("layers.0.downsample." in name for name in names)
    return (has_timm_names and not has_authors_names) or "pretrained_cfg" in source.config


def one_window(stated: int | list, file: WeightFile) -> int:
    """The window of all stages. timm's argument may have one for each, and height and width.

    Raises:
        ValueError: if they differ.
    """
    if isinstance(stated, int):
        return stated
    sides = {side for stage in stated for side in (stage if isinstance(stage, list) else [stage])}
    if len(sides) != 1:
        raise ValueError(f"{file.source.parent / 'config.json'} says window_size {stated}: expected one size for all stages")
    return sides.pop()


def stated_size(source: Source) -> Size | None:
    """The image size of timm's config.json; None without one."""
    stated = source.config.get("pretrained_cfg") or source.config
    size = (source.config.get("model_args") or {}).get("img_size") or tuple(stated.get("input_size", ())[1:]) or None
    return (size, size) if isinstance(size, int) else tuple(size) if size else None  # type: ignore[return-value]
