"""Statistics of a sample of a source's images, from which a run's defaults follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from simmim.data.decode import MAX_PIXELS, STRETCHED, open_picture
from simmim.data.deep import RangeLengthError
from simmim.data.orientation import Size
from simmim.data.pictures import Picture
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.data.records import Record, record_name
from simmim.data.value_ranges import common_channels, settle_reading
from simmim.messages import counted, notify
from simmim.reading import AUTO, Reading

if TYPE_CHECKING:
    import datasets

BYTES_OF_DEEP = 2  # of a value that is deeper than 8 bits, in most files
BINS = 24
NUM_SAMPLES = 256
LEAST_STD = 1e-4  # of a channel of deep values, which may be constant
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
        reading: how values become pictures, with nothing left open.
        histograms: of deep images, for each channel, the share of the values in each of `BINS` parts of its range.
        missing: of deep images, for each channel, the share of the pixels without data.
    """

    short_side_px: int
    channels: int
    decoded_mib: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[Size, ...] = ()
    reading: Reading = AUTO
    histograms: tuple[tuple[float, ...], ...] = ()
    missing: tuple[float, ...] = ()


def sample_records(source: datasets.Dataset, num_samples: int = NUM_SAMPLES) -> dict[int, Record]:
    """Up to `num_samples` records by their rows, evenly spread over the source."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(num_samples, len(source))).round().astype(int))
    return {int(row): source[int(row)]["image"] for row in rows}


def measure_images(
    source: datasets.Dataset,
    channels: int | None = None,
    num_samples: int = NUM_SAMPLES,
    max_pixels: int = MAX_PIXELS,
    num_images: int | None = None,
    reading: Reading = STRETCHED,
) -> ImageStatistics:
    """Measure up to `num_samples` images, evenly spread over the source.

    That all are gray is a `Notice` where others may be in color: a model of gray images sees those without their color. Gray
    images among color ones lose nothing.

    Args:
        channels: in which all images are read; None detects them.
        max_pixels: larger images count as unreadable.
        num_images: images that `source` stands for; its rows by default.
        reading: how values become pictures; a range of auto or type is settled by the sample.

    Raises:
        ValueError: if none of them can be read, with the first one's reason; if data.range is for another number of
            channels; if they differ in channels other than as gray and color do, with two files' counts.
    """
    records = sample_records(source, num_samples)
    reading = settle_reading(reading, records, channels, max_pixels)
    thumbnails, sizes = [], []
    paths: dict[int, list[str]] = {}  # by number of channels, the files that have it
    first_error = None
    for row, record in records.items():
        try:
            picture = open_picture(record, channels, max_pixels, reading)
            thumbnails.append(thumbnail(picture))
        except UNREADABLE as error:
            first_error = first_error or (record_name(record, row), error)
            continue
        sizes.append(picture.size)
        paths.setdefault(picture.channels, []).append(record_name(record, row))
    if not sizes:
        raise no_image_error(len(records), *first_error)  # type: ignore[misc]
    found = common_channels(paths)
    if channels is None and found == 1 and len(records) < (num_images or len(source)):
        notify(
            f"gray: decided from {len(sizes):,} of {counted(num_images or len(source), 'image')}; color images among the "
            "others are read as gray, and counted"
        )
    values = pool_channels(thumbnails, found)
    mean, std = mean_and_deviation(values)
    value_bytes = BYTES_OF_DEEP if reading.is_deep else 1
    num_values = float(np.mean([height * width for height, width in sizes])) * found * len(source)
    return ImageStatistics(
        short_side_px=int(np.median([min(size) for size in sizes])),
        channels=found,
        decoded_mib=num_values * value_bytes / 2**20,
        mean=mean,
        std=std,
        sizes=tuple(sizes),
        reading=reading,
        **(describe_values(values) if reading.is_deep else {}),  # type: ignore[arg-type]
    )


def no_image_error(num_images: int, name: str, error: Exception) -> ValueError:
    """The error for a sample of which no image can be read.

    Args:
        name, error: of the first image.
    """
    if isinstance(error, RangeLengthError):
        return ValueError(
            f"data.range has {counted(error.ranges, 'range')} and the images have {counted(error.channels, 'channel')}, as "
            f"{name}: give [low, high] for each channel, or auto"
        )
    return ValueError(
        f"none of {counted(num_images, 'sampled image')} can be read; the first, {name}: {describe_error(error)}"
    )


def measure_for_encoder(source: datasets.Dataset, reading: Reading | None, **options: Any) -> ImageStatistics:
    """As `measure_images`, with the reading of an encoder where that fits the images: the one by which it was trained.

    Args:
        reading: the encoder's; None settles one by the images. Ranges for another number of channels are not used.
        options: of `measure_images`.
    """
    if reading is None or not reading.is_deep:
        return measure_images(source, reading=reading or AUTO, **options)
    # Files of other channels have other names for them, or none.
    images = measure_images(source, reading=replace(reading, range="auto", transform="none", channel_names=()), **options)
    number = len(reading.range)
    if number != images.channels and not {number, images.channels} <= {1, 3}:
        return images
    return measure_images(source, reading=reading, **{**options, "channels": number})


def pool_channels(thumbnails: list[np.ndarray], channels: int) -> np.ndarray:
    """The values of all thumbnails, (channels, pixels). Gray images among color images count as color."""
    pixels = [np.broadcast_to(small, (channels, *small.shape[1:])).reshape(channels, -1) for small in thumbnails]
    return np.concatenate(pixels, axis=1)


def describe_values(values: np.ndarray) -> dict[str, tuple]:
    """The histograms and the missing shares of `ImageStatistics`, of (channels, pixels) shares."""
    histograms = []
    for channel in values:
        counts = np.histogram(channel[~np.isnan(channel)], bins=BINS, range=(0, 1))[0]
        histograms.append(tuple((counts / max(counts.sum(), 1)).tolist()))
    return {"histograms": tuple(histograms), "missing": tuple(np.isnan(values).mean(axis=1).tolist())}


def mean_and_deviation(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1], without pixels that lack data.

    Args:
        values: (channels, pixels), uint8 levels or float shares.
    """
    if values.dtype == np.uint8:
        values = values / 255
        return tuple(round(float(mean), 3) for mean in values.mean(axis=1)), tuple(
            round(max(float(std), 0.01), 3) for std in values.std(axis=1)
        )
    values = values.astype(np.float64)
    empty = np.isnan(values).all(axis=1)
    values[empty] = 0
    # Deep values may fill a small part of their range: four significant digits, and no floor that matters.
    means, stds = np.nanmean(values, axis=1), np.nanstd(values, axis=1)
    return tuple(float(f"{mean:.4g}") for mean in means), tuple(float(f"{max(std, LEAST_STD):.4g}") for std in stds)


def thumbnail(picture: Picture) -> np.ndarray:
    """All of a picture, no side longer than `THUMBNAIL_PX`: (channels, height, width) uint8 or float32."""
    height, width = picture.size
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return picture.crop((0, 0, width, height), size).numpy()
