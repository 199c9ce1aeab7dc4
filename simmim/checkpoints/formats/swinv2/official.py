"""SwinV2 in the authors' checkpoints: names, the buffers that their modules store, and their training configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.key_tables import KeyTable, same_names
from simmim.checkpoints.formats.official import (
    FILE_NAME,
    HEAD_ROWS,
    PRETRAINING_ROWS,
    Architecture,
    OfficialRows,
    preprocessing_of,
    stored_settings,
    with_tuples,
)
from simmim.checkpoints.formats.swinv2.recognition import (
    AUTHORS_PROJECTION,
    config_of,
    is_swinv2,
    with_pretrained_windows,
)
from simmim.checkpoints.formats.swinv2.torchvision import is_torchvision, with_authors_names
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile
from simmim.encoders.base import Size, State
from simmim.encoders.shifted_windows.config import as_pair
from simmim.encoders.shifted_windows.geometry import relative_position_index, shift_mask
from simmim.encoders.swinv2.config import SwinV2Config
from simmim.encoders.swinv2.geometry import log_spaced_coords

BLOCK = "layers.{i}.blocks.{j}."
# This toolkit's names are the authors'.
TABLE = KeyTable(
    encoder=same_names(
        *(f"patch_embed.{name}.{part}" for name in ("proj", "norm") for part in ("weight", "bias")),
        *(BLOCK + f"attn.{name}" for name in ("qkv.weight", "q_bias", "v_bias", "logit_scale")),
        *(BLOCK + f"attn.cpb_mlp.{name}" for name in ("0.weight", "0.bias", "2.weight")),
        *(BLOCK + f"attn.proj.{part}" for part in ("weight", "bias")),
        *(BLOCK + f"mlp.{name}.{part}" for name in ("fc1", "fc2") for part in ("weight", "bias")),
        *(BLOCK + f"{name}.{part}" for name in ("norm1", "norm2", "norm3") for part in ("weight", "bias")),
        *("layers.{i}.downsample." + name for name in ("reduction.weight", "norm.weight", "norm.bias")),
        *("norm.weight", "norm.bias"),
    ),
    pretraining=PRETRAINING_ROWS,
    head=HEAD_ROWS,
)
# Fields of our configuration that the authors' configuration has, too.
SIZES = {"embed_dim": "EMBED_DIM", "depths": "DEPTHS", "num_heads": "NUM_HEADS", "mlp_ratio": "MLP_RATIO"}
# Derived from sizes. The authors' modules store them; here they are only a source of the sizes.
BUFFERS = re.compile(r"relative_coords_table$|relative_position_index$|attn_mask$|\.k_bias$")


class SwinV2Official(OfficialRows):
    """The authors' SwinV2: classifiers, SimMIM models, and encoders alone."""

    table, buffers, config_class = TABLE, BUFFERS, SwinV2Config

    def detect(self, source: Source) -> bool:
        tensors = source.weights.tensors
        return is_swinv2(tensors, AUTHORS_PROJECTION) or is_torchvision(tensors)

    def current_name(self, name: str) -> str:
        return name.replace("rpe_mlp", "cpb_mlp")

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        if not is_torchvision(source.weights.tensors):
            return super().read(source, overrides)
        found = super().read(with_authors_names(source), overrides)
        return replace(found, provenance={**found.provenance, "origin": "torchvision's names"})

    def find_architecture(
        self, state: State, buffers: State, settings: Mapping, file: WeightFile, overrides: Mapping[str, Any]
    ) -> Architecture:
        return find_architecture(state, buffers, settings, file, overrides)

    def buffers_of(self, checkpoint: Checkpoint) -> State:
        return buffers_of(config_of(checkpoint), checkpoint.preprocessing.image_size)

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        config, fields = config_of(checkpoint), checkpoint.config.as_dict()
        own = {
            **{theirs: fields[ours] for ours, theirs in SIZES.items()},
            "WINDOW_SIZE": config.window_size,
            "PRETRAINED_WINDOW_SIZES": fields["pretrained_window_sizes"],
            "PATCH_SIZE": config.patch_size,
            "IN_CHANS": config.in_channels,
        }
        return stored_settings(checkpoint, "swinv2", config.drop_path_rate, own)

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        height, width = checkpoint.preprocessing.image_size
        if height == width and config_of(checkpoint).windows_divide((height, width)):
            return ()
        return (f"the authors' modules take square images that windows divide, which {height}×{width} px are not",)


ROWS = SwinV2Official()


# --- reading the architecture ----------------------------------------------------------------------------------------


