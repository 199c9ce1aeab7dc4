"""A look at a sample of a source's images, from which a run's defaults follow."""
from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from simmim.data.decode import UNREADABLE, read_image, reason

if TYPE_CHECKING:
    import datasets

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Survey:
    """What a sample of a source's images looks like.

    Attributes:
        short_side_px: median of the images' shorter sides.
        channels: 1 where every sampled image is gray, else 3.
        decoded_mib: estimated size of all images decoded.
        mean, std: per channel, of values in [0, 1].
    """

    short_side_px: int
    channels: int
    decoded_mib: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def survey(source: datasets.Dataset, channels: int | None = None, sampled: int = 256) -> Survey:
    """Look at up to `sampled` images, evenly spread.

    Raises:
        ValueError: when none of them can be read, with the first one's reason.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, min(sampled, len(source))).round().astype(int))
    images, first_error = [], None
    for row in rows:
        record = source[int(row)]["image"]
        try:
            with Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])) as image:
                gray = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;")
            images.append((read_image(record, 3), gray))
        except UNREADABLE as error:
            first_error = first_error or f"{record['path']}: {reason(error)}"
    if not images:
        raise ValueError(f"none of {len(rows)} sampled images can be read; the first, {first_error}")
    channels = channels or (1 if all(gray for _, gray in images) else 3)
    thumbnails = []
    for image, _ in images:
        small = image.convert("L" if channels == 1 else "RGB")
        small.thumbnail((64, 64))
        thumbnails.append(np.asarray(small, dtype=np.float64).reshape(-1, channels) / 255)
    pixels = np.concatenate(thumbnails)
    areas = [image.width * image.height for image, _ in images]
    return Survey(
        short_side_px=int(np.median([min(image.size) for image, _ in images])),
        channels=channels,
        decoded_mib=float(np.mean(areas)) * channels * len(source) / 2**20,
        mean=tuple(round(float(value), 3) for value in pixels.mean(axis=0)),
        std=tuple(round(max(float(value), 0.01), 3) for value in pixels.std(axis=0)),
    )
