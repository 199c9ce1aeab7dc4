"""Methods of pre-training by name. The only file that knows concrete methods; each is imported when it is first asked for.

A new method is a file in `simmim/methods/`, and a line in `METHODS`.
"""

from __future__ import annotations

from importlib import import_module

from simmim.messages import did_you_mean
from simmim.methods.base import Method

# Name to module and class. The first is the default.
METHODS = {
    "simmim": ("simmim.methods.simmim", "SimMIM"),
    "canvas": ("simmim.methods.canvas", "Canvas"),
    "contrast": ("simmim.methods.contrast", "Contrast"),
}


def default_method() -> str:
    """The name of the method that runs and files mean which name none."""
    return next(iter(METHODS))


def method_named(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ValueError: for an unknown name, naming the nearest known one.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    module, attribute = METHODS[name]
    return getattr(import_module(module), attribute)
