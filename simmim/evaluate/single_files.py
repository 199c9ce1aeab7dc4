"""Images of an encoder whose channels were files of their own, where each file is an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simmim.data.sources import suit_reading


def suit_model(saved: Any, images: str | Path | Sequence[str]) -> Any:
    """A model that was read, as it takes these images: the same, or where its images' channels were files of their own and
    none of these is one, with a preprocessing by which each file is read as the image that it is.

    Args:
        saved: a dataclass with a `preprocessing`.
        images: as of `simmim.data.open_images`.
    """
    known = saved.preprocessing.reading_or_default
    reading = suit_reading(images, known)
    return saved if reading is known else replace(saved, preprocessing=replace(saved.preprocessing, reading=reading))
