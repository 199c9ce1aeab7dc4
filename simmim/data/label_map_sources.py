"""Scenes: images with label maps, from paired folders, CSV files, or rows with two columns of images.

The folder of label maps is called masks/ and the setting mask_column, as other tools call them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simmim.data.index import count_images, dataset_from_paths, find_images
from simmim.data.label_sources import (
    IMAGE_FOLDER,
    LABEL_MAP_FOLDERS,
    CsvColumn,
    divide_rows,
    holds_boxes,
    is_csv,
    is_plain_folder,
    read_csv,
    read_train_and_validation,
    subfolders,
)
from simmim.data.left_out import LeftOut
from simmim.data.parts import EXPECTED, Parts, assign_parts, meaning_of
from simmim.data.readers import detect_reader
from simmim.data.sources import detect_image_column, select_images

if TYPE_CHECKING:
    import datasets

CLASSES_FILE = "classes.txt"
LABEL_MAP_COLUMNS = ("mask", "masks", "annotation", "segmentation", "segmentation_mask", "seg_map", "label", "labels")
LAYOUT = "images/ and masks/ with files of the same names, or train/ and val/ that have these"


def read_scenes(path: str, column: str | None = None, mask_column: str | None = None) -> dict[str, datasets.Dataset]:
    """Columns `image` and `label_map`, undecoded, by the keys of `Parts.used`.

    Raises:
        ValueError: if there are no images with label maps at `path`.
    """
    folder = Path(path).expanduser()
    if is_csv(path):
        return read_csv_scenes(folder, column or "image", mask_column or "mask")
    if is_plain_folder(path):
        found = find_folder_pairs(folder)
        found.report(str(folder))
        return {use: read_folder_pair(*pair) for use, pair in found.pairs.items()}
    reader, files = detect_reader(path)
    if not reader.has_columns:
        raise ValueError(f"{path!r} has images and no label maps: give a folder with {LAYOUT}")
    parts = read_train_and_validation(path, reader, files)
    return {name: select_scenes(rows, column, mask_column, path) for name, rows in parts.items()}


class FolderPair(NamedTuple):
    """A folder of images and the folder of their label maps."""

    images: Path
    label_maps: Path


@dataclass(frozen=True)
class FolderPairs:
    """The folders of scenes.

    Attributes:
        pairs: by the keys of `Parts.used`.
        parts: the parts that they are; None where the folder is not divided.
        left_aside: folders of images by the names of the parts that are not used.
    """

    pairs: dict[str, FolderPair]
    parts: Parts | None = None
    left_aside: Mapping[str, Path] = field(default_factory=dict)

    def report(self, source: str) -> None:
        """Notices of what is left aside."""
        if self.parts is not None:
            sizes = {name: count_images(folder) for name, folder in self.left_aside.items()}
            self.parts._replace(left_aside=tuple(sizes)).report(source, sizes)


def find_folder_pairs(folder: Path) -> FolderPairs:
    """The folders of images and of label maps of each part.

    Raises:
        ValueError: if there are none, with the expected layout; if two parts mean the same, or none is to train on.
    """
    if not folder.is_dir():
        raise ValueError(f"labeled folder {str(folder)!r} does not exist: give a folder with {LAYOUT}")
    names, image_names = subfolders(folder), subfolders(folder / IMAGE_FOLDER)
    for candidates, pairs in (
        # PART/images beside PART/masks, or images/PART beside masks/PART.
        ({name: folder / name / IMAGE_FOLDER for name in names}, {name: pair_in(folder / name) for name in names}),
        (
            {name: folder / IMAGE_FOLDER / name for name in image_names},
            {name: pair_in(folder, name) for name in image_names},
        ),
    ):
        complete = {name: pair for name, pair in pairs.items() if pair is not None}
        parts = assign_parts(complete, str(folder))
        if parts is not None:
            used = {use: complete[name] for use, name in parts.used.items()}
            others = {
                name: images for name, images in candidates.items() if name not in parts.used.values() and images.is_dir()
            }
            return FolderPairs(used, parts, others)
        if len(complete) > 1 and all(map(meaning_of, complete)):
            raise ValueError(f"{str(folder)!r} has {' and '.join(complete)} and nothing to train on: {EXPECTED}; rename one")
    if pair := pair_in(folder):
        return FolderPairs({"train": pair})
    raise ValueError(
        f"labeled folder {str(folder)!r} has no folders of images and label maps, but "
        f"{', '.join(names[:8]) or 'no folder at all'}: give one with {LAYOUT}"
    )


def pair_in(parent: Path, part: str = "") -> FolderPair | None:
    """The folders of images and label maps in `parent`, of one part; None if one is missing."""
    images = parent / IMAGE_FOLDER / part
    candidates = [path for name in LABEL_MAP_FOLDERS if (path := parent / name / part).is_dir()]
    label_maps = next((path for path in candidates if not holds_boxes(path)), candidates[0] if candidates else None)
    return FolderPair(images, label_maps) if images.is_dir() and label_maps else None


def note_on_label_maps(path: str | list[str]) -> str:
    """A sentence for a user who gives a folder of scenes where images are expected; empty if it holds no label maps."""
    for part in [path] if isinstance(path, str) else path:
        folder = Path(part).expanduser()
        try:
            images, label_maps = find_folder_pairs(folder).pairs["train"]
            find_images(label_maps, LeftOut())
        except (ValueError, OSError):
            continue
        return (
            f"{label_maps} holds label maps, which count as images here like all else in {part}: give {images} to leave "
            "them out"
        )
    return ""


def read_folder_pair(images: Path, label_maps: Path) -> datasets.Dataset:
    """Images and label maps of the same names, apart from their extensions.

    Raises:
        ValueError: naming an image without a label map, a label map without an image, or two files of one name.
    """
    if holds_boxes(label_maps):
        raise ValueError(
            f"{label_maps} holds boxes and no label maps: use simmim finetune detection, or give PNG label maps"
        )
    image_paths, label_map_paths = find_stems(images), find_stems(label_maps)
    for stem, path in image_paths.items():
        if stem not in label_map_paths:
            raise ValueError(
                f"image {path} has no label map{_and_others(image_paths, label_map_paths)}: expected {label_maps / stem}.png"
            )
    for stem, path in label_map_paths.items():
        if stem not in image_paths:
            raise ValueError(
                f"label map {path} has no image{_and_others(label_map_paths, image_paths)}: expected "
                f"{images / stem}.jpg, .png, …"
            )
    return pair_paths(list(image_paths.values()), [label_map_paths[stem] for stem in image_paths])


def _and_others(paths: dict[str, str], partners: dict[str, str]) -> str:
    """The number of further paths without a partner, for an error message about the first."""
    num_others = len(paths.keys() - partners.keys()) - 1
    return f" (nor {num_others:,} others)" if num_others else ""


def find_stems(folder: Path) -> dict[str, str]:
    """Every image below `folder`, by its path in it without the extension.

    Raises:
        ValueError: if there is none, or two differ only by their extensions.
    """
    paths: dict[str, str] = {}
    for path in find_images(folder):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in paths:
            raise ValueError(f"{paths[stem]} and {path} differ only by their extensions, and share one partner: rename one")
        paths[stem] = path
    return paths


def read_csv_scenes(file: Path, column: str, mask_column: str) -> dict[str, datasets.Dataset]:
    """Images and label maps of a CSV file with a header, by part. Relative paths start at the file's folder.

    Raises:
        ValueError: as `read_csv` and `divide_rows`, and for an image that does not exist.
    """
    rows = read_csv(
        file, [CsvColumn("image", "data.column", column), CsvColumn("label map", "data.mask_column", mask_column)]
    )
    folder = file.resolve().parent
    for number, (image, _) in enumerate(rows, start=2):
        if not os.path.isfile(os.path.join(folder, image)):
            raise ValueError(f"{file}, line {number}: there is no image {os.path.join(folder, image)}")
    return {
        use: pair_paths(*([os.path.join(folder, name) for name in names] for names in zip(*part)))
        for use, part in divide_rows(file, rows).items()
    }


def pair_paths(images: list[str], label_maps: list[str]) -> datasets.Dataset:
    """Paths as columns `image` and `label_map`, undecoded."""
    import datasets

    columns = dataset_from_paths(images), dataset_from_paths(label_maps).rename_column("image", "label_map")
    return datasets.concatenate_datasets(list(columns), axis=1)


def select_scenes(rows, column: str | None, mask_column: str | None, path: str) -> datasets.Dataset:
    """Images and label maps, undecoded, of rows with columns.

    Raises:
        ValueError: if there is no column of label maps, with the columns' names.
    """
    import datasets

    names = rows.column_names
    features = {name: feature for name, feature in rows.features.items() if name not in LABEL_MAP_COLUMNS}
    column = column or detect_image_column(features)
    mask_column = mask_column or next((name for name in LABEL_MAP_COLUMNS if name in names and name != column), None)
    if mask_column not in names:
        missing = f"no column {mask_column!r}" if mask_column else "no column of label maps"
        raise ValueError(f"{path!r} has {missing}: its columns are {', '.join(names)}; give data.mask_column")
    label_maps = rows.select_columns([mask_column]).cast_column(mask_column, datasets.Image(decode=False))
    return datasets.concatenate_datasets(
        [select_images(rows, column, path), label_maps.rename_column(mask_column, "label_map")], axis=1
    )


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in classes.txt beside the labeled images, one per line; empty if there is no such file.

    Raises:
        ValueError: if the parts have files that differ, or the file is empty.
    """
    folder = path if path.is_dir() else path.parent
    names: dict[Path, tuple[str, ...]] = {}
    for parent in (folder, *(folder / name for name in subfolders(folder) if meaning_of(name))):
        file = parent / CLASSES_FILE
        if file.is_file():
            names[file] = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
            if not names[file]:
                raise ValueError(f"{file} names no classes: give one per line")
    if not names:
        return ()
    first, *others = names
    for file in others:
        if names[file] != names[first]:
            only = sorted(set(names[file]) ^ set(names[first]))
            difference = f"only in one of them: {', '.join(only)}" if only else "their order"
            raise ValueError(f"classes differ between {first} and {file}: {difference}")
    return names[first]
