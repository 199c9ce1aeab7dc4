"""SwinV2 in timm: the authors' names, but each merging belongs to the stage that it leads to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.foreign import read_description
from simmim.checkpoints.formats.key_tables import KeyTable, weight_and_bias
from simmim.checkpoints.formats.official import Architecture, with_tuples
from simmim.checkpoints.formats.swinv2 import official
from simmim.checkpoints.formats.swinv2.official import find_architecture
from simmim.checkpoints.formats.swinv2.recognition import (
    AUTHORS_PROJECTION,
    config_of,
    is_swinv2,
    padding_note,
    refuse_extra_norms,
    with_pretrained_windows,
)
from simmim.checkpoints.formats.timm import (
    TimmFormat,
    TimmTableRows,
    has_swin_names,
    one_window,
    stated_preprocessing,
    stated_size,
    under_closed_stage,
)
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile
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


class SwinV2Timm(TimmTableRows):
    """timm's swinv2 models."""

    first_conv = "patch_embed.proj"
    classifier = "head.fc"

    table, buffers = TABLE, official.BUFFERS

    def detect(self, source: Source) -> bool:
        return is_swinv2(source.weights.tensors, AUTHORS_PROJECTION) and has_swin_names(source)

    def read_architecture(
        self, encoder: State, file: WeightFile, source: Source, overrides: Mapping[str, Any]
    ) -> Architecture:
        return read_architecture(encoder, file, source, overrides)

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
    size = stated_size(source)
    if source.description and name:
        config, preprocessing = read_description(source, SwinV2Config)
        if config.window_size == arguments.get("window_size", config.window_size):
            return config, preprocessing, ()
    window, pretrained = windows_stated(name, arguments, file)
    if window is None or size is None:
        found, preprocessing, notes = find_architecture(state, {}, {}, file, overrides)
        assert isinstance(found, SwinV2Config)
        return replace(found, shift_before_padding=True), preprocessing, notes
    # What the folder says must agree with the weights: otherwise a missing block would go unnoticed.
    sizes = SwinV2Config.infer_fields(state) | sizes_stated(name, arguments)
    config = with_pretrained_windows(SwinV2Config(**sizes, window_size=window), pretrained, size)
    preprocessing = stated_preprocessing(stated, size)
    # Where windows do not divide a map, timm shifts it before it pads.
    return replace(config, shift_before_padding=True), preprocessing, ()


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


def sizes_stated(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that timm's name and arguments state, as fields of `SwinV2Config`."""
    preset = re.match(r"swinv2_(tiny|small|base|large)_", name)
    sizes = {size: getattr(PRESETS[preset[1]], size) for size in SIZES} if preset else {}
    return with_tuples(
        sizes | {size: arguments[theirs] for size, theirs in {**SIZES, **IMAGES}.items() if theirs in arguments}
    )
