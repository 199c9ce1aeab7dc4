"""A look at every image of a source before hours are spent on it: `simmim check-data`.

One pass reads all images in several processes, a second compares those of equal byte size. What is found is added up as
it comes: besides the unreadable images' names, some tens of bytes an image are held.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmim.data.decode import MAX_PIXELS, Picture, decoding, open_picture, read_orientation
from simmim.data.image_statistics import measure_images
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.data.samples import available_cores
from simmim.data.views import RandomView
from simmim.defaults import default_image_size, default_mask_unit, default_preset

if TYPE_CHECKING:
    import datasets

SHORT_SIDES_PX = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
PATCH_PX = 4  # of every preset
# As large as the default view at most, so that Pillow may skip what training would skip as well.
LOOK_PX = 192
ROWS_AT_ONCE = 16
SHOWN = 20
DUPLICATES_LISTED = 100_000  # files; the counts go on
MEASURED_IMAGES, MEASURED_S = 256, 3.0
RATES = (100.0, 500.0, 2000.0)
BAR_WIDTH = 40


@dataclass(frozen=True)
class Suggestion:
    """Settings of `simmim pretrain` for these images, and the command with them. The encoder's own settings, such as its
    window, follow from the image size."""

    image_size_px: int
    mask_unit_px: int
    preset: str
    command: str


@dataclass(frozen=True)
class Report:
    """What was found in a source.

    Attributes:
        path: as the user gave it.
        mib: size of the images' files.
        formats, modes: images by file format and by Pillow mode, the frequent ones first; readable images only, as all
            that follows.
        channels: that a model of these images would take by default; None where a problem leaves that open.
        short_sides_px: images by the length of their shorter side; the keys are a bucket's smallest length.
        short_side_px: the median; 0 where nothing is readable.
        oriented: images that carry an EXIF orientation other than upright.
        unreadable: (path, reason) of every image that training would replace.
        problem: what is wrong with the set as a whole, if anything.
        duplicate_groups: sets of byte-identical images.
        duplicates_removable: images that could go with one of each group kept.
        duplicates: the groups' paths, of the first 100,000 files.
        images_per_second: loaded by one process at the suggested view; None where nothing is readable.
        workers_needed: processes that keep up with so many images a second.
        cores: processor cores at hand.
        suggestion: None where nothing is readable.
    """

    path: str
    images: int
    mib: float
    formats: dict[str, int]
    modes: dict[str, int]
    channels: int | None
    short_sides_px: dict[int, int]
    short_side_px: int
    oriented: int
    unreadable: tuple[tuple[str, str], ...]
    problem: str | None
    duplicate_groups: int
    duplicates_removable: int
    duplicates: tuple[tuple[str, ...], ...]
    images_per_second: float | None
    workers_needed: dict[float, int]
    cores: int
    suggestion: Suggestion | None

    @property
    def sound(self) -> bool:
        """Whether training would meet every image without complaint."""
        return not self.unreadable and self.problem is None


def check(
    source: datasets.Dataset,
    workers: int,
    path: str = "PATH",
    device: str = "cpu",
    images_per_second: float | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> Report:
    """Look at every image of `source`.

    Args:
        source: with a column `image`, undecoded.
        workers: reading processes; 0 reads in this one. The report does not depend on it.
        path: what the source was opened by, for the line to type.
        device: cuda, mps or cpu; the suggested preset depends on it.
        images_per_second: what the model takes; None reports the workers for `RATES`.
        max_pixels: larger images count as unreadable, as in training.
        progress: show bars on standard error where that is a terminal.

    Raises:
        ValueError: for a number of workers or a rate out of range, and for a source without rows.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}: give 0 to read in the main process, or more")
    if images_per_second is not None and not 0 < images_per_second < math.inf:
        raise ValueError(f"images per second is {images_per_second}: give a positive number")
    if not len(source):
        raise ValueError(f"{path!r} holds no images")
    problem, channels = None, None  # where there is a problem, each image is seen in the channels that it has
    try:
        channels = measure_images(source).channels
    except ValueError as error:
        problem = str(error)

    tally, sizes = Tally(), np.zeros(len(source), dtype=np.int64)
    title = "reading images" if progress else None
    for rows, seen in counted(Inspected(source, channels, max_pixels), range(len(source)), workers, title):
        tally.add(seen)
        sizes[rows.start : rows.stop] = seen.sizes

    readable = np.ones(len(source), dtype=bool)
    readable[tally.unreadable_rows] = False
    groups = duplicate_groups(source, np.where(readable, sizes, 0), workers, progress)
    median = median_of(tally.short_sides)
    suggestion, rate = None, None
    if readable.any():
        suggestion = suggest(path, median, device)
        view = RandomView((suggestion.image_size_px,) * 2)
        rate = loading_rate(source, np.flatnonzero(readable), view, channels, max_pixels)
    rates = RATES if images_per_second is None else (float(images_per_second),)
    return Report(
        path=path,
        images=len(source),
        mib=round(float(sizes.sum()) / 2**20, 3),
        formats=frequent_first(tally.formats),
        modes=frequent_first(tally.modes),
        channels=channels,
        short_sides_px=histogram(tally.short_sides),
        short_side_px=median,
        oriented=tally.oriented,
        unreadable=tuple(tally.unreadable),
        problem=problem,
        duplicate_groups=len(groups),
        duplicates_removable=sum(len(group) - 1 for group in groups),
        duplicates=listed(source, groups),
        images_per_second=rate,
        workers_needed={needed: math.ceil(needed / rate) for needed in rates if rate},
        cores=available_cores(),
        suggestion=suggestion,
    )


