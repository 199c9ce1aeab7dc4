"""A saved model, as it shall see these images: files that are one channel or whole, and one crop of each or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simmim.data import SEVERAL_VIEWS_CROP, check_num_views
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


def see_crops(saved: Any, views: int | None, crop: float | None) -> Any:
    """A model that was read, as it looks at other crops of an image than it was saved with.

    Args:
        saved: a dataclass with a `preprocessing`.
        views: as of `simmim.data.evaluation_views`; None leaves its number.
        crop: share of the sides of each; None leaves it, but takes `SEVERAL_VIEWS_CROP` for several crops where it was the
            whole image.

    Raises:
        ValueError: for a value out of range.
    """
    known = saved.preprocessing
    if views is not None:
        check_num_views(views, "views")
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop is {crop}: give a share of the sides above 0, at most 1")
    views = views or known.views
    crop = crop or (SEVERAL_VIEWS_CROP if views > 1 and known.crop == 1 else known.crop)
    return replace(saved, preprocessing=replace(known, views=views, crop=crop))
