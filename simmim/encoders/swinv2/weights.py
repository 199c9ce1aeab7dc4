"""What the names and shapes of a Swin Transformer V2's weights say of its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def infer_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of an encoder's weights say of its architecture, as settings of `SwinV2Config`.

    Raises:
        ValueError: when these are not the weights of a Swin Transformer V2, naming what it would have.
    """
    blocks: dict[int, set[int]] = {}
    for name in state:
        found = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name)
        if found:
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))

    def any_of(*names: str) -> Tensor:
        for name in names:
            if name in state:
                return state[name]
        raise ValueError(f"these are not the weights of a whole Swin Transformer V2: there is no {names[0]}")

    def of_stage(stage: int, name: str) -> Tensor:
        return any_of(*(f"layers.{stage}.blocks.{block}.{name}" for block in sorted(blocks.get(stage, {0}))))

    projection = any_of("patch_embed.proj.weight")
    hidden = of_stage(0, "mlp.fc1.weight")
    scales = [of_stage(stage, "attn.logit_scale") for stage in range(len(blocks))]
    normed = sorted(int(name.split(".")[3]) for name in state if re.match(r"layers\.2\.blocks\.\d+\.norm3\.weight", name))
    return {
        "embed_dim": projection.shape[0],
        "in_channels": projection.shape[1],
        "patch_size": projection.shape[2],
        "depths": tuple(len(blocks[stage]) for stage in sorted(blocks)),
        "num_heads": tuple(scale.numel() for scale in scales),
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
        "extra_norm_every": normed[0] + 1 if normed else 0,
    }
