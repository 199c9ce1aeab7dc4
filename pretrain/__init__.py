"""Stage 1: pre-train a SwinV2 encoder with SimMIM on unlabeled images."""

from importlib import import_module

_HOMES = {
    "pretrain": "simmim.pretrain.run",
    "load_pretrained": "simmim.pretrain.model",
    "PretrainSettings": "simmim.pretrain.settings",
    "DataSettings": "simmim.pretrain.settings",
    "SimMIMSettings": "simmim.methods.simmim",
    "CanvasSettings": "simmim.methods.canvas",
    "OptimSettings": "simmim.pretrain.settings",
    "ProbeSettings": "simmim.pretrain.settings",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'simmim.pretrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
