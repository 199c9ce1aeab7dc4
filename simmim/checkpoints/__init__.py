"""Encoders on disk: this toolkit's own folders, and weights from and to other libraries' formats.

Importing this package loads nothing heavy: names resolve when they are first used.
"""

from importlib import import_module

_HOMES = {
    "Checkpoint": "simmim.checkpoints.checkpoint",
    "Preprocessing": "simmim.checkpoints.checkpoint",
    "load_encoder": "simmim.checkpoints.reading",
    "read": "simmim.checkpoints.reading",
    "read_encoder": "simmim.checkpoints.reading",
    "save_encoder": "simmim.checkpoints.own_files",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
