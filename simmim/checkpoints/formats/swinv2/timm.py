"""SwinV2 in timm: the authors' names, but each merging belongs to the stage that it leads to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import check_state
from simmim.checkpoints.formats.key_tables import KeyTable, prefix_of, weight_and_bias
from simmim.checkpoints.formats.parts import class_names, parts_of_form, read_head
from simmim.checkpoints.formats.swinv2 import official
from simmim.checkpoints.formats.swinv2.official import Architecture, find_architecture, with_tuples
from simmim.checkpoints.formats.swinv2.recognition import (
    AUTHORS_PROJECTION,
    config_of,
    is_swinv2,
    padding_note,
    read_swinv2_description,
    refuse_extra_norms,
    with_pretrained_windows,
)
from simmim.checkpoints.formats.timm import TimmFormat, TimmRows
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.base import State
from simmim.encoders.swinv2.config import PRESETS, SwinV2Config

TABLE = KeyTable(
    encoder=tuple(
        (ours, theirs.replace("layers.{i}.downsample", "layers.{next}.downsample"))
        for ours, theirs in official.TABLE.encoder
        if "norm3" not in ours
    ),
    head=weight_and_bias("head", "head.fc"),
)
# Registered names by embed_dim and the blocks of the third stage.
NAMES = {
    96: {6: "swinv2_tiny_window8_256", 18: "swinv2_small_window8_256"},
    128: {18: "swinv2_base_window8_256"},
    192: {18: "swinv2_large_window12_192"},
}
# Our fields that timm's arguments have, too. Those of the images may be absent there, and differ from the name's.
SIZES = {"embed_dim": "embed_dim", "depths": "depths", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio"}
IMAGES = {"in_channels": "in_chans", "patch_size": "patch_size"}
# Window and windows of pre-training of registered names that have moved, where config.json leaves them to the name.
MOVED_WINDOWS = {"12to16_192to256": (16, (12, 12, 12, 6)), "12to24_192to384": (24, (12, 12, 12, 6))}


class SwinV2Timm(TimmRows):
    """timm's swinv2 models."""

    first_conv = "patch_embed.proj"
    classifier = "head.fc"

    def detect(self, source: Source) -> bool:
        names = source.weights.tensors
        if not is_swinv2(names, AUTHORS_PROJECTION):
            return False
        has_timm_names = any(re.search(r"(^|\.)head\.fc\.|layers[._][1-9]\d*\.downsample\.", name) for name in names)
        # The authors' merging ends a stage, timm's begins the next: of two stages, layers.0 or layers.1 has one.
        has_authors_names = any("layers.0.downsample." in name for name in names)
        return (has_timm_names and not has_authors_names) or "pretrained_cfg" in source.config

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        file = source.weights
        prefix = prefix_of(file.tensors, AUTHORS_PROJECTION)
        encoder = {
            name.removeprefix(prefix): value
            for name, value in file.tensors.items()
            if name.startswith(prefix) and not official.BUFFERS.search(name)
        }
        config, preprocessing, notes = read_architecture(encoder, file, source, overrides)
        state, left_over = TABLE.to_ours(encoder, config)
        extra = [name for name in left_over if name not in {theirs for _, theirs in TABLE.head}]
        extra += [name for name in file.tensors if not name.startswith(prefix)]
        check_state(config, state | {name: (file.tensors | encoder)[name] for name in extra}, file.source)
        head = read_head(TABLE, encoder, file)
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
        return TABLE.from_ours(checkpoint.encoder, checkpoint.config) | parts_of_form(TABLE, checkpoint, form)

    def architecture_name(self, checkpoint: Checkpoint) -> str:
        """The registered name of this size; tiny's for other sizes, which the arguments turn into any."""
        config = config_of(checkpoint)
        depth = config.depths[2] if len(config.depths) > 2 else 0
        return NAMES.get(config.embed_dim, {}).get(depth, NAMES[96][6])

    def model_arguments(self, checkpoint: Checkpoint) -> dict[str, Any]:
        fields = checkpoint.config.as_dict()
        return {
            "img_size": list(checkpoint.preprocessing.image_size),
            **{theirs: fields[ours] for ours, theirs in {**SIZES, **IMAGES}.items()},
            "window_size": fields["window_size"],
            "pretrained_window_sizes": fields["pretrained_window_sizes"],
        }

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        refuse_extra_norms(checkpoint, TimmFormat.title)
        return padding_note(checkpoint, TimmFormat.title, shifts_before_padding=True)


