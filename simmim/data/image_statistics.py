"""Statistics of a sample of a source's images, from which a run's defaults follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simmim.data.decode import MAX_PIXELS, open_picture
from simmim.data.orientation import Size
from simmim.data.pictures import Picture
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.data.records import record_name
from simmim.messages import notify

if TYPE_CHECKING:
    import datasets

THUMBNAIL_PX = 64  # longer side; enough for means and deviations, and a large JPEG is not decoded in full


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of a sample of a source's images.

    Attributes:
        short_side_px: median of the images' shorter sides.
        channels: 1 if every sampled image is gray, 3 for color, also if some are gray, else the files' count.
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
    source: datasets.Dataset,
    channels: int | None = None,
    num_samples: int = 256,
    max_pixels: int = MAX_PIXELS,
    num_images: int | None = None,
) -> ImageStatistics:
    """Measure up to `num_samples` images, evenly spread over the source.

    That all are gray is a `Notice` where others may be in color: a model of gray images sees those without their color. Gray
    images among color ones lose nothing.

    Args:
        channels: in which all images are read; None detects them.
        max_pixels: larger images count as unreadable.
        num_images: images that `source` stands for; its rows by default.

    Raises:
        ValueError: if none of them can be read, with the first one's reason; if they differ in channels other than as gray
            and color do, with two files' counts.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, min(num_samples, len(source))).round().astype(int))
    thumbnails, sizes = [], []
    paths: dict[int, str] = {}  # by number of channels, the first file that has it
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
        paths.setdefault(picture.channels, record_name(record, row))
    if not sizes:
        raise ValueError(f"none of {len(rows)} sampled images can be read; the first, {first_error}")
    found = common_channels(paths)
    if channels is None and found == 1 and len(rows) < (num_images or len(source)):
        notify(
            f"gray: decided from {len(sizes):,} of {num_images or len(source):,} images; color images among the others are "
            "read as gray, and counted"
        )
    channels = found
    # Gray images among color images count as color.
    pixels = [np.broadcast_to(small, (channels, *small.shape[1:])).reshape(channels, -1) for small in thumbnails]
    values = np.concatenate(pixels, axis=1) / 255
    return ImageStatistics(
        short_side_px=int(np.median([min(size) for size in sizes])),
        channels=channels,
        decoded_mib=float(np.mean([height * width for height, width in sizes])) * channels * len(source) / 2**20,
        mean=tuple(round(float(value), 3) for value in values.mean(axis=1)),
        std=tuple(round(max(float(value), 0.01), 3) for value in values.std(axis=1)),
        sizes=tuple(sizes),
    )


def common_channels(paths: dict[int, str]) -> int:
    """The number of channels in which all images can be read.

    Args:
        paths: by number of channels, a file that has it.

    Raises:
        ValueError: if files differ other than as gray and color do.
    """
    uncommon = paths.keys() - {1, 3}
    if uncommon and len(paths) > 1:
        one, other = min(uncommon), min(paths.keys() - {min(uncommon)})
        raise ValueError(f"images differ in channels: {paths[one]} has {one}, {paths[other]} has {other}")
    return max(paths)


def thumbnail(picture: Picture) -> np.ndarray:
    """All of a picture, no side longer than `THUMBNAIL_PX`: (channels, height, width) uint8."""
    height, width = picture.size
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return picture.crop((0, 0, width, height), size).numpy()
