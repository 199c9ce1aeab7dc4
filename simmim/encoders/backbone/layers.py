"""The layer of each parameter by its name, where a library does not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# A block, "encoder.layer.3." or "blocks.3."; or a block of a stage, "stages.1.layers.3." and the like.
BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|blocks|stages)\.(\d+)\.(?:(?:blocks|layers)\.(\d+)\.)?")
FIRST_OF_STAGE = re.compile(r"\.(?:downsampling_layer|downsample_layers)\.")  # ConvNeXt's begin a stage, Swin's end one


def layers_by_name(names: Iterable[str]) -> dict[str, int]:
    """The layer, 0 to n + 1, of each parameter: what comes before the first block is layer 0, what comes after the last one
    n + 1. A downsampling belongs to the block beside it. Without any block all are of layer 1, n + 1 for n = 0.

    Args:
        names: of all parameters, in the network's order.
    """
    names = list(names)
    keys = {name: block_key(name) for name in names}
    blocks = sorted({key for key in keys.values() if key is not None and key[1] is not None})
    if not blocks:
        return dict.fromkeys(names, 1)
    number = {key: index + 1 for index, key in enumerate(blocks)}
    found, layer = {}, 0
    for name in names:
        key = keys[name]
        if key is None:
            found[name] = layer
            continue
        if key[1] is None:
            own = [block for block in blocks if block[0] == key[0]]
            key = (own[0] if FIRST_OF_STAGE.search(name) else own[-1]) if own else blocks[0]
        found[name] = number[key]
        layer = len(blocks) + 1
    return found


def block_key(name: str) -> tuple[int, int | None] | None:
    """Stage and block; the block is None for a part of a stage beside its blocks. None for a part of no stage and no block.

    Blocks that are in no stage count as stages of one block.
    """
    match = BLOCK.search(name)
    if match is None:
        return None
    stage, block = int(match[1]), match[2]
    if block is None and (FIRST_OF_STAGE.search(name) or ".downsample." in name):
        return stage, None
    return stage, int(block or 0)


def num_blocks_of(layers: Mapping[str, int]) -> int:
    """n of `layers_by_name`: the last layer, or the one before where that is what follows the blocks."""
    last = max(layers.values())
    has_block = any(is_numbered(name) for name, layer in layers.items() if layer == last)
    return last if has_block else max(last - 1, 0)


def is_numbered(name: str) -> bool:
    """Whether a parameter belongs to one of several modules in a list."""
    return re.search(r"\.\d+\.", name) is not None
