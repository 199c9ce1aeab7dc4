"""Whole slides in DICOM that are several files: which file is the slide, and which are left aside.

A scanner writes a series of files for a slide: each level of its pyramid, and pictures of the label, of the whole glass and
of the size of a thumbnail. Labels, and the glass with them, show names of patients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from simmim.data.dicom_slides import pixel_size_of, slide_size
from simmim.data.orientation import Size
from simmim.data.pillow_guard import decoding, silence_logger

ENDING = ".dcm"
SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
CLASS_WITHIN_BYTES = 256  # of a file's beginning
LAST_NEEDED = 0x52009229  # tag of SharedFunctionalGroupsSequence; the list of all tiles comes behind it
# By the third value of ImageType; the last is of the standard's early drafts.
BESIDE = {"LABEL": "label", "OVERVIEW": "overview", "THUMBNAIL": "thumbnail", "LOCALIZER": "overview"}
COARSER = "coarser level"
TOLERANCE = 0.02  # of the shape and the extent of a slide, between its levels


class SlideFile(NamedTuple):
    """A file of a slide.

    Attributes:
        series: its identifier.
        beside: what it shows, one of the values of `BESIDE`; None for a level of the slide.
        size: (height, width) of the level.
        pixel_size: length of a pixel in µm; None where it tells none.
    """

    series: str
    beside: str | None
    size: Size
    pixel_size: float | None


def shows_beside(dataset: Any) -> str | None:
    """What a file of a slide shows beside the specimen, one of the values of `BESIDE`; None for levels of slides and for
    other files.

    Args:
        dataset: a `pydicom.Dataset`.
    """
    if dataset.get("SOPClassUID") != SLIDE_CLASS:
        return None
    kinds = list(dataset.get("ImageType") or [])
    kind = BESIDE.get(kinds[2].upper()) if len(kinds) > 2 else None
    return kind or (BESIDE["LABEL"] if dataset.get("SpecimenLabelInImage") == "YES" else None)


def find_aside(paths: Iterable[str]) -> dict[str, str]:
    """Files among `paths` that are no slides of their own, each with what it is: a value of `BESIDE`, or `COARSER` where a
    finer level of the same slide is among them. Only DICOM files are looked at, and none without pydicom, which alone reads
    them."""
    aside: dict[str, str] = {}
    series: dict[str, list[tuple[str, SlideFile]]] = {}
    for path in paths:
        file = read_slide_file(path) if path.lower().endswith(ENDING) else None
        if file and file.beside:
            aside[path] = file.beside
        elif file:
            series.setdefault(file.series, []).append((path, file))
    for levels in series.values():
        slides: list[SlideFile] = []
        for path, level in sorted(levels, key=lambda found: -math.prod(found[1].size)):
            if any(is_coarser(level, slide) for slide in slides):
                aside[path] = COARSER
            else:
                slides.append(level)
    return aside


def is_coarser(level: SlideFile, slide: SlideFile) -> bool:
    """Whether a file is a slide with fewer pixels: of the same shape, and of the same extent where both tell it. Optical
    paths in files of their own have the same size, and another part of the glass has another extent."""
    (height, width), (tall, wide) = level.size, slide.size
    down, across = tall / height, wide / width
    tolerance = TOLERANCE + 1 / height + 1 / width  # sizes are whole pixels
    is_smaller = min(down, across) > 1 and abs(down / across - 1) <= tolerance
    if not is_smaller or level.pixel_size is None or slide.pixel_size is None:
        return is_smaller
    return abs(level.pixel_size / slide.pixel_size / across - 1) <= tolerance


def read_slide_file(path: str) -> SlideFile | None:
    """What a file is of a slide; None for other files, and those that cannot be read, as is told where they are opened."""
    try:
        with open(path, "rb") as stream:
            if SLIDE_CLASS.encode() not in stream.read(CLASS_WITHIN_BYTES):
                return None
            import pydicom.filereader

            silence_logger("pydicom")
            stream.seek(0)
            with decoding():
                dataset = pydicom.filereader.read_partial(stream, stop_when=lambda tag, vr, length: tag > LAST_NEEDED)
                beside = shows_beside(dataset)
                size = (0, 0) if beside else slide_size(dataset)
                series = str(dataset.get("SeriesInstanceUID") or path)
                return SlideFile(series, beside, size, pixel_size_of(dataset)) if beside or min(size) > 0 else None
    except (ImportError, OSError, ValueError):
        return None
