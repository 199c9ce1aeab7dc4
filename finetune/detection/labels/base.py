"""What a reader of boxes gives, and the ways in which four numbers describe a box.

Boxes are (x1, y1, x2, y2) in pixels of the upright image, exclusive: x1 is the left edge of the first column, x2 the right
edge of the last. Sizes are (height, width).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from simmim.data.decode import STRETCHED
from simmim.data.orientation import Box, Size
from simmim.data.records import Record
from simmim.messages import did_you_mean
from simmim.reading import Reading


def corners(values: Box, size: Size) -> Box:
    """Corners are kept."""
    return values


def corner_and_size(values: Box, size: Size) -> Box:
    """The upper left corner, width and height."""
    left, top, width, height = values
    return left, top, left + width, top + height


def center_and_size(values: Box, size: Size) -> Box:
    """The center, width and height."""
    x, y, width, height = values
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def pixel_numbers(values: Box, size: Size) -> Box:
    """First and last pixel, counted from 1, both inside the box."""
    first_x, first_y, last_x, last_y = values
    return first_x - 1, first_y - 1, last_x, last_y


def shares(convert: Callable[[Box, Size], Box]) -> Callable[[Box, Size], Box]:
    """The same in shares of width and height."""

    def in_pixels(values: Box, size: Size) -> Box:
        height, width = size
        first, second, third, fourth = values
        return convert((first * width, second * height, third * width, fourth * height), size)

    return in_pixels


# The setting data.box_format.
BOX_FORMATS: Mapping[str, Callable[[Box, Size], Box]] = {
    "xyxy": corners,
    "xywh": corner_and_size,
    "cxcywh": center_and_size,
    "voc": pixel_numbers,
    "xyxy-shares": shares(corners),
    "xywh-shares": shares(corner_and_size),
    "cxcywh-shares": shares(center_and_size),
}
MAX_NUMBER = 1e9  # of a box; beyond is infinite, or a mistake
MAX_SHARE = 1.5  # a share beyond is a number of pixels; edges a little outside are clipped


def convert_box(values: Box, box_format: str, size: Size, place: str) -> Box:
    """Four numbers as a box in pixels, not clipped.

    Args:
        box_format: one of `BOX_FORMATS`.
        size: of the image that the numbers refer to.
        place: file and line, for error messages.

    Raises:
        ValueError: for pixels where shares are stated, and the other way round.
    """
    said = " ".join(f"{value:g}" for value in values)
    if box_format.endswith("-shares"):
        if max(map(abs, values)) > MAX_SHARE:
            raise ValueError(f"{place}: box {said} is in pixels, expected shares of width and height in [0, 1]")
    elif all(abs(value) <= 1 for value in values) and any(value != int(value) for value in values):
        raise ValueError(
            f"{place}: box {said} is in shares of width and height, expected pixels ({box_format}): give pixels, or state "
            "data.box_format as one of the formats in shares"
        )
    return BOX_FORMATS[box_format](values, size)


def check_box_format(name: str) -> None:
    """Refuse an unknown format.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in BOX_FORMATS:
        raise ValueError(f"data.box_format is {name!r}{did_you_mean(name, BOX_FORMATS)}")


@dataclass(frozen=True)
class RawObject:
    """One object as a file describes it.

    Attributes:
        values: the box, in the scene's format.
        category: name of its class.
        ignored: whether it is a crowd, difficult, or marked to be ignored: neither an object to find nor background.
        place: file and line, for error messages.
        segmentation: its mask as of `masks.read_mask`; None for a box alone.
    """

    values: Box
    category: str
    ignored: bool
    place: str
    segmentation: Any = None


@dataclass(frozen=True)
class RawScene:
    """One image and its objects as a file describes them.

    Attributes:
        image: undecoded.
        objects: may be empty.
        box_format: one of `BOX_FORMATS`.
        size: (height, width) that the file states for the image; None where it states none.
        place: file and line that describe the image, for error messages.
    """

    image: Record
    objects: tuple[RawObject, ...]
    box_format: str
    size: Size | None
    place: str


@dataclass(frozen=True)
class RawLabels:
    """All that a source holds.

    Attributes:
        parts: scenes by the keys of `Parts.used`.
        classes: names in order, as the format states them; None where names occur with the objects only.
        notes: what was inferred, a sentence each.
        notes_on_masks: the same, told where masks are learned.
    """

    parts: Mapping[str, Sequence[RawScene]]
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    notes_on_masks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadingOptions:
    """What the user says of a source.

    Args:
        column: holds the images, in sources with columns.
        box_format: of the numbers in sources that do not fix it.
        classes: names in order; empty where the source is to say them.
        reading: which pages or files make an image.
    """

    column: str | None = None
    box_format: str | None = None
    classes: tuple[str, ...] = ()
    reading: Reading = STRETCHED


class BoxReader(ABC):
    """One format of labels.

    Attributes:
        title: as the format's users call it.
        layout: what is expected, for error messages.
    """

    title: ClassVar[str]
    layout: ClassVar[str]

    @abstractmethod
    def detect(self, path: str) -> bool:
        """Whether `path` holds labels in this format, by its files' names."""

    @abstractmethod
    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        """Read all labels.

        Raises:
            ValueError: for what cannot be read, naming file and line.
        """


def record_of(path: str | Path) -> Record:
    """A file on disk as a record."""
    return {"bytes": None, "path": str(path)}


def four_numbers(words: Sequence[object], place: str) -> Box:
    """Numbers of a box.

    Raises:
        ValueError: for anything but four finite numbers.
    """
    try:
        first, second, third, fourth = (float(word) for word in words)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{place}: box {' '.join(map(str, words))!r}, expected four numbers") from None
    if not all(abs(value) < MAX_NUMBER for value in (first, second, third, fourth)):  # so that NaN fails, too
        raise ValueError(f"{place}: box {' '.join(map(str, words))!r}, expected four finite numbers")
    return first, second, third, fourth
