"""Hugging Face transformers' folders: config.json, weights, and mostly preprocessor_config.json."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.formats.base import CLASSIFIER, ENCODER, ExportOptions
from simmim.checkpoints.formats.foreign import ForeignFormat, Rows, read_description
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import INDEX, TORCH_INDEX, write_safetensors
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.base import Size
from simmim.files import read_json, write_json

PROCESSOR = "preprocessor_config.json"
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers
AUTO_CLASSES = {
    ENCODER: "AutoModel",
    "simmim": "AutoModelForMaskedImageModeling",
    CLASSIFIER: "AutoModelForImageClassification",
}


class HuggingFaceRows(Rows):
    """An encoder family of transformers."""

    @abstractmethod
    def folder_config(self, checkpoint: Checkpoint, form: str) -> dict[str, Any]:
        """The config.json without class names and without this toolkit's part."""

    def backbone_class(self) -> str | None:
        """The class that returns each stage's map; None if transformers has none."""
        return None


class HuggingFaceFormat(ForeignFormat):
    """A folder with config.json and model.safetensors, one file or shards, or their older names."""

    name = "hf"
    title = "transformers"
    library = "transformers"
    weight_names = ("model.safetensors", INDEX, "pytorch_model.bin", TORCH_INDEX)
    families: ClassVar[dict[str, str]] = {
        "swinv2": "simmim.checkpoints.formats.swinv2.huggingface",
        "backbone": "simmim.checkpoints.formats.backbone.huggingface",  # the last: it takes what is of no other family
    }
    methods = ("simmim",)

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        notes = super().differences(checkpoint, form)
        height, width = checkpoint.preprocessing.image_size
        if height != width and form == "simmim":
            raise ValueError(
                f"transformers' masked image modeling takes square images, not {height}×{width} px: export the encoder "
                "alone, or as official"
            )
        if height != width:
            notes += ("transformers' processors cannot crop to a rectangle: prepare the images yourself",)
        if form == "simmim" and checkpoint.provenance.get("norm_target_patch"):
            notes += ("transformers computes the loss on plain pixels; this model was trained on normalized ones",)
        return notes

    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        write_safetensors(folder / "model.safetensors", self.rows_for(checkpoint.config).state(checkpoint, form))
        self.write_config(checkpoint, form, folder, options)
        write_json(folder / PROCESSOR, processor_config(checkpoint.preprocessing))

    def folder_config(self, checkpoint: Checkpoint, form: str, options: ExportOptions) -> dict[str, Any]:
        config = self.rows_for(checkpoint.config).folder_config(checkpoint, form)
        if form == CLASSIFIER:
            config["id2label"] = dict(enumerate(checkpoint.classes))
            config["label2id"] = {name: number for number, name in enumerate(checkpoint.classes)}
        return config

    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        auto, backbone = AUTO_CLASSES[form], self.rows_for(checkpoint.config).backbone_class()
        has_processor = checkpoint.config.in_channels in (1, 3)
        lines = [f"from transformers import {f'AutoImageProcessor, {auto}' if has_processor else auto}", ""]
        if has_processor:
            lines.append(f"processor = AutoImageProcessor.from_pretrained({path!r})")
        lines.append(f"model = {auto}.from_pretrained({path!r})")
        if backbone and form == ENCODER:
            lines.append(f"# each stage's maps: transformers.{backbone}.from_pretrained({path!r})")
        return "\n".join(lines)


# --- preprocessing ---------------------------------------------------------------------------------------------------


def processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The preprocessor_config.json of `preprocessing`: shortest edge and central crop, or squashed."""
    height, width = preprocessing.image_size
    shared = {
        "do_resize": True,
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    if preprocessing.fit == "squash":
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}, **shared}
    side_px = min(height, width)
    # The same number of pixels on both sides of the crop: half a pixel would move every edge.
    margin_px = round((side_px / preprocessing.crop - side_px) / 2)
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": side_px + 2 * margin_px},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": len(preprocessing.mean) == 3,
        **shared,
    }


def read_preprocessing(source: Source, size: Size, channels: int) -> Preprocessing:
    """From preprocessor_config.json, or from this toolkit's description where that still agrees with it.

    Without either: ImageNet's statistics and bicubic, as the published models.
    """
    path = source.folder / PROCESSOR
    stored = read_json(path) if path.is_file() else {}
    if source.description:
        _, described = read_description(source)
        expected = processor_config(described)
        if described.image_size == size and {name: stored.get(name) for name in expected} == expected:
            return described
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels,) * 2
    mean, std = (stored.get(name) or value for name, value in zip(("image_mean", "image_std"), default))
    interpolation = {number: name for name, number in RESAMPLE.items()}.get(stored.get("resample", 3), "bicubic")
    crop = stored.get("crop_size") if stored.get("do_center_crop") else None
    edge = (stored.get("size") or {}).get("shortest_edge")
    if crop and edge:
        share = min(1.0, round(min(crop["height"], crop["width"]) / edge, 4))
        return Preprocessing(size, mean, std, interpolation, share)
    return Preprocessing(size, mean, std, interpolation, 1.0, "squash" if stored else "crop")
