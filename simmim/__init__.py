"""Masked image pre-training of Swin Transformer V2 encoders on your own images, and transfer to few labels.

Importing this package loads nothing heavy: a name is imported when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "SwinV2": "simmim.encoders.swinv2",
    "SwinV2Config": "simmim.encoders.swinv2",
    "PRESETS": "simmim.encoders.swinv2",
    "BlockMasking": "simmim.methods.masking",
    "SimMIM": "simmim.methods.simmim",
    "load_encoder": "simmim.checkpoints",
    "save_encoder": "simmim.checkpoints",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simmim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
