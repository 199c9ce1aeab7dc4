"""Records: one row's image before it is decoded, a file in memory or on disk."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, TypedDict

from simmim.data.addresses import parse_address
from simmim.data.slide_files import companions_of

if TYPE_CHECKING:
    import datasets

ROWS_AT_ONCE = 100_000  # of paths
RECORDS_AT_ONCE = 32  # which may hold their files' bytes


class Record(TypedDict):
    """An undecoded image, as `datasets.Image(decode=False)` gives it.

    Attributes:
        bytes: the file's content; None for a file that is read from `path`.
        path: the file's path or name; None where it has none.
    """

    bytes: builtins.bytes | None
    path: str | None


def open_record(record: Record) -> BinaryIO:
    """Open the file of a record for reading.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is empty or is not a regular file. Reading from a pipe would block.
    """
    data, path = record["bytes"], record["path"]
    if data is None:
        if path is None:
            raise ValueError("neither bytes nor a path")
        path = parse_address(path).files[0]
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size:
            return open(path, "rb")
    elif data:
        return io.BytesIO(data)
    raise ValueError("empty file")


def files_of(record: Record) -> tuple[str, ...]:
    """The files on disk that a record is read from; none for one in memory."""
    return parse_address(record["path"]).files if record["bytes"] is None and record["path"] else ()


def contents_of(record: Record) -> Iterator[str]:
    """The files on disk that hold a record's image: those of `files_of`, those that belong to a slide, and all in folders
    among these, in order."""
    for path in (path for file in files_of(record) for path in (file, *companions_of(file))):
        if not os.path.isdir(path):
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders.sort()
            yield from (os.path.join(folder, name) for name in sorted(names))


def paths_of(source: datasets.Dataset) -> list[str | None]:
    """The path of each row, without reading the files' bytes that rows may hold.

    Args:
        source: with a column `image`, undecoded.
    """
    return source.select_columns(["image"]).flatten().select_columns(["image.path"])["image.path"][:]


def iterate_records(source: datasets.Dataset) -> Iterator[Record]:
    """The records of all rows in order, `RECORDS_AT_ONCE` in memory. Row by row `datasets` takes many times as long.

    Args:
        source: with a column `image`, undecoded.
    """
    images = source.select_columns(["image"])
    for first in range(0, len(images), RECORDS_AT_ONCE):
        yield from images[first : first + RECORDS_AT_ONCE]["image"]


def record_name(record: Record, row: int) -> str:
    """The record's path, or its row where it has no path."""
    return record["path"] or f"row {row}"


def num_bytes(record: Record) -> int:
    """Size of the record's file, or of all files in its folder, in bytes; 0 if one is missing."""
    if record["bytes"] is not None:
        return len(record["bytes"])
    try:
        return sum(map(os.path.getsize, contents_of(record)))
    except OSError:
        return 0


def digest_paths(source: datasets.Dataset) -> str | None:
    """A hash of the paths of all rows in their order; None where rows hold their files' bytes, which are not read for it.

    A million paths take about a second.
    """
    if not len(source) or source[0]["image"]["bytes"] is not None:
        return None
    table = source.with_format("arrow").select_columns(["image"])
    hasher = hashlib.blake2b(digest_size=8)
    for first in range(0, len(source), ROWS_AT_ONCE):
        for records in table[first : first + ROWS_AT_ONCE]["image"].chunks:
            if records.field("bytes").null_count < len(records):
                return None
            paths = (f"{path}\n" for path in records.field("path").to_pylist())
            hasher.update("".join(paths).encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()
