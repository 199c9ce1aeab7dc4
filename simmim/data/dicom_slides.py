"""Whole slides in DICOM: a file holds one level of a pyramid, in tiles that are its frames, and is read as one picture.

Sizes are (height, width). Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.windows import WindowBox, WindowedImage
from simmim.messages import counted

FULL = "TILED_FULL"  # every tile is there, row by row
WHITE = 255  # of tiles that were not scanned, in color of 8 bits; 0 in others
UM_PER_MM = 1000.0
HEAD_BYTES = 12  # of the element of pixels, before its value, in explicit form
Place = tuple[int, int]  # top, left of a tile in the slide, from 0


def is_slide(dataset: Any) -> bool:
    """Whether a file's frames are tiles of one picture."""
    return "TotalPixelMatrixRows" in dataset and "TotalPixelMatrixColumns" in dataset and "SegmentSequence" not in dataset


def slide_size(dataset: Any) -> tuple[int, int]:
    """(height, width) of the picture."""
    return int(dataset.TotalPixelMatrixRows), int(dataset.TotalPixelMatrixColumns)


class DicomSlide(WindowedImage):
    """One level of a slide. Optical paths of one value a pixel are its channels.

    Args:
        stream: stays open until `close`.
        dataset: of the stream, read up to its pixels.
        finish: turns a frame as pydicom decodes it into (channels, height, width).

    Raises:
        ValueError: for several planes of focus, a slide whose tiles are in further files, tiles that are not those the file
            announces.
        Exception: of pydicom, for compressions that nothing installed decodes.
    """

    def __init__(self, stream: BinaryIO, dataset: Any, finish: Callable[[Any, np.ndarray], np.ndarray]) -> None:
        self.stream, self.dataset, self.finish = stream, dataset, finish
        self.levels = (slide_size(dataset),)
        self.pixel_size = pixel_size_of(dataset)
        self.places = place_frames(dataset)
        self.decode = FrameDecoder(stream, dataset)
        self.sample = self.frames_at(next(iter(self.places)))[:, :1, :1]  # of what can be read, and its type and channels

    def read(self, level: int, box: WindowBox) -> StoredValues:
        left, top, right, bottom = box
        is_color = self.sample.dtype == np.uint8 and len(self.sample) == 3
        shape = (len(self.sample), bottom - top, right - left)
        values = np.full(shape, WHITE if is_color else 0, self.sample.dtype)
        for row, column in self.touched(box):
            tile = self.frames_at((row, column))
            first_y, first_x = max(row, top), max(column, left)
            last_y, last_x = min(row + tile.shape[1], bottom), min(column + tile.shape[2], right)
            values[:, first_y - top : last_y - top, first_x - left : last_x - left] = tile[
                :, first_y - row : last_y - row, first_x - column : last_x - column
            ]
        return StoredValues(values)

    def touched(self, box: WindowBox) -> Iterator[Place]:
        """The tiles that a box touches."""
        (left, top, right, bottom), tall, wide = box, int(self.dataset.Rows), int(self.dataset.Columns)
        if self.dataset.get("DimensionOrganizationType") == FULL:
            rows, columns = range(top // tall * tall, bottom, tall), range(left // wide * wide, right, wide)
            yield from ((row, column) for row in rows for column in columns)
        else:
            for row, column in self.places:
                if top - tall < row < bottom and left - wide < column < right:
                    yield row, column

    def frames_at(self, place: Place) -> np.ndarray:
        """A tile, (channels, height, width)."""
        planes = [self.finish(self.dataset, self.decode(frame)) for frame in self.places[place]]
        if len(planes) > 1 and len(planes[0]) > 1:
            raise ValueError(f"a DICOM slide of {len(planes)} optical paths in color, which no channels stand for")
        return planes[0] if len(planes) == 1 else np.concatenate(planes)

    def close(self) -> None:
        self.stream.close()


class FrameDecoder:
    """Decodes single frames of a stream, of which it knows the places.

    Args:
        stream: behind the elements before the pixels.
        dataset: of these.
    """

    def __init__(self, stream: BinaryIO, dataset: Any) -> None:
        from pydicom.pixels import as_pixel_options, get_decoder

        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_implicit_VR or syntax.is_deflated:
            raise ValueError("a DICOM slide in implicit or deflated form: write it in explicit form, as slides are")
        self.stream, self.decoder = stream, get_decoder(syntax)
        self.options = as_pixel_options(dataset, transfer_syntax_uid=syntax, pixel_keyword="PixelData")
        head = stream.read(HEAD_BYTES)
        if len(head) < HEAD_BYTES:
            raise ValueError("a DICOM file without pixels")
        self.options["pixel_vr"] = head[4:6].decode("latin-1")
        self.start = stream.tell()
        if syntax.is_encapsulated and "extended_offsets" not in self.options:
            self.locate_frames()

    def locate_frames(self) -> None:
        """Find the frames once, where each is one piece: a file need not tell their places."""
        from pydicom.encaps import parse_basic_offsets, parse_fragments

        parse_basic_offsets(self.stream)
        begin = self.stream.tell()
        count, places = parse_fragments(self.stream)
        if count == int(self.options.get("number_of_frames", 1)):
            sizes = []
            for place in places:
                self.stream.seek(place + 4)
                sizes.append(int.from_bytes(self.stream.read(4), "little"))
            self.options["extended_offsets"] = ([place - begin for place in places], sizes)

    def __call__(self, frame: int) -> np.ndarray:
        """A frame as pydicom gives it: (height, width) or (height, width, 3)."""
        self.stream.seek(self.start)
        return self.decoder.as_array(self.stream, index=frame, **self.options)[0]


def place_frames(dataset: Any) -> dict[Place, list[int]]:
    """Where each tile lies, and its frames: one for each optical path.

    Raises:
        ValueError: as `DicomSlide`.
    """
    count, planes = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("TotalPixelMatrixFocalPlanes") or 1)
    if planes > 1:
        raise ValueError(f"a DICOM slide of {counted(planes, 'plane')} of focus: give data.pages images, each tile is one")
    if "ConcatenationUID" in dataset:
        raise ValueError("a part of a DICOM slide, whose other tiles are in further files: join them to one")
    if dataset.get("DimensionOrganizationType") != FULL:
        return place_by_position(dataset, count)
    (height, width), paths = slide_size(dataset), int(dataset.get("NumberOfOpticalPaths") or 1)
    down, across = math.ceil(height / int(dataset.Rows)), math.ceil(width / int(dataset.Columns))
    if count != paths * down * across:
        raise ValueError(f"a DICOM slide of {counted(count, 'tile')}, expected {down} × {across} for each optical path")
    corners = [(row * int(dataset.Rows), column * int(dataset.Columns)) for row in range(down) for column in range(across)]
    return {corner: [path * down * across + number for path in range(paths)] for number, corner in enumerate(corners)}


def place_by_position(dataset: Any, count: int) -> dict[Place, list[int]]:
    """As `place_frames`, of a file that names the place of each tile."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    if len(groups) != count:
        raise ValueError("a DICOM slide that does not tell where its tiles lie")
    places: dict[Place, list[int]] = {}
    for frame, group in enumerate(groups):
        try:
            position = group.PlanePositionSlideSequence[0]
            row, column = position.RowPositionInTotalImagePixelMatrix, position.ColumnPositionInTotalImagePixelMatrix
        except (AttributeError, IndexError):
            raise ValueError("a DICOM slide that does not tell where its tiles lie") from None
        places.setdefault((int(row) - 1, int(column) - 1), []).append(frame)
    if {len(frames) for frames in places.values()} != {int(dataset.get("NumberOfOpticalPaths") or 1)}:
        raise ValueError("a DICOM slide with several tiles in one place: give data.pages images, each tile is one")
    return places


def pixel_size_of(dataset: Any) -> float | None:
    """Length of a pixel in µm, along a row; None where the file tells none."""
    try:
        spacing = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
        return float(spacing[1]) * UM_PER_MM or None
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
