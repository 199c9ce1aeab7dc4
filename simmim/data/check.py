"""Every image of a source read before hours of training are spent on it: `simmim check-data`.

One pass reads all images in several processes, a second one compares those of equal byte size. The results are added up as
they come: besides the unreadable images' names, some tens of bytes per image are held in memory.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from simmim.data.channel_hints import ChannelHint, hint_of
from simmim.data.decode import MAX_PIXELS, open_picture
from simmim.data.duplicates import find_duplicates, list_groups
from simmim.data.image_statistics import ImageStatistics, measure_images
from simmim.data.inspection import RowTallies, Tally, process_rows, whole_image
from simmim.data.kept_pictures import KeptEstimate, is_worth_keeping, way_to_keep
from simmim.data.loading import available_cores
from simmim.data.pictures import Picture
from simmim.data.records import Record
from simmim.data.tiles import TilePlan, measure_tiles, plan_tiles
from simmim.data.views import RandomView
from simmim.defaults import Scale, default_scales
from simmim.messages import without_notices
from simmim.reading import AUTO, Reading, TileSettings

if TYPE_CHECKING:
    import datasets

SHORT_SIDES_PX = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
MAX_DUPLICATES_LISTED = 100_000  # files; all are counted
MEASURED_IMAGES, MEASURED_S = 256, 3.0
RATES = (100.0, 500.0, 2000.0)  # images/s of a model


@dataclass(frozen=True)
class Suggestion:
    """Settings of `simmim pretrain` that follow from these images. Its own defaults follow from a sample of them.

    Attributes:
        scales: encoders and image sizes to choose from, the largest first (`simmim.defaults.default_scales`).
        turns: whether most images have no up, as their files' metadata tell.
    """

    scales: tuple[Scale, ...]
    turns: bool = False

    @property
    def image_size_px(self) -> int:
        """Side of the largest images to choose."""
        return self.scales[0].side_px


@dataclass(frozen=True)
class CheckReport:
    """What a source holds.

    Attributes:
        path: as the user gave it.
        images: number of images.
        mib: size of the images' files.
        formats, modes: images by file format and by Pillow mode, or type and channels of values deeper than 8 bits, frequent
            ones first; these and all that follows count
            readable images only.
        channels: of a model of these images by default; None if a problem leaves that open.
        channel_names: of the channels, where they are named.
        flags: settings of pre-training by which the images were read, as words of its command.
        ranges: (low, high) of each channel of images deeper than 8 bits, as pre-training would take them; empty for others.
        histograms, missing: as of `ImageStatistics`.
        short_sides_px: images by the length of their shorter side; the keys are the buckets' smallest lengths.
        short_side_px: the median; 0 if nothing is readable.
        oriented: images that carry an EXIF orientation other than upright.
        without_up: images by the kind that has no up, as slides and maps, told by their files' metadata.
        unreadable: (path, reason) of every image that training would replace.
        problem: what is wrong with the source as a whole, if anything.
        duplicate_groups: groups of byte-identical images.
        duplicates_removable: images that could be removed with one of each group kept.
        duplicates: the groups' paths, of the first 100,000 files.
        images_per_second: loaded by one process at the suggested view; None if nothing is readable.
        workers_needed: loading processes by the images/s that they keep up with.
        cores: processor cores of this machine.
        suggestion: None if nothing is readable.
        tiles: that make an epoch, where images are read by tiles; then one tile of each image is read, and shorter sides
            are those of tiles.
        empty_share: of the tiles drawn from all images, which are background.
        transform: of the values, in which histograms are.
        kept: what pre-training keeps of the images on disk, by itself; None where that does not pay.
        channel_hint: the pattern by which gray files look like channels of images; None where their names tell nothing.
    """

    path: str
    images: int
    mib: float
    formats: dict[str, int]
    modes: dict[str, int]
    channels: int | None
    channel_names: tuple[str, ...]
    flags: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    histograms: tuple[tuple[float, ...], ...]
    missing: tuple[float, ...]
    short_sides_px: dict[int, int]
    short_side_px: int
    oriented: int
    without_up: dict[str, int]
    unreadable: tuple[tuple[str, str], ...]
    problem: str | None
    duplicate_groups: int
    duplicates_removable: int
    duplicates: tuple[tuple[str, ...], ...]
    images_per_second: float | None
    workers_needed: dict[float, int]
    cores: int
    suggestion: Suggestion | None
    tiles: int | None = None
    empty_share: float | None = None
    transform: str = "none"
    kept: KeptEstimate | None = None
    channel_hint: ChannelHint | None = None

    @property
    def sound(self) -> bool:
        """Whether training would read every image without complaint."""
        return not self.unreadable and self.problem is None


def check_images(
    source: datasets.Dataset,
    workers: int,
    path: str = "PATH",
    device: str = "cpu",
    images_per_second: float | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
    reading: Reading = AUTO,
    tiles: TileSettings | None = None,
    in_memory_mib: float = 0.0,
) -> CheckReport:
    """Read every image of `source`.

    Args:
        source: with a column `image`, undecoded.
        workers: reading processes; 0 reads in this one. The report does not depend on it.
        path: that the source was opened by, for the report.
        device: cuda, mps or cpu; the suggested preset depends on it.
        images_per_second: throughput of the model; None reports the workers for `RATES`.
        max_pixels: larger images count as unreadable, as in training.
        progress: show progress bars on standard error if that is a terminal.
        reading, tiles: how values become pictures, and which part of an image is one where not all is.
        in_memory_mib: images that decode to less stay in a run's memory, and nothing of them on disk.

    Raises:
        ValueError: for a number of workers or a rate out of range, for a source without rows, and as `plan_tiles`.
    """
    check_options(workers, images_per_second)
    if not len(source):
        raise ValueError(f"{path!r} holds no images")
    plan, tile_of = find_tiles(source, tiles, reading, max_pixels)
    measured, problem, empty_share = measure_source(source, max_pixels, reading, plan)
    how = how_to_open(measured, max_pixels, reading)
    tally, sizes = tally_images(RowTallies(source, *how, tile_of), workers, progress)
    readable = np.ones(len(source), dtype=bool)
    readable[tally.unreadable_rows] = False
    groups = find_duplicates(source, np.where(readable, sizes, 0), workers, progress)
    suggestion = suggest(tally, device)
    view = RandomView((suggestion.image_size_px,) * 2) if suggestion else None
    rate = measure_loading_rate(source, np.flatnonzero(readable), view, how, tile_of) if view else None
    return CheckReport(
        path=path,
        images=len(source),
        mib=round(float(sizes.sum()) / 2**20, 3),
        **tally_fields(tally),
        **channel_fields(measured, source, reading),
        flags=(*reading_flags(reading), *tile_flags(tiles)),
        problem=problem,
        duplicate_groups=len(groups),
        duplicates_removable=sum(len(group) - 1 for group in groups),
        duplicates=list_groups(source, groups, MAX_DUPLICATES_LISTED),
        images_per_second=rate,
        workers_needed=count_workers(rate, images_per_second),
        cores=available_cores(),
        suggestion=suggestion,
        tiles=None if plan is None else len(plan),
        empty_share=empty_share,
        kept=None if plan is not None else kept_by_runs(source, measured, view, in_memory_mib),
    )


def suggest(tally: Tally, device: str) -> Suggestion | None:
    """Settings for images as they were counted; None where none is readable.

    Args:
        device: cuda, mps or cpu.
    """
    num_readable = tally.short_sides.total()
    if not num_readable:
        return None
    scales = default_scales(median_of(tally.short_sides), device)
    return Suggestion(tuple(scales), turns=2 * tally.without_up.total() > num_readable)


def kept_by_runs(
    source: datasets.Dataset, measured: ImageStatistics | None, view: RandomView | None, in_memory_mib: float
) -> KeptEstimate | None:
    """What a run keeps of whole images on disk; None where that does not pay.

    Args:
        in_memory_mib: as of `check_images`.
    """
    if measured is None or view is None or measured.decoded_mib <= in_memory_mib:
        return None
    way = way_to_keep([view], source, len(source), measured)
    return way if is_worth_keeping(way) else None


def find_tiles(
    source: datasets.Dataset, tiles: TileSettings | None, reading: Reading, max_pixels: int
) -> tuple[TilePlan | None, Callable[[int, Record], Record]]:
    """The tiles of a source that is read by tiles, and what is read of a row's image."""
    if tiles is None:
        return None, whole_image
    with without_notices():  # unreadable images are listed
        plan = plan_tiles(source, tiles, reading, max_pixels)
    return plan, plan.tile_of


