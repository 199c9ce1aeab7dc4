"""Stage 1: pre-train a SwinV2 encoder with SimMIM on unlabeled images."""
from importlib import import_module

_HOMES = {
    "pretrain": "pretrain.run",
    "load_simmim": "pretrain.run",
    "PretrainSettings": "pretrain.settings",
    "DataSettings": "pretrain.settings",
    "ModelSettings": "pretrain.settings",
    "OptimSettings": "pretrain.settings",
    "ProbeSettings": "pretrain.settings",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
