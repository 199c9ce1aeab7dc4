"""The tables of formats that Pillow does not read, or reads in part. A new one is its object and a line."""

from __future__ import annotations

from typing import BinaryIO

from simmim.data.dicom import DicomFormat
from simmim.data.file_formats import HEAD_BYTES, FileFormat, NpyFormat, TiffFormat
from simmim.data.heif import HeifFormat
from simmim.data.path_formats import PathFormat, SlideFormat, ZarrFormat
from simmim.data.records import Record, files_of

# DICOM before TIFF: its preamble may be the beginning of a TIFF file.
FILE_FORMATS: tuple[FileFormat, ...] = (NpyFormat(), DicomFormat(), TiffFormat(), HeifFormat())

PATH_FORMATS: tuple[PathFormat, ...] = (ZarrFormat(), SlideFormat())


def detect_format(stream: BinaryIO) -> FileFormat | None:
    """The format of a file; None for one that only Pillow may know. The stream is left at its start."""
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    return next((kind for kind in FILE_FORMATS if kind.detect(head)), None)


def detect_path(record: Record) -> tuple[PathFormat, str] | None:
    """The kind of a record's image, and its path, where it is no file alone; None for others."""
    files = files_of(record)
    if len(files) != 1:
        return None
    return next(((kind, files[0]) for kind in PATH_FORMATS if kind.detect(files[0])), None)
