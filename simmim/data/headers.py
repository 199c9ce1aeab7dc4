"""What headers of image files tell of sizes, kept on disk beside the index, so that a file is opened again only once it has
changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simmim.data.index import TRUSTED_AGE_S, cache_folder
from simmim.data.orientation import Size
from simmim.data.records import Record, contents_of, files_of
from simmim.data.windows import WindowedImage
from simmim.files import atomic_write

if TYPE_CHECKING:
    import datasets

VERSION = 1


class Header(NamedTuple):
    """What tiles need to know of an image before it is read.

    Attributes:
        levels, pixel_size: as of `WindowedImage`.
    """

    levels: tuple[Size, ...]
    pixel_size: float | None


class KeptHeaders:
    """The headers of a source's files, in one file that is written whole or not at all.

    An entry belongs to a path, and to the size, time and place on the disk of its files, those that belong to a slide among
    them. Of processes that write at once the last one wins; what others would have added is read again. Nothing is kept of
    images in memory, and of those that are folders, whose sizes are in small files and whose pixels are in a great many.

    Args:
        source: of undecoded images. Sources of one folder share a file, so that a few new images are all that is opened.
        how: all else that headers depend on.
    """

    def __init__(self, source: datasets.Dataset, how: tuple) -> None:
        self.root = common_folder(source)
        name = hashlib.sha256(json.dumps([self.root, *map(repr, how)]).encode()).hexdigest()[:24]
        self.file = cache_folder() / f"{name}-headers.json"
        self.known = read_headers(self.file)
        self.new: dict[str, list] = {}

    def read(self, record: Record, opened: Callable[[], WindowedImage]) -> Header:
        """The header of a record, from its file where this is new or has changed.

        Args:
            opened: opens the file; it is closed again.

        Raises:
            One of `UNREADABLE`.
        """
        path = record["path"]
        stamp = file_stamps(record)  # before it is opened: one that changes meanwhile is read again
        if path and stamp and path in self.known and stamp == self.known[path][0]:
            return as_header(self.known[path])
        image = opened()
        try:
            levels = [[int(height), int(width)] for height, width in image.levels]
            entry = [stamp, levels, None if image.pixel_size is None else float(image.pixel_size)]
        finally:
            image.close()
        if path and stamp and all(time.time() - changed_ns / 1e9 > TRUSTED_AGE_S for _, changed_ns, _ in stamp):
            self.new[path] = entry
        return as_header(entry)

    def save(self) -> None:
        """Write what has been read beside what was known and is still there. Without a folder for it nothing is kept."""
        if not self.new:
            return
        # Read again: another process may have written since.
        entries = {path: entry for path, entry in read_headers(self.file).items() if is_there(path)} | self.new
        try:
            with atomic_write(self.file) as temporary:
                content = {"version": VERSION, "images": entries}
                temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
        except OSError:
            return
        self.known, self.new = entries, {}


def file_stamps(record: Record) -> list[list[int]] | None:
    """Size, time in ns and place on the disk of each file of an image; None where these do not tell whether it has changed.

    Raises:
        OSError: for a file that is missing.
    """
    files = files_of(record)
    if not files or any(map(os.path.isdir, files)):
        return None
    status = [os.stat(file) for file in contents_of(record)]
    return [[each.st_size, each.st_mtime_ns, each.st_ino] for each in status]


def common_folder(source: datasets.Dataset) -> str:
    """The folder that the files of a source's ends have in common: of all files, where they are in their order; empty where
    they have none."""
    files = [file for row in {0, len(source) - 1} if len(source) for file in files_of(source[row]["image"])]
    try:
        return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    except ValueError:  # no files, or on different drives
        return ""


def read_headers(file: Path) -> dict[str, list]:
    """The entries of a file by path: (stamp, levels, pixel size); none where it cannot be used."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["images"] if content["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def as_header(entry: list) -> Header:
    """What an entry keeps."""
    _, levels, pixel_size = entry
    return Header(tuple((height, width) for height, width in levels), pixel_size)


def is_there(path: str) -> bool:
    """Whether the files of an entry exist."""
    return all(map(os.path.exists, files_of({"bytes": None, "path": path})))