def how_to_open(measured: ImageStatistics | None, max_pixels: int, reading: Reading) -> tuple[int | None, int, Reading]:
    """`open_picture`'s arguments but for the record; where images do not go together, each is read by its own values."""
    if measured is None:
        return None, max_pixels, replace(reading, range="image", transform="none")
    return measured.channels, max_pixels, measured.reading


def tally_fields(tally: Tally) -> dict[str, Any]:
    """What a report says of the images' files."""
    return {
        "formats": frequent_first(tally.formats),
        "modes": frequent_first(tally.modes),
        "short_sides_px": histogram(tally.short_sides),
        "short_side_px": median_of(tally.short_sides),
        "oriented": tally.oriented,
        "without_up": frequent_first(tally.without_up),
        "unreadable": tuple(tally.unreadable),
    }


def channel_fields(measured: ImageStatistics | None, source: datasets.Dataset, reading: Reading) -> dict[str, Any]:
    """What a report says of the channels and their values."""
    if measured is None:
        return {"channels": None, "channel_names": (), "ranges": (), "histograms": (), "missing": (), "transform": "none"}
    ranges = measured.reading.range if measured.reading.is_deep else ()
    return {
        "channels": measured.channels,
        "channel_names": measured.reading.channel_names,
        "ranges": ranges,
        "histograms": measured.histograms,
        "missing": measured.missing,
        "transform": measured.reading.transform,
        "channel_hint": hint_of(source) if measured.channels == 1 and not reading.channel_files else None,
    }


