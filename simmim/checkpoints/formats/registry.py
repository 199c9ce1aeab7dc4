"""File formats by name. Each is imported when it is first asked for, so that help texts list the names at no cost.

A new format is a file in `simmim/checkpoints/formats/` and a line in `FORMATS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from simmim.messages import did_you_mean

if TYPE_CHECKING:
    from simmim.checkpoints.formats.base import Format

# Name to module and class, in the order in which texts list them. The first is this toolkit's own.
FORMATS = {
    "safetensors": ("simmim.checkpoints.formats.own", "OwnFormat"),
    "official": ("simmim.checkpoints.formats.official", "OfficialFormat"),
    "timm": ("simmim.checkpoints.formats.timm", "TimmFormat"),
    "hf": ("simmim.checkpoints.formats.huggingface", "HuggingFaceFormat"),
    "onnx": ("simmim.checkpoints.formats.onnx", "OnnxFormat"),
}

# The order in which formats are asked whether a file is theirs. The first two are recognized by the name of the file, which
# costs nothing; the others by the names of the tensors, for which the file is read. transformers' names are its own. timm's
# are the authors' except for a few, so timm comes before official. A format that is not listed here is asked first: it must
# recognize its files by something that no other format has.
DETECTION_ORDER = ("safetensors", "onnx", "hf", "timm", "official")


def names() -> tuple[str, ...]:
    """Every format's name."""
    return tuple(FORMATS)


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: for an unknown name, naming the nearest known one.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}{did_you_mean(name, FORMATS)}")
    module, attribute = FORMATS[name]
    return getattr(import_module(module), attribute)()


def in_detection_order() -> list[Format]:
    """Every format, in the order in which a file is shown to them."""
    others = [name for name in FORMATS if name not in DETECTION_ORDER]
    return [format_named(name) for name in (*others, *DETECTION_ORDER)]