# --- One image --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over images; those of a few are added to those of all.

    Attributes:
        sizes: bytes of each image's file, of the rows just seen; not summed up by `add`.
    """

    formats: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    short_sides: Counter = field(default_factory=Counter)
    oriented: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unreadable_rows: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take another's counts in, its sizes excepted."""
        for name in ("formats", "modes", "short_sides"):
            getattr(self, name).update(getattr(other, name))
        self.oriented += other.oriented
        self.unreadable += other.unreadable
        self.unreadable_rows += other.unreadable_rows


class Inspected(Dataset):
    """By a range of rows the tally of their images, each read as training reads it."""

    def __init__(self, source: datasets.Dataset, channels: int | None, max_pixels: int) -> None:
        self.source, self.channels, self.max_pixels = source, channels, max_pixels

    def __getitem__(self, rows: range) -> Tally:
        tally = Tally()
        for row in rows:
            self.inspect(row, tally)
        return tally

    def inspect(self, row: int, tally: Tally) -> None:
        """Add one image to `tally`."""
        record = self.source[row]["image"]
        tally.sizes.append(byte_size(record))
        try:
            picture = open_picture(record, self.channels, self.max_pixels)
            height, width = picture.size
            picture.crop((0, 0, width, height), (min(height, LOOK_PX), min(width, LOOK_PX)))
        except Exception as error:  # of whatever kind: this command is the place to learn of it
            why = describe_error(error) if isinstance(error, UNREADABLE) else f"{type(error).__name__}: {error}"
            tally.unreadable.append((name_of(record, row), why))
            tally.unreadable_rows.append(row)
            return
        kind, mode, oriented = header(record)
        tally.formats[kind] += 1
        tally.modes[mode if picture.channels in (1, 3) else f"{picture.channels} channels"] += 1
        tally.short_sides[min(width, height)] += 1
        tally.oriented += oriented


def header(record: dict) -> tuple[str, str, bool]:
    """Format, Pillow mode, and whether there is an EXIF orientation to undo; of what Pillow does not open, arrays for
    instance, the file's extension and "array"."""
    try:
        stored = record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])
        with decoding(), Image.open(stored) as image:
            return image.format or "?", image.mode, read_orientation(image) != 1
    except UNREADABLE:
        return os.path.splitext(record["path"] or "")[1][1:].upper() or "?", "array", False


def byte_size(record: dict) -> int:
    """Bytes of an image's file; 0 where it is gone."""
    if record["bytes"] is not None:
        return len(record["bytes"])
    try:
        return os.path.getsize(record["path"])
    except OSError:
        return 0


def name_of(record: dict, row: int) -> str:
    """An image's path, or its row where it has none."""
    return record["path"] or f"row {row}"


# --- All images -------------------------------------------------------------------------------------------------------


def counted(
    task: Dataset, rows: Sequence[int] | np.ndarray, workers: int, title: str | None
) -> Iterator[tuple[Sequence[int] | np.ndarray, Any]]:
    """(piece, `task[piece]`) for pieces of `rows` in order, computed in `workers` processes; a title shows a bar."""
    from tqdm import tqdm

    pieces = [rows[first : first + ROWS_AT_ONCE] for first in range(0, len(rows), ROWS_AT_ONCE)]
    loader = DataLoader(task, batch_size=None, sampler=pieces, num_workers=workers, collate_fn=as_it_is)
    # disable=None: on a terminal only.
    with tqdm(total=len(rows), desc=title, unit=" images", disable=None if title else True) as bar:
        for piece, result in zip(pieces, loader):
            yield piece, result
            bar.update(len(piece))


def as_it_is(result):
    """For a loader that does not batch: nothing becomes a tensor."""
    return result


