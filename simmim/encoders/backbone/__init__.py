"""Networks of timm and transformers as encoders: for comparison, and to be fine-tuned. SimMIM does not pre-train them."""

from simmim.encoders.backbone.config import BackboneConfig
from simmim.encoders.backbone.model import Backbone
from simmim.encoders.base import EncoderFamily

__all__ = ["FAMILY", "Backbone", "BackboneConfig"]

FAMILY = EncoderFamily(name="backbone", title="Backbone", config=BackboneConfig, build=Backbone, presets={})
