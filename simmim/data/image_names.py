"""Which image a file of labels belongs to, where an image is a page of a file, or has its channels in files of their own.

images/scan.tif of five images       its labels: scan.tif#page=0, …, as predictions are named, or one file scan of as many
                                     pages
images/A1_w1.tif, images/A1_w2.tif   its labels: A1, without the channel and what is before it, or as one of the files
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.addresses import address_channels, address_page, parse_address
from simmim.data.arrangement import (
    find_channel_groups,
    images_in,
    name_without_channel,
    notify_of_pages,
    pattern_expression,
)
from simmim.data.decode import count_images
from simmim.data.index import find_images
from simmim.data.left_out import LeftOut
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.data.records import Record, iterate_records
from simmim.messages import counted
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets


OME = ".ome"  # of a.ome.tif, whose labels may be named a or a.ome


@dataclass(frozen=True)
class NamedImage:
    """An image of a folder, and the names that its labels may have: paths in their folder, without endings.

    Attributes:
        address: the path of its record.
        names: the expected one first.
        whole: name of a file of labels for all pages of its file, page for page; empty where the image is no page.
    """

    address: str
    names: tuple[str, ...]
    whole: str = ""


def find_stems(folder: Path, left_out: LeftOut | None = None) -> dict[str, str]:
    """Every image file below `folder`, by its path in it without the extension.

    Args:
        left_out: as of `find_images`.

    Raises:
        ValueError: if there is none, or two differ only by their extensions.
    """
    paths: dict[str, str] = {}
    for path in find_images(folder, left_out):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in paths:
            raise ValueError(f"{paths[stem]} and {path} differ only by their extensions, and share one partner: rename one")
        paths[stem] = path
    return paths


def list_images(folder: Path, reading: Reading) -> list[NamedImage]:
    """Every image below `folder`.

    Args:
        reading: which pages or files make an image.

    Raises:
        ValueError: as `find_stems` and `find_channel_groups`.
    """
    stems = find_stems(folder)
    if reading.channel_files:
        return group_stems(stems, reading.channel_files)
    images, num_files, num_pages = [], 0, 0
    for stem, path in stems.items():
        count = images_in(record_of(path), reading) if reading.rearranges else 1
        if count == 1:
            images.append(NamedImage(path, (stem, stem.removesuffix(OME)) if stem.endswith(OME) else (stem,)))
            continue
        num_files, num_pages, file = num_files + 1, num_pages + count, os.path.relpath(path, folder)
        for page in range(count):
            names = (f"{file}#page={page}", f"{stem}#page={page}")
            images.append(NamedImage(address_page(path, page), names, stem))
    if num_files:
        notify_of_pages(num_files, num_pages)
    return images


def group_stems(stems: Mapping[str, str], pattern: str) -> list[NamedImage]:
    """The images whose channels are the files of a folder.

    Args:
        stems: as of `find_stems`.
        pattern: as of `find_channel_groups`.

    Raises:
        ValueError: as `find_channel_groups`.
    """
    names, paths = list(stems), list(stems.values())
    groups = find_channel_groups(paths, pattern)
    images = []
    for rows in groups.rows:
        short = (name_without_channel(names[row], pattern) for row in rows)
        of_image = dict.fromkeys((*filter(None, short), *(names[row] for row in rows)))
        images.append(NamedImage(address_channels([paths[row] for row in rows], groups.names), tuple(of_image)))
    return images


def match_names(images: Sequence[NamedImage], labels: Container[str], kind: str) -> list[str | None]:
    """For each image the name of its labels among those that there are; None where there are none.

    Args:
        kind: of the labels, for error messages.

    Raises:
        ValueError: for two for one image, and one for two images.
    """
    matched: list[str | None] = []
    for image in images:
        found = [name for name in image.names if name in labels]
        if len(found) > 1:
            raise ValueError(f"the {kind} {found[0]!r} and {found[1]!r} are both of the image {image.address}: keep one")
        matched.append(found[0] if found else None)
    twice = [name for name, count in Counter(filter(None, matched)).items() if count > 1]
    if twice:
        first, second = (image.address for image, name in zip(images, matched) if name == twice[0])
        raise ValueError(f"the {kind} {twice[0]!r} may be of the image {first} or {second}: name it as one of their files")
    return matched


class WholeImages:
    """From a file that labels name to the image that it belongs to: all channels of it, or one of its pages.

    Args:
        reading: which pages or files make an image.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.groups: dict[str, dict[str, str]] = {}  # by the folder below which a pattern's files are, by path
        self.named: dict[str, str] = {}  # the path by which labels have named an image

    def address_of(self, path: str) -> str:
        """The record's path of an image.

        Args:
            path: of an existing file as `file_of` gives it: the image, one of its channels, or a page of it.

        Raises:
            ValueError: for a file that belongs to no image, pages of which it is unclear which is meant, and two channels of
                one image that labels name as images.
        """
        if self.reading.channel_files:
            return self.address_of_channel(file_of(path), self.reading.channel_files)
        if not self.reading.rearranges:
            return path
        page = None if os.path.isfile(path) else parse_address(path).page
        count = images_in(record_of(file_of(path)), self.reading)
        if page is None and count > 1:
            raise ValueError(
                f"{path} holds {count} images, its pages, and its labels do not tell which: name {os.path.basename(path)}"
                "#page=0 and so on"
            )
        if page is not None and page >= count:
            raise ValueError(f"{path}: the file holds {counted(count, 'image')}, and pages are counted from 0")
        return path if page is None or count > 1 else file_of(path)

    def address_of_channel(self, file: str, pattern: str) -> str:
        """The image that a file is a channel of.

        Raises:
            ValueError: as `address_of` and `find_channel_groups`.
        """
        file = os.path.abspath(file)
        found = pattern_expression(pattern).search(os.path.splitext(file)[0])
        if not found:
            raise ValueError(
                f"data.channel_files {pattern!r} does not match {file!r}, which the labels name: give one that does"
            )
        folder = file[: found.start()]
        if folder not in self.groups:
            paths = find_images(folder)
            groups = find_channel_groups(paths, pattern)
            self.groups[folder] = {
                os.path.abspath(paths[row]): address_channels([paths[row] for row in rows], groups.names)
                for rows in groups.rows
                for row in rows
            }
        address = self.groups[folder][file]
        named = self.named.setdefault(address, file)
        if named != file:
            raise ValueError(
                f"data.channel_files {pattern!r}: the labels have {named!r} and {file!r}, which are channels of one image: "
                "keep the labels of one"
            )
        return address


