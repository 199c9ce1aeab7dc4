"""The architecture of a Swin Transformer V2 from the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def infer_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `SwinV2Config` that follow from the names and shapes of an encoder's weights.

    Raises:
        ValueError: when a weight of every Swin Transformer V2 is missing, naming it.
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
        raise ValueError(f"these are not the weights of a whole Swin Transformer V2: there is no {names[0]}")

    def weight_of_stage(stage: int, name: str) -> Tensor:
        return first_present(*(f"layers.{stage}.blocks.{block}.{name}" for block in sorted(blocks.get(stage, {0}))))

    projection = first_present("patch_embed.proj.weight")
    hidden = weight_of_stage(0, "mlp.fc1.weight")
    scales = [weight_of_stage(stage, "attn.logit_scale") for stage in range(len(blocks))]
    extra_norms = [name for name in state if re.match(r"layers\.2\.blocks\.\d+\.norm3\.weight", name)]
    blocks_with_extra_norm = sorted(int(name.split(".")[3]) for name in extra_norms)
    return {
        "embed_dim": projection.shape[0],
        "in_channels": projection.shape[1],
        "patch_size": projection.shape[2],
        "depths": tuple(len(blocks[stage]) for stage in sorted(blocks)),
        "num_heads": tuple(scale.numel() for scale in scales),
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
        "extra_norm_every": blocks_with_extra_norm[0] + 1 if blocks_with_extra_norm else 0,
    }
