"""The architecture of an encoder with shifted windows from the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def infer_stages(state: Mapping[str, Tensor], title: str, heads: str) -> dict[str, Any]:
    """The fields of `ShiftedWindowConfig` that follow from the names and shapes of an encoder's weights.

    Args:
        title: the kind of encoder in words, for the error.
        heads: name within a block of a weight with one entry per head: (h, 1, 1) or (offsets, h).

    Raises:
        ValueError: when a weight of every such encoder is missing, naming it.
    """
    blocks: dict[int, set[int]] = {}
    for name in state:
        match = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))

    def first_present(*names: str) -> Tensor:
        for name in names:
            if name in state:
                return state[name]
        raise ValueError(f"these are not the weights of a whole {title}: there is no {names[0]}")

    def weight_of_stage(stage: int, name: str) -> Tensor:
        return first_present(*(f"layers.{stage}.blocks.{block}.{name}" for block in sorted(blocks.get(stage, {0}))))

    projection = first_present("patch_embed.proj.weight")
    if projection.ndim != 4:
        shape = tuple(projection.shape)
        raise ValueError(
            f"patch_embed.proj.weight has shape {shape}: a {title} has (channels, image channels, patch, patch)"
        )
    hidden = weight_of_stage(0, "mlp.fc1.weight")
    per_head = [weight_of_stage(stage, heads) for stage in range(len(blocks))]
    return {
        "embed_dim": projection.shape[0],
        "in_channels": projection.shape[1],
        "patch_size": projection.shape[2],
        "depths": tuple(len(blocks[stage]) for stage in sorted(blocks)),
        "num_heads": tuple(weight.shape[-1] if weight.ndim == 2 else weight.numel() for weight in per_head),
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
    }
