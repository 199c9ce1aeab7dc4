"""What a weight file looks like that no format recognizes, for the error message."""

from __future__ import annotations

import re
from collections.abc import Iterable

INCOMPLETE = "no whole Swin Transformer V2: there is no"
BLOCK = r"layers[._]0\.blocks\.0\.(attn|attention\.self)\."
# Patterns of tensor names that must all occur, and what they tell, the first that fits. The last two are a SwinV2 of which a
# part is missing.
NETWORKS = (
    ((BLOCK, r"relative_position_bias_table$"), "no whole Swin Transformer: there is no patch_embed.proj.weight"),
    ((r"^(.*\.)?layer1\.0\.conv1\.",), "a ResNet"),
    ((r"stages\.0\.layers\.0\.convolution",), "a ResNet"),
    ((r"cls_token$", r"(blocks|layer|layers)\.0\."), "a ViT without the relative position biases of SimMIM's"),
    ((r"stages\.0\.(blocks\.)?0\.(dwconv|conv_dw)",), "a ConvNeXt"),
    ((BLOCK, r"logit_scale$"), f"{INCOMPLETE} patch_embed.proj.weight"),
    ((BLOCK,), f"{INCOMPLETE} logit_scale"),
)


def describe_network(names: Iterable[str]) -> str:
    """The kind of network that tensors belong to by their names; without one, how many there are and the first names."""
    names = list(names)
    for patterns, kind in NETWORKS:
        if all(any(re.search(pattern, name) for name in names) for pattern in patterns):
            return kind
    return f"something else, {len(names)} tensors: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
