"""Reading every image of a source once, in several processes, and counting what it is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from simmim.data.decode import open_picture
from simmim.data.deep import DeepPicture
from simmim.data.known_formats import detect_format, detect_path
from simmim.data.orientation import read_orientation
from simmim.data.pillow_guard import UNREADABLE, decoding, describe_error
from simmim.data.records import Record, num_bytes, open_record, record_name
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

ROWS_AT_ONCE = 16
CROP_PX = 192  # at most the default view's size, so that decoding may be as coarse as in training


@dataclass
class Tally:
    """Counts over images.

    Attributes:
        formats, modes: images by file format and by Pillow mode.
        short_sides: images by the length of their shorter side in pixels.
        oriented: images that carry an EXIF orientation other than upright.
        without_up: images by the kind that has no up, as of `FileFormat.kind_without_up`.
        unreadable: (path, reason) of every image that cannot be read.
        unreadable_rows: their rows.
        sizes: bytes of each image's file, of the rows just read; not summed up by `add`.
    """

    formats: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    short_sides: Counter = field(default_factory=Counter)
    oriented: int = 0
    without_up: Counter = field(default_factory=Counter)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unreadable_rows: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another tally's counts, without its sizes."""
        for name in ("formats", "modes", "short_sides", "without_up"):
            getattr(self, name).update(getattr(other, name))
        self.oriented += other.oriented
        self.unreadable += other.unreadable
        self.unreadable_rows += other.unreadable_rows


def whole_image(row: int, record: Record) -> Record:
    """The record itself."""
    return record


class RowTallies(Dataset):
    """The tally of a range of rows, each image read as training reads it.

    Args:
        tile_of: of rows whose images are read by tiles, the record of one.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        channels: int | None,
        max_pixels: int,
        reading: Reading,
        tile_of: Callable[[int, Record], Record] = whole_image,
    ) -> None:
        self.source, self.channels, self.max_pixels, self.reading = source, channels, max_pixels, reading
        self.tile_of = tile_of

    def __getitem__(self, rows: range) -> Tally:
        tally = Tally()
        for row in rows:
            self.inspect(row, tally)
        return tally

    def inspect(self, row: int, tally: Tally) -> None:
        """Add one image to `tally`."""
        record = self.source[row]["image"]
        tally.sizes.append(num_bytes(record))
        try:
            picture = open_picture(self.tile_of(row, record), self.channels, self.max_pixels, self.reading)
            height, width = picture.size
            picture.crop((0, 0, width, height), (min(height, CROP_PX), min(width, CROP_PX)))
        except Exception as error:  # any exception: this command is the place to learn of it
            reason = describe_error(error) if isinstance(error, UNREADABLE) else f"{type(error).__name__}: {error}"
            tally.unreadable.append((record_name(record, row), reason))
            tally.unreadable_rows.append(row)
            return
        format, mode, oriented = read_header(record)
        tally.formats[format] += 1
        if isinstance(picture, DeepPicture) and picture.stored.is_deep:
            mode = f"{picture.stored.values.dtype} × {len(picture.stored.values)}"
        elif picture.channels not in (1, 3):
            mode = f"{picture.channels} channels"
        tally.modes[mode] += 1
        tally.short_sides[min(height, width)] += 1
        tally.oriented += oriented
        if kind := kind_without_up(record):
            tally.without_up[kind] += 1


def read_header(record: Record) -> tuple[str, str, bool]:
    """Format, Pillow mode, and whether there is an EXIF orientation to undo. For files that Pillow does not open, such as
    arrays, the file's extension and "array"."""
    if found := detect_path(record):
        return found[0].name, "array", False
    try:
        with decoding(), open_record(record) as stream, Image.open(stream) as image:
            return image.format or "?", image.mode, read_orientation(image) != 1
    except UNREADABLE:
        with contextlib.suppress(*UNREADABLE), open_record(record) as stream:
            if kind := detect_format(stream):
                return kind.name, "array", False
        return "?", "array", False


def kind_without_up(record: Record) -> str | None:
    """What a readable image is, where its file's metadata tell that it has no up; as of `FileFormat.kind_without_up`."""
    with contextlib.suppress(*UNREADABLE), decoding():
        if found := detect_path(record):
            return found[0].kind_without_up(found[1])
        with open_record(record) as stream:
            if kind := detect_format(stream):
                return kind.kind_without_up(stream)
    return None


def process_rows(
    task: Dataset, rows: Sequence[int] | np.ndarray, workers: int, title: str | None
) -> Iterator[tuple[Sequence[int] | np.ndarray, Any]]:
    """(piece, `task[piece]`) for pieces of `rows` in order, computed in `workers` processes.

    Args:
        title: of a progress bar on standard error, shown if that is a terminal; None shows none.
    """
    from tqdm import tqdm

    pieces = [rows[first : first + ROWS_AT_ONCE] for first in range(0, len(rows), ROWS_AT_ONCE)]
    loader = DataLoader(task, batch_size=None, sampler=pieces, num_workers=workers, collate_fn=_unchanged)
    # disable=None: shown on a terminal only.
    with tqdm(total=len(rows), desc=title, unit=" images", disable=None if title else True) as bar:
        for piece, result in zip(pieces, loader):
            yield piece, result
            bar.update(len(piece))


def _unchanged(result):
    """For a loader that does not batch: nothing becomes a tensor."""
    return result
