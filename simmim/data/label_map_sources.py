"""Scenes: images with label maps, from paired folders, CSV files, or rows with two columns of images.

The folder of label maps is called masks/ and the setting mask_column, as other tools call them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simmim.data.addresses import address_page, parse_address
from simmim.data.arrangement import images_in
from simmim.data.decode import STRETCHED
from simmim.data.image_names import (
    NamedImage,
    WholeImages,
    check_rows_are_images,
    count_pages,
    file_of,
    find_stems,
    list_images,
    match_names,
)
from simmim.data.index import count_images, dataset_from_paths, find_images, is_image
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
from simmim.messages import counted
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

CLASSES_FILE = "classes.txt"
LABEL_MAP_COLUMNS = ("mask", "masks", "annotation", "segmentation", "segmentation_mask", "seg_map", "label", "labels")
LAYOUT = "images/ and masks/ with files of the same names, or train/ and val/ that have these"


def read_scenes(
    path: str, column: str | None = None, mask_column: str | None = None, reading: Reading = STRETCHED
) -> dict[str, datasets.Dataset]:
    """Columns `image` and `label_map`, undecoded, by the keys of `Parts.used`.

    Args:
        column, mask_column: of images and label maps, in sources with columns; detected by default.
        reading: which pages or files make an image.

    Raises:
        ValueError: if there are no images with label maps at `path`.
    """
    folder = Path(path).expanduser()
    if is_csv(path):
        return read_csv_scenes(folder, column or "image", mask_column or "mask", reading)
    if is_plain_folder(path):
        found = find_folder_pairs(folder)
        found.report(str(folder))
        return {use: read_folder_pair(*pair, reading) for use, pair in found.pairs.items()}
    reader, files = detect_reader(path)
    if not reader.has_columns:
        raise ValueError(f"{path!r} has images and no label maps: give a folder with {LAYOUT}")
    parts = read_train_and_validation(path, reader, files)
    scenes = {name: select_scenes(rows, column, mask_column, path) for name, rows in parts.items()}
    for rows in scenes.values():
        check_rows_are_images(rows, reading, path)
    return scenes


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


def read_folder_pair(images: Path, label_maps: Path, reading: Reading = STRETCHED) -> datasets.Dataset:
    """Images and label maps of the same names, apart from their extensions; where an image is a page or several files, as
    `simmim.data.image_names` tells.

    Raises:
        ValueError: naming an image without a label map, a label map without an image, or two files of one name.
    """
    if holds_boxes(label_maps):
        raise ValueError(
            f"{label_maps} holds boxes and no label maps: use simmim finetune detection, or give PNG label maps"
        )
    found, paths = list_images(images, reading), find_stems(label_maps)
    names = match_names(found, paths, "label maps")
    pages = whole_label_maps(found, names, paths)
    missing = [image for image, name in zip(found, names) if name is None and image.whole not in pages]
    if missing:
        first, others = missing[0], f" (nor {len(missing) - 1:,} others)" if len(missing) > 1 else ""
        of_pages = f", or {label_maps / first.whole}.tif with a page for each" if first.whole else ""
        raise ValueError(
            f"image {first.address} has no label map{others}: expected {label_maps / first.names[0]}.png{of_pages}"
        )
    used = {*names, *pages}
    unused = [path for stem, path in paths.items() if stem not in used]
    if unused:
        others = f" (nor {len(unused) - 1:,} others)" if len(unused) > 1 else ""
        stem = os.path.splitext(os.path.relpath(unused[0], label_maps))[0]
        raise ValueError(f"label map {unused[0]} has no image{others}: expected {images / stem}.jpg, .png, …")
    return pair_paths(
        [image.address for image in found],
        [
            paths[name] if name else address_page(paths[image.whole], parse_address(image.address).page or 0)
            for image, name in zip(found, names)
        ],
    )


def whole_label_maps(images: Sequence[NamedImage], names: Sequence[str | None], paths: Mapping[str, str]) -> set[str]:
    """Names of label maps that hold those of all images of a file, page for page.

    Args:
        names: of label maps that are of one image, for each image.
        paths: of label maps by name.

    Raises:
        ValueError: for one of another number of pages than its image's file has images.
    """
    of_file = Counter(image.whole for image, name in zip(images, names) if image.whole in paths and name is None)
    address_of = {image.whole: image.address for image in images}
    for name, count in of_file.items():
        check_pages(paths[name], count, address_of[name])
    return {*of_file} - {""}


def check_pages(label_map: str, count: int, image: str) -> None:
    """Check that a label map has a page for each image of a file.

    Raises:
        ValueError: where it has not.
    """
    if (found := count_pages(label_map)) != count:
        raise ValueError(
            f"label map {label_map} holds {counted(found, 'page')} and {parse_address(image).files[0]} {count}, each an "
            "image: give one with as many, or one for each page"
        )


def read_csv_scenes(file: Path, column: str, mask_column: str, reading: Reading = STRETCHED) -> dict[str, datasets.Dataset]:
    """Images and label maps of a CSV file with a header, by part. Relative paths start at the file's folder.

    Of an image that is several files a row names one of them, and of a page scan.tif#page=0. A row of all pages of a file
    has a label map of as many.

    Raises:
        ValueError: as `read_csv`, `divide_rows` and `WholeImages`, and for an image that does not exist.
    """
    rows = read_csv(
        file, [CsvColumn("image", "data.column", column), CsvColumn("label map", "data.mask_column", mask_column)]
    )
    folder, whole = file.resolve().parent, WholeImages(reading)
    for number, (image, _) in enumerate(rows, start=2):
        if not is_image(file_of(os.path.join(folder, image))):
            raise ValueError(f"{file}, line {number}: there is no image {os.path.join(folder, image)}")
    parts = {}
    for use, part in divide_rows(file, rows).items():
        scenes = [
            pair
            for image, label_map in part
            for pair in scenes_of_row(os.path.join(folder, image), os.path.join(folder, label_map), whole)
        ]
        parts[use] = pair_paths(*(list(paths) for paths in zip(*scenes)))
    return parts


def scenes_of_row(image: str, label_map: str, whole: WholeImages) -> list[tuple[str, str]]:
    """The addresses of the image and the label map that a row names; of those of every page where both have as many.

    Raises:
        ValueError: as `WholeImages.address_of` and `check_pages`.
    """
    if whole.reading.rearranges and not whole.reading.channel_files and os.path.isfile(image) and os.path.isfile(label_map):
        count = images_in({"bytes": None, "path": image}, whole.reading)
        if count > 1:
            check_pages(label_map, count, image)
            return [(address_page(image, page), address_page(label_map, page)) for page in range(count)]
    return [(whole.address_of(image), label_map)]


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
