"""The range of values of a collection whose images are deeper than 8 bits, one a channel, from a sample of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from simmim.data.addresses import parse_address
from simmim.data.decode import MAX_PIXELS, open_stored
from simmim.data.deep import StoredValues
from simmim.data.pillow_guard import UNREADABLE
from simmim.data.pixel_values import type_range
from simmim.data.records import Record, record_name
from simmim.data.zarr_folders import is_zarr
from simmim.messages import counted, notify
from simmim.reading import Ranges, Reading

TIFF_ENDINGS = (".tif", ".tiff", ".btf", ".qptiff")  # of files that name their channels
SAMPLED_PX = 64  # positions of a sampled image along a side
# Percentiles of the local medians of the whole sample. The median of 3 × 3 pixels is what makes a hot pixel vanish; the
# percentiles leave out what few images show. A margin leaves room for the noise that the medians lack.
PERCENTILES, MARGIN = (0.1, 99.9), 0.1


@dataclass
class ValueSample:
    """Values of sampled images, channel by channel.

    Attributes:
        kinds: images by the name of their values' type; 8-bit images that were not sampled count as uint8.
        medians: for each channel, the local medians of each image.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    medians: list[list[np.ndarray]] = field(default_factory=list)

    @property
    def num_deep(self) -> int:
        """Images with more than 8 bits."""
        return sum(count for name, count in self.kinds.items() if name not in ("uint8", "bool"))

    @property
    def num_images(self) -> int:
        """All images."""
        return self.kinds.total()

    def add(self, stored: StoredValues) -> None:
        """Add an image."""
        self.kinds[stored.values.dtype.name] += 1
        while len(self.medians) < len(stored.values):
            self.medians.append([])
        for medians, plane in zip(self.medians, stored.values):
            medians.append(local_medians(plane, stored.nodata))

    def ranges(self, channels: int) -> Ranges:
        """The range of each of `channels`; gray and color stand in for one another."""
        found = [self.range_of(medians) for medians in self.medians]
        if len(found) == channels:
            return tuple(found)
        together = min(low for low, _ in found), max(high for _, high in found)
        return (together,) * channels

    def widest_type(self) -> tuple[float, float]:
        """The range that holds those of all types."""
        ends = [type_range(np.dtype(name)) for name in self.kinds]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def range_of(self, medians: Sequence[np.ndarray]) -> tuple[float, float]:
        """(low, high) of one channel; of width 1 where it is constant, 0 and 1 where there is no data."""
        values = np.concatenate(medians)
        if not len(values):
            return 0.0, 1.0
        low, high = np.percentile(values, PERCENTILES)
        if low == high:
            low, high = values.min(), values.max()
        margin = MARGIN * (high - low)
        limits = [type_range(np.dtype(name)) for name in self.kinds if np.dtype(name).kind != "f"]
        if limits and len(limits) == len(self.kinds):
            low, high = max(low - margin, min(limits)[0]), min(high + margin, max(end for _, end in limits))
        else:
            low, high = low - margin, high + margin
        low, high = rounded(low), rounded(high)
        return (low, high) if low < high else (low, low + 1.0)


def rounded(value: float) -> float:
    """To six significant digits, which a person can read."""
    return float(f"{value:.6g}")


def local_medians(plane: np.ndarray, nodata: float | None) -> np.ndarray:
    """The median of 3 × 3 pixels at positions that are evenly spread over a plane, float64, without those that lack data."""
    rows, columns = (np.unique(np.linspace(0, side - 1, min(side, SAMPLED_PX)).round().astype(int)) for side in plane.shape)
    around = []
    for down in (-1, 0, 1):
        band = plane[(rows + down).clip(0, plane.shape[0] - 1)]
        around += [band[:, (columns + across).clip(0, plane.shape[1] - 1)] for across in (-1, 0, 1)]
    stacked = np.stack(around).astype(np.float64)
    stacked[~np.isfinite(stacked)] = np.nan
    if nodata is not None:
        stacked[stacked == nodata] = np.nan
    if np.isnan(stacked).any():
        stacked = stacked[:, ~np.isnan(stacked).any(axis=0)]
    return np.median(stacked, axis=0).ravel()


