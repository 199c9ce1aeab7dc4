"""The Vision Transformer as SimMIM has it (arXiv 2111.09886): that of BEiT (arXiv 2106.08254)."""

from __future__ import annotations

from simmim.encoders.base import EncoderFamily
from simmim.encoders.vit.config import PRESETS, ViTConfig
from simmim.encoders.vit.cost import ViTCost
from simmim.encoders.vit.model import ViT

__all__ = ["FAMILY", "PRESETS", "ViT", "ViTConfig"]

FAMILY = EncoderFamily(
    name="vit",
    title="ViT",
    config=ViTConfig,
    build=ViT,
    presets=PRESETS,
    paper="arXiv 2111.09886",
    cost=ViTCost(),
)
