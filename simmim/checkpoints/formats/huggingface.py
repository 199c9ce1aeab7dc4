"""Hugging Face transformers' folders: config.json, weights, and mostly preprocessor_config.json."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import check_state
from simmim.checkpoints.formats.base import CLASSIFIER, ENCODER, ExportOptions
from simmim.checkpoints.formats.foreign import ForeignFormat, Rows, read_description
from simmim.checkpoints.formats.key_tables import KeyTable, prefix_of
from simmim.checkpoints.formats.parts import class_names, parts_of_form, read_head, read_simmim
from simmim.checkpoints.source import CONFIG, Source
from simmim.checkpoints.weight_files import INDEX, TORCH_INDEX, write_safetensors
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.base import EncoderConfig, Size, State
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


class HuggingFaceTableRows(HuggingFaceRows):
    """A family of this toolkit in transformers, by a key table.

    Attributes:
        table: its key table.
        model: the name before the encoder's tensors in models with more parts.
        projection: the end of the first name of every file.
        buffers: ends of the names of what transformers stores beside the weights.
    """

    table: ClassVar[KeyTable]
    model: ClassVar[str]
    projection: ClassVar[str] = "embeddings.patch_embeddings.projection.weight"
    buffers: ClassVar[tuple[str, ...]] = ("relative_coords_table", "relative_position_index")

    @abstractmethod
    def read_architecture(self, source: Source) -> tuple[EncoderConfig, Size, tuple[str, ...]]:
        """The encoder's configuration, the size of its images, and notes.

        Raises:
            ValueError: if there is no configuration of such a model, or it differs from the published architecture.
        """

    @abstractmethod
    def config_of_names(self, tensors: Mapping[str, Tensor], prefix: str, config: EncoderConfig) -> EncoderConfig:
        """A configuration with the blocks of the file, and not those of its `config`, so that the two can be compared."""

    def our_state(self, tensors: Mapping[str, Tensor], config: EncoderConfig, prefix: str) -> tuple[State, list[str]]:
        """The encoder's weights under our names in our shapes, and the names that are left over."""
        return self.table.to_ours(tensors, config, prefix)

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        file = source.weights
        config, size, notes = self.read_architecture(source)
        prefix = prefix_of(file.tensors, self.projection)
        state, left_over = self.our_state(file.tensors, self.config_of_names(file.tensors, prefix, config), prefix)
        known = {theirs for _, theirs in (*self.table.pretraining, *self.table.head)} | {prefix + "embeddings.mask_token"}
        extra = [name for name in left_over if name not in known and not name.endswith(self.buffers)]
        check_state(config, state | {name: file.tensors[name] for name in extra}, file.source)
        head = read_head(self.table, file.tensors, file)
        pretraining, more_notes = read_simmim(self.table.pretraining, file.tensors, file)
        labels = source.config.get("id2label") or {}
        origin = {"origin": "transformers", "architectures": source.config.get("architectures")}
        return Checkpoint(
            config,
            state,
            read_preprocessing(source, size, config.in_channels),
            file.source,
            "hf",
            provenance=source.description.get("provenance", origin),
            pretraining=pretraining,
            head=head,
            classes=class_names([labels[key] for key in sorted(labels, key=int)], head),
            notes=notes + more_notes,
        )

    def state(self, checkpoint: Checkpoint, form: str) -> State:
        prefix = "" if form == ENCODER else f"{self.model}."
        encoder = self.table.from_ours(checkpoint.encoder, checkpoint.config, prefix)
        return encoder | parts_of_form(self.table, checkpoint, form)


class HuggingFaceFormat(ForeignFormat):
    """A folder with config.json and model.safetensors, one file or shards, or their older names."""

    name = "hf"
    title = "transformers"
    library = "transformers"
    weight_names = ("model.safetensors", INDEX, "pytorch_model.bin", TORCH_INDEX)
    families: ClassVar[dict[str, str]] = {
        "swinv2": "simmim.checkpoints.formats.swinv2.huggingface",
        "swin": "simmim.checkpoints.formats.swin.huggingface",
        "vit": "simmim.checkpoints.formats.vit.huggingface",
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
        reading = checkpoint.preprocessing.reading_or_default
        if reading.is_deep:
            notes += (
                f"transformers' processor only normalizes: give it images of {height}×{width} px whose values are shares of "
                f"the channels' ranges in [0, 1] ({reading.describe()})",
            )
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


def check_config(source: Source, model_type: str, fixed: Mapping[str, Any], title: str) -> None:
    """Refuse a folder without the configuration of such a model, or of one that differs from what is published.

    Args:
        fixed: what the published models have; transformers' configuration could say otherwise.

    Raises:
        ValueError: naming the difference.
    """
    stored, path = source.config, source.folder / CONFIG
    if stored.get("model_type") != model_type:
        says = f"{CONFIG} beside it says model_type {stored['model_type']!r}" if "model_type" in stored else ""
        raise ValueError(
            f"{source.file} holds a model of transformers and {says or f'no {CONFIG} lies beside it'}: give a whole folder, "
            f"with model_type {model_type!r}"
        )
    for name, value in fixed.items():
        if stored.get(name, value) != value:
            raise ValueError(
                f"{path} says {name} {stored[name]!r}: {title} as published, and so this toolkit, has {value!r}"
            )


def states(source: Source, fixed: Mapping[str, Any]) -> bool:
    """Whether a configuration agrees with what the published models have. What differs is left to other rows."""
    return all(source.config.get(name, value) == value for name, value in fixed.items())


def blocks_of(tensors: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    """The number of blocks in each stage of a Swin, by their names."""
    block = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.")
    blocks = {(int(match[1]), int(match[2])) for name in tensors if (match := block.match(name))}
    return tuple(Counter(stage for stage, _ in sorted(blocks)).values())


# --- preprocessing ---------------------------------------------------------------------------------------------------


def processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The preprocessor_config.json of `preprocessing`: shortest edge and central crop, or squashed.

    Values that are deeper than 8 bits are shares of each channel's range, which these processors have no words for, and they
    resize 8-bit values alone: they only normalize.
    """
    height, width = preprocessing.image_size
    if preprocessing.reading_or_default.is_deep:
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": False,
            "do_rescale": False,
            "do_normalize": True,
            "image_mean": list(preprocessing.mean),
            "image_std": list(preprocessing.std),
        }
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
        _, described = read_description(source, EncoderConfig)  # type: ignore[type-abstract]
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
