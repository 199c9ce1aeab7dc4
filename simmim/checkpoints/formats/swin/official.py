"""Swin in the authors' checkpoints: names, the buffers that their modules store, and their training configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.key_tables import KeyTable, same_names
from simmim.checkpoints.formats.official import (
    FILE_NAME,
    HEAD_ROWS,
    PRETRAINING_ROWS,
    SIMMIM_FILE_NAME,
    Architecture,
    OfficialRows,
    preprocessing_of,
    stored_settings,
    with_tuples,
)
from simmim.checkpoints.formats.swin.recognition import (
    AUTHORS_PROJECTION,
    config_of,
    fitted,
    is_swin,
    swin_config,
    table_windows,
)
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile
from simmim.encoders.base import Size, State
from simmim.encoders.shifted_windows.geometry import relative_position_index, shift_mask
from simmim.encoders.swin.config import SwinConfig

TITLE = "the authors' module"
BLOCK = "layers.{i}.blocks.{j}."
# This toolkit's names are the authors'.
TABLE = KeyTable(
    encoder=same_names(
        *(f"patch_embed.{name}.{part}" for name in ("proj", "norm") for part in ("weight", "bias")),
        BLOCK + "attn.relative_position_bias_table",
        *(BLOCK + f"attn.{name}.{part}" for name in ("qkv", "proj") for part in ("weight", "bias")),
        *(BLOCK + f"mlp.{name}.{part}" for name in ("fc1", "fc2") for part in ("weight", "bias")),
        *(BLOCK + f"{name}.{part}" for name in ("norm1", "norm2") for part in ("weight", "bias")),
        *("layers.{i}.downsample." + name for name in ("reduction.weight", "norm.weight", "norm.bias")),
        *("norm.weight", "norm.bias"),
    ),
    pretraining=PRETRAINING_ROWS,
    head=HEAD_ROWS,
)
# Fields of our configuration that the authors' configuration has, too.
SIZES = {"embed_dim": "EMBED_DIM", "depths": "DEPTHS", "num_heads": "NUM_HEADS", "mlp_ratio": "MLP_RATIO"}
BUFFERS = re.compile(r"relative_position_index$|attn_mask$")
NO_NOTES: tuple[str, ...] = ()
WINDOWS_OF_MAP = 8  # per side of the first stage, as published


class SwinOfficial(OfficialRows):
    """The authors' Swin: classifiers, SimMIM models, and encoders alone."""

    table, buffers, config_class = TABLE, BUFFERS, SwinConfig

    def detect(self, source: Source) -> bool:
        return is_swin(source.weights.tensors, AUTHORS_PROJECTION)

    def find_architecture(
        self, state: State, buffers: State, settings: Mapping, file: WeightFile, overrides: Mapping[str, Any]
    ) -> Architecture:
        return find_architecture(state, buffers, settings, file)

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        return fitted(checkpoint, TITLE)

    def buffers_of(self, checkpoint: Checkpoint) -> State:
        return buffers_of(config_of(checkpoint), checkpoint.preprocessing.image_size)

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        config, fields = config_of(checkpoint), checkpoint.config.as_dict()
        own = {
            **{theirs: fields[ours] for ours, theirs in SIZES.items()},
            "WINDOW_SIZE": config.window_size,
            "PATCH_SIZE": config.patch_size,
            "IN_CHANS": config.in_channels,
            "QKV_BIAS": True,
            "QK_SCALE": None,
            "APE": False,
            "PATCH_NORM": True,
        }
        return stored_settings(checkpoint, "swin", config.drop_path_rate, own)

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        fitted(checkpoint, TITLE)
        height, width = checkpoint.preprocessing.image_size
        if height == width and config_of(checkpoint).windows_divide((height, width)):
            return ()
        return (f"the authors' modules take square images that windows divide, which {height}×{width} px are not",)


ROWS = SwinOfficial()


def find_architecture(state: State, buffers: State, settings: Mapping, file: WeightFile) -> Architecture:
    """As `OfficialRows.find_architecture`.

    Sizes and windows are in the weights. The image size is in the stored configuration, the stored masks, the file's name,
    or follows from a last stage with a smaller window; the first of these that has it is used.
    """
    stored = settings.get("MODEL", {}).get("SWIN", {})
    # What the configuration says must agree with the weights: otherwise a missing block would go unnoticed.
    stated = {ours: stored[theirs] for ours, theirs in SIZES.items() if theirs in stored}
    sizes = SwinConfig.infer_fields(state) | with_tuples(stated)
    windows = table_windows(state, len(SwinConfig.infer_fields(state)["depths"]))
    image, notes = settings.get("DATA", {}).get("IMG_SIZE") or image_in_masks(buffers, windows, sizes), NO_NOTES
    if image is None:
        image, notes = image_by_name_or_windows(file, windows, sizes)
    size = tuple(image) if isinstance(image, list | tuple) else (image, image)
    sizes["drop_path_rate"] = settings.get("MODEL", {}).get("DROP_PATH_RATE", 0.0)
    return swin_config(sizes, windows, size), preprocessing_of(state, size, sizes["in_channels"]), notes


def image_in_masks(buffers: State, windows: tuple[int, ...], sizes: Mapping[str, Any]) -> int | None:
    """The side of the images in pixels by the first stored mask, which has one row for each window of its map."""
    for name, mask in buffers.items():
        match = re.match(r"layers\.(\d+)\.blocks\.\d+\.attn_mask$", name)
        if match:
            stage = int(match[1])
            return windows[stage] * math.isqrt(len(mask)) * sizes["patch_size"] * 2**stage
    return None


def image_by_name_or_windows(
    file: WeightFile, windows: tuple[int, ...], sizes: Mapping[str, Any]
) -> tuple[int, tuple[str, ...]]:
    """The side of the images in pixels, and a note on where it is from."""
    name = f"{file.source.stem} {file.source.parent.name}"
    match = SIMMIM_FILE_NAME.search(name)
    if match:
        return int(match["size"]), (f"{match['size']} px by the file's name",)
    match = FILE_NAME.search(name)
    if match:
        side = match["size"] or match["size_before"]
        return int(side), (f"{side} px by the file's name",)
    if windows[-1] < max(windows):
        # The last map was smaller than the window, so its window is the map.
        side = windows[-1] * sizes["patch_size"] * 2 ** (len(windows) - 1)
        return side, (f"{side} px by the last stage's window of {windows[-1]}",)
    side = max(windows) * sizes["patch_size"] * WINDOWS_OF_MAP
    return side, (f"image size assumed to be {side} px, eight windows per side",)


def buffers_of(config: SwinConfig, image_size: Size) -> State:
    """What the authors' modules store beside the weights, so that they load the file strictly."""
    cpu, buffers = torch.device("cpu"), {}
    shapes = zip(config.depths, config.windows(image_size), config.maps(image_size))
    for stage, (depth, window, size) in enumerate(shapes):
        shift = tuple(side // 2 if length > side else 0 for side, length in zip(window, size))
        padded = tuple(-(-length // side) * side for length, side in zip(size, window))
        tokens = window[0] * window[1]
        for block in range(depth):
            name = BLOCK.format(i=stage, j=block)
            buffers[name + "attn.relative_position_index"] = (
                relative_position_index(window, cpu).view(tokens, tokens).clone()
            )
            if block % 2 and any(shift):
                buffers[name + "attn_mask"] = shift_mask(padded, window, shift, cpu).clone()  # type: ignore[arg-type]
    return buffers
