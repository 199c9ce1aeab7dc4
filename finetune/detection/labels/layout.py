"""Folders of images and of their annotation files, and the parts that they are."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from simmim.data.addresses import parse_address
from simmim.data.image_names import list_images, match_names
from simmim.data.index import count_images
from simmim.data.label_sources import subfolders
from simmim.data.parts import assign_parts
from simmim.reading import Reading

IMAGE_FOLDERS = ("images", "JPEGImages")
Suffix = str | tuple[str, ...]


class Pair(NamedTuple):
    """The folder of a part's images, and that of its annotation files; may be the same one."""

    images: Path
    annotations: Path


def files_in(folder: Path, suffix: Suffix) -> list[Path]:
    """Files of that ending, or of one of several, in `folder` itself, in order; none if there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(suffix) and entry.is_file())
    return [folder / name for name in names if not name.startswith(".")]


def annotation_files(folder: Path, suffix: Suffix) -> Iterator[Path]:
    """Files of that ending below `folder`, in order. Links are followed, hidden files and folders are left out.

    Raises:
        ValueError: for a folder, or a link, that cannot be read: its images would count as images without objects.
    """

    def refuse(error: OSError) -> None:
        refuse_folder(str(error.filename), error.strerror or type(error).__name__)

    entered = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(parent, name)
            if name.lower().endswith(suffix):
                yield Path(path)
            elif os.path.islink(path):  # to nothing that can be reached: it may be a folder of a share
                try:
                    os.stat(path)
                except OSError as error:
                    refuse(error)


def refuse_folder(folder: str, reason: str) -> NoReturn:
    """Refuse a folder of annotations that cannot be read.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"annotations in {folder!r} cannot be read ({reason}), and their images would count as images without objects: "
        "give a folder that can be read, or try again"
    )


def annotations_by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    """The `annotation_files` of a folder, by their path in it without the ending.

    Raises:
        ValueError: as `annotation_files`.
    """
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in annotation_files(folder, suffix)}


def find_pairs(
    folder: Path, annotation_folders: Sequence[str], suffix: Suffix, together: bool = True, nested: bool = False
) -> dict[str, Pair]:
    """The folders by the keys of `Parts.used`; empty if there are none.

    They are PART/images beside PART/labels, images/PART beside labels/PART, PART with both, or the same without parts.

    Args:
        annotation_folders: usual names.
        suffix: of annotation files, one or several.
        together: whether images and annotation files may lie in one folder.
        nested: whether all annotation files may lie in folders of a folder of annotations.

    Raises:
        ValueError: as `annotation_files`.
    """
    names = set(subfolders(folder))
    for images in IMAGE_FOLDERS:
        names |= set(subfolders(folder / images))
    wanted = Wanted(annotation_folders, suffix, nested)
    pairs = {name: pair for name in sorted(names) if (pair := pair_of(folder, name, wanted, together))}
    parts = assign_parts(pairs, str(folder))
    if parts is not None:
        parts.report(str(folder), {name: count_images(pairs[name].images) for name in parts.left_aside})
        return {use: pairs[name] for use, name in parts.used.items()}
    pair = pair_in(folder, "", wanted, together)
    return {"train": pair} if pair else {}


class Wanted(NamedTuple):
    """What annotation files are searched for; arguments as of `find_pairs`."""

    folders: Sequence[str]
    suffix: Suffix
    nested: bool

    def are_in(self, folder: Path) -> bool:
        """Whether there are some in a folder.

        Raises:
            ValueError: as `annotation_files`.
        """
        if files_in(folder, self.suffix):
            return True
        return self.nested and folder.is_dir() and any(annotation_files(folder, self.suffix))


def pair_of(folder: Path, part: str, wanted: Wanted, together: bool) -> Pair | None:
    """The folders of one part, PART/images or images/PART; None if one is missing."""
    if part in (*IMAGE_FOLDERS, *wanted.folders):
        return None
    return pair_in(folder / part, "", wanted, together) or pair_in(folder, part, wanted, False)


def pair_in(parent: Path, part: str, wanted: Wanted, together: bool) -> Pair | None:
    """The folders in `parent`, of one part; None if one is missing."""
    images = next((parent / name / part for name in IMAGE_FOLDERS if (parent / name / part).is_dir()), None)
    annotations = next((parent / name / part for name in wanted.folders if wanted.are_in(parent / name / part)), None)
    if images is None and annotations is not None and together and count_images(parent):
        images = parent
    if annotations is None and together and files_in(parent, wanted.suffix):
        annotations, images = parent, images or parent
    return Pair(images, annotations) if images is not None and annotations is not None else None


def image_files(pair: Pair, annotations: Container[str], reading: Reading) -> dict[str, str]:
    """The record's path of every image of a pair by the name, without the ending, that its annotations have or should have.

    Args:
        annotations: the names that there are.
        reading: which pages or files make an image.

    Raises:
        ValueError: as `list_images` and `match_names`; for annotations of a file of several images.
    """
    images = list_images(pair.images, reading)
    for image in images:
        if image.whole and image.whole in annotations:
            raise ValueError(
                f"the annotations {image.whole!r} are of {parse_address(image.address).files[0]}, whose pages are images: "
                f"name them {image.names[0]} and so on"
            )
    names = match_names(images, annotations, "annotations")
    return {name or image.names[0]: image.address for image, name in zip(images, names)}


def read_text(file: Path) -> str:
    """A text file's content.

    Raises:
        ValueError: for a file that cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give a text file in UTF-8") from error