def file_of(path: str) -> str:
    """The file of a path that may be an address: the first one of several."""
    return path if os.path.isfile(path) else parse_address(path).files[0]


def files_of_pages(paths: Sequence[str | None]) -> tuple[int, ...] | None:
    """The number of each image's file; None where no image is a page.

    Args:
        paths: of records.
    """
    if not any(path and parse_address(path).page is not None for path in paths):
        return None
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(parse_address(path or str(row)).files[0], row) for row, path in enumerate(paths))


def record_of(path: str) -> Record:
    """A file on disk as a record."""
    return {"bytes": None, "path": path}


def count_pages(path: str) -> int:
    """All pages of a file, whatever they mean.

    Raises:
        ValueError: for a file that cannot be read.
    """
    try:
        return count_images(record_of(path), Reading(pages="images"))
    except UNREADABLE as error:
        raise ValueError(f"label map {path} cannot be read: {describe_error(error)}") from error


def check_rows_are_images(images: datasets.Dataset, reading: Reading, path: str) -> None:
    """Check that each row of a source with columns is one image, as its labels are of one.

    Args:
        images: with a column `image`, undecoded.
        path: of the source.

    Raises:
        ValueError: for channels in files of their own, and rows of several pages.
    """
    if reading.channel_files:
        raise ValueError(
            f"data.channel_files is of files: each row of {path!r} has an image of its own and its labels, leave it out"
        )
    if not reading.rearranges:
        return
    for row, record in enumerate(iterate_records(images)):
        if (count := images_in(record, reading)) > 1:
            raise ValueError(
                f"row {row} of {path!r} holds {count} images, its pages, and labels of one: give each page a row, or "
                "data.pages channels or first"
            )
