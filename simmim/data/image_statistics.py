"""A look at a sample of a source's images, from which a run's defaults follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simmim.data.decode import MAX_PIXELS, Picture, Size, open_picture
from simmim.data.pillow_guard import UNREADABLE, describe_error

if TYPE_CHECKING:
    import datasets

THUMBNAIL_PX = 64  # longer side; enough for means and deviations, and a large JPEG need not be decoded in full


@dataclass(frozen=True)
class ImageStatistics:
    """What a sample of a source's images looks like.

    Attributes:
        short_side_px: median of the images' shorter sides.
        channels: 1 where every sampled image is gray, 3 for color, with gray among it or not, else the files' count.
        decoded_mib: estimated size of all images decoded.
        mean, std: per channel, of values in [0, 1].
        sizes: (height, width) in pixels, upright, of each sampled image that could be read.
    """

    short_side_px: int
    channels: int
    decoded_mib: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[Size, ...] = ()


def measure_images(
    source: datasets.Dataset, channels: int | None = None, sampled: int = 256, max_pixels: int = MAX_PIXELS
) -> ImageStatistics:
    """Look at up to `sampled` images, evenly spread.

    Args:
        channels: that all images shall be seen in; None finds them.
        max_pixels: larger images count as unreadable.

    Raises:
        ValueError: when none of them can be read, with the first one's reason; when they differ in channels other than
            as gray and color do, with two files' counts.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, min(sampled, len(source))).round().astype(int))
    thumbnails, sizes = [], []
    paths: dict[int, str] = {}  # by channels, the first file with so many
    first_error = None
    for row in rows:
        record = source[int(row)]["image"]
        try:
            picture = open_picture(record, channels, max_pixels)
            thumbnails.append(thumbnail(picture))
        except UNREADABLE as error:
            first_error = first_error or f"{record['path']}: {describe_error(error)}"
            continue
        sizes.append(picture.size)
        paths.setdefault(picture.channels, f"{record['path'] or f'image {row}'}")
    if not sizes:
        raise ValueError(f"none of {len(rows)} sampled images can be read; the first, {first_error}")
    unlike = paths.keys() - {1, 3}
    if unlike and len(paths) > 1:
        one, other = min(unlike), min(paths.keys() - {min(unlike)})
        raise ValueError(f"images differ in channels: {paths[one]} has {one}, {paths[other]} has {other}")
    channels = max(paths)
    # Gray among color is seen as color.
    seen = [np.broadcast_to(small, (channels, *small.shape[1:])).reshape(channels, -1) for small in thumbnails]
    values = np.concatenate(seen, axis=1) / 255
    return ImageStatistics(
        short_side_px=int(np.median([min(size) for size in sizes])),
        channels=channels,
        decoded_mib=float(np.mean([height * width for height, width in sizes])) * channels * len(source) / 2**20,
        mean=tuple(round(float(value), 3) for value in values.mean(axis=1)),
        std=tuple(round(max(float(value), 0.01), 3) for value in values.std(axis=1)),
        sizes=tuple(sizes),
    )


def thumbnail(picture: Picture) -> np.ndarray:
    """All of a picture, no side longer than `THUMBNAIL_PX`: (channels, height, width) uint8."""
    height, width = picture.size
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return picture.crop((0, 0, width, height), size).numpy()