ROWS = SwinV2Timm()


# --- reading the architecture ----------------------------------------------------------------------------------------


def read_architecture(encoder: State, file: WeightFile, source: Source, overrides: Mapping[str, Any]) -> Architecture:
    """Architecture and preprocessing from config.json, or without one from the file's name; and notes.

    Where this toolkit's part of config.json still agrees with timm's, it is believed.

    Args:
        encoder: the encoder's tensors under timm's names.

    Raises:
        ValueError: as `find_architecture`.
    """
    state = {under_closed_stage(name): value for name, value in encoder.items()}
    stated = source.config.get("pretrained_cfg") or source.config
    arguments = source.config.get("model_args") or {}
    name = source.config.get("architecture") or stated.get("architecture") or ""
    size = arguments.get("img_size") or tuple(stated.get("input_size", ())[1:]) or None
    if source.description and name:
        config, preprocessing = read_swinv2_description(source)
        if config.window_size == arguments.get("window_size", config.window_size):
            return config, preprocessing, ()
    window, pretrained = windows_stated(name, arguments, file)
    if window is None or size is None:
        config, preprocessing, notes = find_architecture(state, {}, {}, file, overrides)
        return replace(config, shift_before_padding=True), preprocessing, notes
    size = (size, size) if isinstance(size, int) else tuple(size)
    # What the folder says must agree with the weights: otherwise a missing block would go unnoticed.
    sizes = SwinV2Config.infer_fields(state) | sizes_stated(name, arguments)
    config = with_pretrained_windows(SwinV2Config(**sizes, window_size=window), pretrained, size)
    preprocessing = Preprocessing(
        size,
        stated.get("mean", IMAGENET_MEAN),
        stated.get("std", IMAGENET_STD),
        stated.get("interpolation", "bicubic"),
        stated.get("crop_pct") or 0.875,
        "squash" if stated.get("crop_mode") == "squash" else "crop",
    )
    # Where windows do not divide a map, timm shifts it before it pads.
    return replace(config, shift_before_padding=True), preprocessing, ()


def under_closed_stage(name: str) -> str:
    """timm's name of a tensor with each merging under the number of the stage that it ends."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(parts)


def windows_stated(name: str, arguments: Mapping[str, Any], file: WeightFile) -> tuple[int | None, Any]:
    """The window, and the windows of pre-training, by timm's arguments or else by the registered name; None for unknown.

    Raises:
        ValueError: if the arguments have different windows for different stages.
    """
    moved = next((windows for part, windows in MOVED_WINDOWS.items() if part in name), (None, None))
    match = re.search(r"window(\d+)_(\d+)", name)
    window = moved[0] or (int(match[1]) if match else None)
    if arguments.get("window_size"):
        window = one_window(arguments["window_size"], file)
    return window, arguments.get("pretrained_window_sizes") or moved[1]


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


def sizes_stated(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that timm's name and arguments state, as fields of `SwinV2Config`."""
    preset = re.match(r"swinv2_(tiny|small|base|large)_", name)
    sizes = {size: getattr(PRESETS[preset[1]], size) for size in SIZES} if preset else {}
    return with_tuples(
        sizes | {size: arguments[theirs] for size, theirs in {**SIZES, **IMAGES}.items() if theirs in arguments}
    )