class Digests(Dataset):
    """By an array of rows their files' hashes, (rows, 2) uint64; zeros for a file that is gone."""

    def __init__(self, source: datasets.Dataset) -> None:
        self.source = source

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.frombuffer(b"".join(self.digest(int(row)) for row in rows), dtype=np.uint64).reshape(-1, 2)

    def digest(self, row: int) -> bytes:
        """16 bytes; that two different files of a collection share them does not happen."""
        record = self.source[row]["image"]
        if record["bytes"] is not None:
            return hashlib.blake2b(record["bytes"], digest_size=16).digest()
        hasher = hashlib.blake2b(digest_size=16)
        try:
            with open(record["path"], "rb") as file:
                while part := file.read(2**20):
                    hasher.update(part)
        except OSError:
            return bytes(16)
        return hasher.digest()


def duplicate_groups(source: datasets.Dataset, sizes: np.ndarray, workers: int, progress: bool = False) -> list[np.ndarray]:
    """Rows of byte-identical images, a group each, in the order of the groups' first rows.

    Args:
        sizes: bytes of each row's file; rows of 0 bytes are left out.
    """
    of_size = np.unique(sizes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero((of_size[2][of_size[1]] > 1) & (sizes > 0))
    if not len(candidates):
        return []
    title = "comparing files of equal size" if progress else None
    parts = [digests for _, digests in counted(Digests(source), candidates, workers, title)]
    digests = np.concatenate(parts)
    digests[~digests.any(axis=1), 0] = np.flatnonzero(~digests.any(axis=1))  # files that are gone equal none
    order = np.lexsort((candidates, digests[:, 1], digests[:, 0]))
    as_before = np.append(False, (digests[order][1:] == digests[order][:-1]).all(axis=1))
    doubled = as_before | np.append(as_before[1:], False)
    # Split what is double alone: a million different files would make a million arrays.
    groups = np.split(candidates[order[doubled]], np.flatnonzero(~as_before[doubled])[1:]) if doubled.any() else []
    return sorted(groups, key=lambda group: group[0])


def listed(source: datasets.Dataset, groups: Iterable[np.ndarray]) -> tuple[tuple[str, ...], ...]:
    """The names in `groups`, up to `DUPLICATES_LISTED` in all."""
    names, left = [], DUPLICATES_LISTED
    for group in groups:
        if left < 2:
            break
        names.append(tuple(name_of(source[int(row)]["image"], int(row)) for row in group[:left]))
        left -= len(names[-1])
    return tuple(names)


def loading_rate(
    source: datasets.Dataset,
    rows: np.ndarray,
    view: Callable[[Picture, random.Random], Tensor],
    channels: int | None,
    max_pixels: int,
) -> float:
    """Images a second that one process opens and crops, measured on up to 256 of `rows` and for some seconds at most.

    They have just been read: a disk slower than the decoding shows only where the images exceed the memory.
    """
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, MEASURED_IMAGES).round().astype(int))]
    generator = random.Random(0)
    generator.shuffle(order := chosen.tolist())
    view(open_picture(source[order[0]]["image"], channels, max_pixels), generator)  # loads Pillow's plugins, untimed
    loaded, started = 0, time.perf_counter()
    for row in order:
        view(open_picture(source[row]["image"], channels, max_pixels), generator)
        loaded += 1
        if time.perf_counter() - started > MEASURED_S:
            break
    return round(loaded / (time.perf_counter() - started), 2)


def suggest(path: str, short_side_px: int, device: str) -> Suggestion:
    """The defaults of `simmim pretrain` for such images, spelled out: it samples, here every image was seen."""
    side = default_image_size(short_side_px)
    preset = default_preset(side, device)
    mask_unit = default_mask_unit((side, side), PATCH_PX)
    command = (
        f"simmim pretrain --data {shlex.quote(path)} --out runs/first --preset {preset} --image-size {side} "
        f"--model.mask_unit {mask_unit}"
    )
    return Suggestion(side, mask_unit, preset, command)


def median_of(counts: Counter[int]) -> int:
    """The lower median of counted numbers; 0 where there are none."""
    middle, seen = sum(counts.values()) / 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= middle:
            return value
    return 0


def histogram(counts: Counter[int]) -> dict[int, int]:
    """Counted lengths in buckets from the first that is not empty to the last; the keys are the buckets' lower ends."""
    buckets = dict.fromkeys(SHORT_SIDES_PX, 0)
    for length, count in counts.items():
        buckets[max(start for start in SHORT_SIDES_PX if start <= length)] += count
    filled = [start for start, count in buckets.items() if count]
    return {start: count for start, count in buckets.items() if filled and filled[0] <= start <= filled[-1]}