def find_architecture(
    state: State, buffers: State, settings: Mapping, file: WeightFile, overrides: Mapping[str, Any]
) -> Architecture:
    """Architecture and preprocessing of a file without this toolkit's description, and notes on what was concluded.

    Sizes are in the weights. The window is in the stored buffers, the stored configuration, the file's name, or the user's
    `window_size`; the first of these that has it is used.

    Raises:
        ValueError: if the window is in none of these.
    """
    stored = settings.get("MODEL", {}).get("SWINV2", {})
    # What the configuration says must agree with the weights: otherwise a missing block would go unnoticed.
    stated = {ours: stored[theirs] for ours, theirs in SIZES.items() if theirs in stored}
    sizes = SwinV2Config.infer_fields(state) | with_tuples(stated)
    windows, pretrained, image = windows_in_buffers(buffers, sizes)
    window = max(windows) if windows else stored.get("WINDOW_SIZE")
    image = settings.get("DATA", {}).get("IMG_SIZE") or image
    pretrained = pretrained or stored.get("PRETRAINED_WINDOW_SIZES")
    if windows and stored.get("WINDOW_SIZE", 0) > window:
        # The maps are smaller than the window, which larger images will use in full.
        window = stored["WINDOW_SIZE"]
    notes = []
    if window is None:
        window, pretrained, image, note = window_without_buffers(sizes, pretrained, image, file, overrides)
        notes.append(note)
    if image is None:
        image = window * sizes["patch_size"] * 8
        notes.append(f"image size assumed to be {image} px, eight windows per side")
    size = tuple(image) if isinstance(image, list | tuple) else (image, image)
    drop_path = settings.get("MODEL", {}).get("DROP_PATH_RATE", 0.0)
    config = SwinV2Config(**sizes, window_size=window, drop_path_rate=drop_path)
    preprocessing = preprocessing_of(state, size, sizes["in_channels"])
    return with_pretrained_windows(config, pretrained, size), preprocessing, tuple(notes)


def window_without_buffers(
    sizes: Mapping[str, Any], pretrained: Any, image: Any, file: WeightFile, overrides: Mapping[str, Any]
) -> tuple[int, Any, Any, str]:
    """Window, windows of pre-training and image size by the file's name or the user's `window_size`, and a note.

    Raises:
        ValueError: if neither has it.
    """
    match = FILE_NAME.search(f"{file.source.stem} {file.source.parent.name}")
    if match:
        window, image = int(match["window"] or match["before"]), image or int(match["size"] or match["size_before"])
        if match["window"]:
            before = SwinV2Config(**{**sizes, "window_size": int(match["before"])}).windows((int(match["size_before"]),) * 2)
            pretrained = tuple(side for side, _ in before)
        return window, pretrained, image, f"window {window} and {image} px by the file's name"
    if overrides.get("window_size"):
        window = overrides["window_size"]
        return window, pretrained, image, f"window {window} as given by window_size"
    raise ValueError(
        f"{file.source} does not store its window: no stored buffers or configuration, and no name like "
        "window8_256; give the window it was trained with, window_size"
    )


def windows_in_buffers(buffers: State, sizes: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """What stored buffers say: the window of each stage, the window that it was pre-trained with, and the side of the images
    in pixels; empty and None where they are not stored.

    For a window of w tokens that was pre-trained with p, the largest log-spaced coordinate is
    log2(1 + 8 (w − 1) / (p − 1)) / 3 (equation 4 of the paper), which gives p. The mask of a shifted block has one row per
    window of the map.
    """
    windows, pretrained, image = [], [], None
    for stage, depth in enumerate(sizes["depths"]):
        table = buffers.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
        if table is None:
            return (), (), image
        window = (table.shape[1] + 1) // 2
        windows.append(window)
        largest = float(table.max())
        pretrained.append(round(1 + 8 * (window - 1) / (2 ** (3 * largest) - 1)) if window > 1 and largest > 0 else window)
        masks = [buffers.get(f"layers.{stage}.blocks.{block}.attn_mask") for block in range(depth)]
        mask = next((mask for mask in masks if mask is not None), None)
        stride = sizes["patch_size"] * 2**stage
        if image is None and (mask is not None or depth > 1):
            # A stage of two blocks or more without a mask has one window.
            image = window * stride * (math.isqrt(len(mask)) if mask is not None else 1)
    return tuple(windows), tuple(pretrained), image


# --- writing ---------------------------------------------------------------------------------------------------------


def buffers_of(config: SwinV2Config, image_size: Size) -> State:
    """What the authors' modules store beside the weights, so that they load the file strictly."""
    height, width = (side // config.patch_size for side in image_size)
    cpu, buffers = torch.device("cpu"), {}
    for stage, (depth, window) in enumerate(zip(config.depths, config.windows(image_size))):
        shift = (window[0] // 2 if height > window[0] else 0, window[1] // 2 if width > window[1] else 0)
        pretrained = as_pair(config.pretrained_window_sizes[stage]) if config.pretrained_window_sizes else window
        tokens = window[0] * window[1]
        for block in range(depth):
            name = BLOCK.format(i=stage, j=block)
            table = log_spaced_coords(window, pretrained, cpu).view(1, 2 * window[0] - 1, 2 * window[1] - 1, 2)
            buffers[name + "attn.relative_coords_table"] = table.clone()
            index = relative_position_index(window, cpu).view(tokens, tokens)
            buffers[name + "attn.relative_position_index"] = index.clone()
            if block % 2 and any(shift):
                padded = (-(-height // window[0]) * window[0], -(-width // window[1]) * window[1])
                buffers[name + "attn_mask"] = shift_mask(padded, window, shift, cpu).clone()
        height, width = -(-height // 2), -(-width // 2)
    return buffers
