"""The Swin Transformer V2 (arXiv 2111.09883)."""

from __future__ import annotations

from simmim.encoders.base import EncoderFamily
from simmim.encoders.swinv2.config import PRESETS, SwinV2Config
from simmim.encoders.swinv2.cost import SwinV2Cost
from simmim.encoders.swinv2.model import SwinV2

__all__ = ["FAMILY", "PRESETS", "SwinV2", "SwinV2Config", "build"]


def build(config: SwinV2Config, checkpoint_activations: bool = False, sequential_attention: int | None = None) -> SwinV2:
    """A freshly initialized encoder with kernels."""
    from simmim.encoders.swinv2 import kernels

    return kernels.use(SwinV2(config, checkpoint_activations, sequential_attention))


FAMILY = EncoderFamily(
    name="swinv2",
    title="SwinV2",
    config=SwinV2Config,
    build=build,
    presets=PRESETS,
    paper="arXiv 2111.09883",
    cost=SwinV2Cost(),
)