def frequent_first(counts: Counter[str]) -> dict[str, int]:
    """Counts by falling frequency, equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- What the user reads ----------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report for a terminal."""
    broken = len(report.unreadable)
    lines = [
        f"{report.path}: {plural(report.images, 'image')}, {size_text(report.mib)}, "
        f"{f'{broken:,} unreadable' if broken else 'all readable'}"
    ]
    if report.problem:
        lines += ["", f"problem      {report.problem}"]
    if broken:
        lines += ["", f"unreadable   {share(broken, report.images)}; training replaces them by other images"]
        lines += [f"  {printable(path)}: {printable(why)}" for path, why in report.unreadable[:SHOWN]]
        if broken > SHOWN:
            lines.append(f"  … and {broken - SHOWN:,} more: --json lists all")
    if report.suggestion is None:
        return "\n".join(lines)
    turned = f"{report.oriented:,} tagged by EXIF, turned upright" if report.oriented else "no tags"
    lines += [
        "",
        f"formats      {counts_text(report.formats)}",
        f"modes        {counts_text(report.modes)}"
        + (f"; a model sees {plural(report.channels, 'channel')}" if report.channels else ""),
        f"orientation  {turned}",
        "",
        f"shorter side, median {report.short_side_px:,} px",
        *bars(report.short_sides_px),
        "",
        *duplicates_text(report),
        "",
        *loading_text(report),
        "",
        f"suggested    image size {report.suggestion.image_size_px} px, mask unit {report.suggestion.mask_unit_px} px, "
        f"preset {report.suggestion.preset}",
        f"  {printable(report.suggestion.command)}",
    ]
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """The report for machines: the fields of `Report`, paths in full. Plain ASCII, for names of any encoding."""
    values = asdict(report) | {
        "unreadable": [{"path": path, "reason": why} for path, why in report.unreadable],
        "workers_needed": {f"{rate:g}": workers for rate, workers in report.workers_needed.items()},
    }
    return json.dumps(values, indent=2)


def bars(buckets: dict[int, int]) -> list[str]:
    """A line a bucket: its range in pixels, a bar as long as its share of the fullest, its count."""
    ends = {start: end - 1 for start, end in pairwise(SHORT_SIDES_PX)}
    labels = [f"{start}–{ends[start]}" if start in ends else f"{start}–" for start in buckets]
    width, most = max(map(len, labels)), max(buckets.values())
    return [
        f"  {label:>{width}} px  {'█' * math.ceil(BAR_WIDTH * count / most)}{' ' * bool(count)}{count:,}"
        for label, count in zip(labels, buckets.values())
    ]


def duplicates_text(report: Report) -> list[str]:
    """Groups of identical files, the first of them by name."""
    if not report.duplicate_groups:
        return ["duplicates   none"]
    lines = [
        f"duplicates   {plural(report.duplicate_groups, 'group')} of identical files; "
        f"{plural(report.duplicates_removable, 'image')} could go ({share(report.duplicates_removable, report.images)})"
    ]
    for group in report.duplicates[:SHOWN]:
        more = f", … ({len(group):,} in all)" if len(group) > 3 else ""
        lines.append(f"  {', '.join(map(printable, group[:3]))}{more}")
    if report.duplicate_groups > SHOWN:
        lines.append(f"  … and {report.duplicate_groups - SHOWN:,} more groups: see --json")
    return lines


def loading_text(report: Report) -> list[str]:
    """How fast images come, and how many processes a model needs."""
    side = report.suggestion.image_size_px
    needs = ", ".join(f"{plural(workers, 'worker')} for {rate:,.6g}" for rate, workers in report.workers_needed.items())
    lines = [
        f"loading      {report.images_per_second:,.4g} images/s a worker at {side} px, files in the disk's cache",
        f"  a model's images/s need {needs}; this machine has {plural(report.cores, 'core')}",
    ]
    # With a single rate it is the model's, and can be judged.
    if len(report.workers_needed) == 1 and max(report.workers_needed.values()) > report.cores:
        lines.append("  the model would wait for images: store them smaller, or train where there are more cores")
    return lines


def plural(count: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def share(part: int, whole: int) -> str:
    """Of how many, in percent, never rounded to none or all."""
    percent = 100 * part / whole
    return f"{part:,} of {whole:,}, " + ("under 0.1 %" if percent < 0.1 else f"{percent:.1f} %")


def size_text(mib: float) -> str:
    """MiB, or GiB where there are many."""
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.1f} MiB"


def counts_text(counts: dict[str, int]) -> str:
    """JPEG 1,200, PNG 3."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def printable(text: str) -> str:
    """Text on one line that any terminal takes: file names may hold line breaks and bytes that are no text."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
