"""SimMIM pre-training of Swin Transformer V2 encoders on one's own images.

Importing this package loads nothing heavy: names resolve when they are first used.
"""

from importlib import import_module

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


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'simmim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
