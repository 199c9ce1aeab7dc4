"""Swin Transformer V2 (arXiv 2111.09883)."""

from __future__ import annotations

from typing import Any

from simmim.encoders.base import EncoderFamily
from simmim.encoders.swinv2.config import PRESETS, SwinV2Config
from simmim.encoders.swinv2.cost import SwinV2Cost
from simmim.encoders.swinv2.model import SwinV2

__all__ = ["FAMILY", "PRESETS", "SwinV2", "SwinV2Config", "build"]


def build(config: SwinV2Config, *arguments: Any) -> SwinV2:
    """A freshly initialized encoder with the kernels put in."""
    from simmim.encoders.swinv2 import kernels

    return kernels.use(SwinV2(config, *arguments))


FAMILY = EncoderFamily("swinv2", "SwinV2", SwinV2Config, build, PRESETS, "arXiv 2111.09883", SwinV2Cost())
