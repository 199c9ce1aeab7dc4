"""Records: one row's image before it is decoded, a file in memory or on disk."""

from __future__ import annotations

import builtins
import io
import os
import stat
from typing import BinaryIO, TypedDict


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
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size:
            return open(path, "rb")
    elif data:
        return io.BytesIO(data)
    raise ValueError("empty file")


def record_name(record: Record, row: int) -> str:
    """The record's path, or its row where it has no path."""
    return record["path"] or f"row {row}"


def num_bytes(record: Record) -> int:
    """Size of the record's file in bytes; 0 if the file is missing."""
    if record["bytes"] is not None:
        return len(record["bytes"])
    try:
        return os.path.getsize(record["path"])  # type: ignore[arg-type]
    except OSError:
        return 0