def reading_flags(reading: Reading) -> tuple[str, ...]:
    """The words of `simmim pretrain` that read files so."""
    flags: list[str] = []
    for name, value in vars(reading).items():
        if value != getattr(AUTO, name):
            flags += [f"--data.{name}", value if isinstance(value, str) else json.dumps(value)]
    return tuple(flags)


def tile_flags(tiles: TileSettings | None) -> tuple[str, ...]:
    """The words of `simmim pretrain` that read images by such tiles."""
    if tiles is None:
        return ()
    flags = ["--data.tile", str(tiles.size_px)]
    for name, value in (("tile_level", tiles.level), ("pixel_size", tiles.pixel_size)):
        flags += [] if value is None else [f"--data.{name}", str(value)]
    default = TileSettings(tiles.size_px).max_background
    return (*flags, *([] if tiles.max_background == default else ["--data.max_background", str(tiles.max_background)]))


def check_options(workers: int, images_per_second: float | None) -> None:
    """Refuse a number of workers or a rate out of range.

    Raises:
        ValueError: naming it.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}: give 0 to read in the main process, or more")
    if images_per_second is not None and not 0 < images_per_second < math.inf:
        raise ValueError(f"images per second is {images_per_second}: give a positive number")


def measure_source(
    source: datasets.Dataset, max_pixels: int, reading: Reading, plan: TilePlan | None
) -> tuple[ImageStatistics | None, str | None, float | None]:
    """Statistics from which a model's defaults follow, or, if the images do not go together, the problem; and the share of
    empty tiles. With a problem each image is read in its own channels."""
    try:
        with without_notices():  # all images are about to be read
            if plan is None:
                return measure_images(source, max_pixels=max_pixels, reading=reading), None, None
            _, statistics, share = measure_tiles(source, plan, 0, reading, max_pixels=max_pixels)
            return statistics, None, share
    except ValueError as error:
        return None, str(error), None


def tally_images(task: RowTallies, workers: int, progress: bool) -> tuple[Tally, np.ndarray]:
    """The tally of all images, and the bytes of each image's file, (rows,) int64."""
    tally, sizes = Tally(), np.zeros(len(task.source), dtype=np.int64)
    title = "reading images" if progress else None
    for rows, part in process_rows(task, range(len(task.source)), workers, title):
        tally.add(part)
        sizes[rows.start : rows.stop] = part.sizes
    return tally, sizes


def measure_loading_rate(
    source: datasets.Dataset,
    rows: np.ndarray,
    view: Callable[[Picture, random.Random], Tensor],
    how: tuple[int | None, int, Reading],
    tile_of: Callable[[int, Record], Record] = whole_image,
) -> float:
    """Images per second that one process opens and crops, measured on up to 256 of `rows` and for a few seconds at most.

    They have just been read: a disk slower than the decoding shows only if the images exceed the memory.

    Args:
        how: `open_picture`'s arguments but for the record.
        tile_of: as of `RowTallies`.
    """
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, MEASURED_IMAGES).round().astype(int))]
    generator = random.Random(0)
    generator.shuffle(order := chosen.tolist())
    view(open_picture(tile_of(order[0], source[order[0]]["image"]), *how), generator)  # loads Pillow's plugins, untimed
    num_loaded, started = 0, time.perf_counter()
    for row in order:
        view(open_picture(tile_of(row, source[row]["image"]), *how), generator)
        num_loaded += 1
        if time.perf_counter() - started > MEASURED_S:
            break
    return round(num_loaded / (time.perf_counter() - started), 2)


def count_workers(rate: float | None, images_per_second: float | None) -> dict[float, int]:
    """Loading processes by the images/s that they keep up with, of `RATES` or a given one; none where nothing is loaded."""
    rates = RATES if images_per_second is None else (float(images_per_second),)
    return {needed: math.ceil(needed / rate) for needed in rates if rate}


def median_of(counts: Counter[int]) -> int:
    """The lower median of counted numbers; 0 if there are none."""
    half, cumulative = sum(counts.values()) / 2, 0
    for value in sorted(counts):
        cumulative += counts[value]
        if cumulative >= half:
            return value
    return 0


def histogram(counts: Counter[int]) -> dict[int, int]:
    """Counted lengths in buckets, from the first that is not empty to the last; the keys are the buckets' lower ends."""
    buckets = dict.fromkeys(SHORT_SIDES_PX, 0)
    for length, count in counts.items():
        buckets[max(start for start in SHORT_SIDES_PX if start <= length)] += count
    filled = [start for start, count in buckets.items() if count]
    return {start: count for start, count in buckets.items() if filled and filled[0] <= start <= filled[-1]}


def frequent_first(counts: Counter[str]) -> dict[str, int]:
    """Counts by falling frequency, equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
