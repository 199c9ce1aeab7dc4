"""The Swin Transformer (arXiv 2103.14030), as SimMIM pre-trains it (arXiv 2111.09886)."""

from __future__ import annotations

from simmim.encoders.base import EncoderFamily
from simmim.encoders.swin.config import PRESETS, SwinConfig
from simmim.encoders.swin.cost import SwinCost
from simmim.encoders.swin.model import Swin

__all__ = ["FAMILY", "PRESETS", "Swin", "SwinConfig"]

FAMILY = EncoderFamily(
    name="swin",
    title="Swin",
    config=SwinConfig,
    build=Swin,
    presets=PRESETS,
    paper="arXiv 2103.14030",
    cost=SwinCost(),
)
