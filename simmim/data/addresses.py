"""Addresses of images that are not one file: a page of a file, one file a channel, a tile. They are paths in records.

scan.tif#page=3                          the fourth page or frame
plate/A1_w1.tif|A1_w2.tif#channels=1,2   the channels, in order, and their names; files after the first are relative to
                                         its folder
scan.tif#page=3#tile=0,512,0,256,256     a part of an image: level of the pyramid, left, top, width, height in its pixels
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

_PAGE = re.compile(r"#page=(\d+)$")
_TILE = re.compile(r"#tile=(\d+),(\d+),(\d+),(\d+),(\d+)$")
_CHANNELS = "#channels="


class Tile(NamedTuple):
    """A part of an image.

    Attributes:
        level: of the file's pyramid; 0 is the full resolution.
        left, top, width, height: in pixels of the level.
    """

    level: int
    left: int
    top: int
    width: int
    height: int


class Address(NamedTuple):
    """What a record's path says.

    Attributes:
        files: the file, or that of each channel.
        page: number of the image in a file of several; None where the path names none.
        names: of the channels that are files.
        tile: the part of the image; None for all of it.
    """

    files: tuple[str, ...]
    page: int | None = None
    names: tuple[str, ...] = ()
    tile: Tile | None = None


def parse_address(path: str) -> Address:
    """The files, the page and the tile that a path names."""
    if "#" not in path:
        return Address((path,))
    if found := _TILE.search(path):
        return parse_address(path[: found.start()])._replace(tile=Tile(*map(int, found.groups())))
    if _CHANNELS in path:
        files, names = path.rsplit(_CHANNELS, 1)
        first, *others = files.split("|")
        folder = os.path.dirname(first)
        return Address((first, *(os.path.join(folder, name) for name in others)), names=tuple(names.split(",")))
    found = _PAGE.search(path)
    return Address((path[: found.start()],), int(found[1])) if found else Address((path,))


def address_page(path: str | None, page: int) -> str:
    """The address of a page of a file, or of a record without a path."""
    return f"{path or ''}#page={page}"


def address_tile(path: str | None, tile: Tile) -> str:
    """The address of a part of an image, or of a record without a path."""
    return f"{path or ''}#tile={','.join(map(str, tile))}"


def without_tile(path: str) -> str:
    """The address of the whole image that a tile is a part of."""
    return _TILE.sub("", path)


def address_channels(files: Sequence[str], channels: Sequence[str]) -> str:
    """The address of an image whose channels are files.

    Args:
        channels: their names.

    Raises:
        ValueError: for a name that has the sign by which they are divided.
    """
    folder = os.path.dirname(files[0])
    names = [files[0], *(os.path.relpath(file, folder or os.curdir) for file in files[1:])]
    if wrong := next((name for name in names if "|" in name), None):
        raise ValueError(f"data.channel_files: {wrong!r} has a | in its name: rename it")
    return "|".join(names) + _CHANNELS + ",".join(name.replace(",", " ") for name in channels)