def settle_reading(
    reading: Reading, records: Mapping[int, Record], channels: int | None, max_pixels: int = MAX_PIXELS
) -> Reading:
    """A reading whose range is settled: auto becomes image where most images have 8 bits, which are not changed by it, else
    one range a channel.

    Args:
        records: a sample of the images, by row.
        channels: in which all images are read; None takes the files'.

    Raises:
        ValueError: when deep images differ in channels other than as gray and color do.
    """
    reading = name_channels(reading, records, max_pixels)
    if reading.range not in ("auto", "type"):
        return reading
    sample, paths = sample_values(records, reading, max_pixels, levels=reading.transform != "none")
    deep, total = sample.num_deep, sample.num_images
    if not total:  # no image can be read, which is said where pictures are opened
        return replace(reading, range="image")
    if 2 * deep <= total and reading.transform == "none":
        if deep and reading.range == "auto":
            notify(
                f"{deep:,} of {counted(total, 'image')} looked at {'is' if deep == 1 else 'are'} deeper than 8 bits: such "
                "images are stretched to 8 bits, each by its own values; give data.range for one scale"
            )
        return reading if reading.range == "type" else replace(reading, range="image")
    if len(sample.kinds) > 1:
        sample, paths = sample_values(records, reading, max_pixels, levels=True)
        kinds = ", ".join(f"{counted(count, 'image')} of {name}" for name, count in sample.kinds.most_common())
        notify(f"images differ in the type of their values ({kinds}): one scale holds for all, unless data.range is image")
    found = channels or common_channels(paths)
    return replace(reading, range=sample.ranges(found) if reading.range == "auto" else (sample.widest_type(),) * found)


def name_channels(reading: Reading, records: Mapping[int, Record], max_pixels: int) -> Reading:
    """A reading whose channels are numbers, with the names that the first image that can be read has for them.

    Raises:
        ValueError: for a channel that this image lacks, and names that are not as many as the channels.
    """
    asked = reading.channels_used is not None or bool(reading.channel_names)
    if reading.pages == "first" and not asked and not reading.channel_files:
        return reading
    whole = replace(reading, channels_used=None, channel_names=())
    for record in records.values():
        if not asked and not may_name_channels(record):
            continue
        try:
            stored = open_stored(record, max_pixels, levels=True, reading=whole)
        except UNREADABLE:
            continue
        assert stored is not None, "levels are asked for"
        chosen = stored.select(reading)
        if reading.channel_names and len(reading.channel_names) != len(chosen.values):
            raise ValueError(
                f"data.channel_names has {counted(len(reading.channel_names), 'name')} and there are "
                f"{counted(len(chosen.values), 'channel')}: give one for each"
            )
        used = reading.channels_used
        numbers = None if used is None else tuple(map(stored.number_of, used))
        return replace(reading, channels_used=numbers, channel_names=reading.channel_names or chosen.names)
    return reading


def may_name_channels(record: Record) -> bool:
    """Whether a file may tell the names of its channels."""
    files = parse_address(record["path"] or "").files
    return len(files) > 1 or files[0].lower().endswith(TIFF_ENDINGS) or is_zarr(files[0])


def sample_values(
    records: Mapping[int, Record], reading: Reading, max_pixels: int, levels: bool
) -> tuple[ValueSample, dict[int, list[str]]]:
    """Values of those images that can be read, and by number of channels the files that have it.

    Args:
        levels: take the values of 8-bit images too, which else are counted alone.
    """
    sample, paths = ValueSample(), {}  # type: tuple[ValueSample, dict[int, list[str]]]
    for row, record in records.items():
        try:
            stored = open_stored(record, max_pixels, levels, reading)
        except UNREADABLE:
            continue
        if stored is None:
            sample.kinds["uint8"] += 1
        else:
            sample.add(stored)
            paths.setdefault(len(stored.values), []).append(record_name(record, row))
    return sample, paths


def common_channels(paths: Mapping[int, Sequence[str]]) -> int:
    """The number of channels in which all images can be read.

    Args:
        paths: by number of channels, the files that have it.

    Raises:
        ValueError: if files differ other than as gray and color do, with the count of each.
    """
    if paths.keys() - {1, 3} and len(paths) > 1:
        named = [f"{files[0]} has {number} ({counted(len(files), 'image')})" for number, files in sorted(paths.items())]
        raise ValueError(f"images differ in channels: {', '.join(named)}; give the images of each kind by themselves")
    return max(paths)
