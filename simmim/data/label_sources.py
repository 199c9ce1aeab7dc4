"""Labeled images from class folders, CSV files, or rows with a column of labels."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from simmim.data.index import count_images, dataset_from_paths, find_images, is_image_name
from simmim.data.left_out import LeftOut
from simmim.data.parts import EXPECTED, TEST, TRAINING, VALIDATION, Parts, assign_parts, assign_splits, meaning_of
from simmim.data.readers import HUB_ID, FolderReader, Reader, detect_reader
from simmim.data.sources import detect_image_column, select_images
from simmim.data.zarr_folders import is_zarr
from simmim.messages import name_some, notify

if TYPE_CHECKING:
    import datasets

IMAGE_FOLDER, LABEL_MAP_FOLDERS = "images", ("masks", "annotations", "labels")  # of scenes, which have a class per pixel
BOX_ENDINGS = (".txt", ".xml", ".json")  # of files of boxes, which may lie in folders of the same names
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "target", "category", "labels", "cls")
PART_COLUMNS = ("split", "subset", "partition")  # of a CSV file: which rows are to train on, …


def read_labels(path: str, column: str | None, label_column: str | None) -> dict[str, tuple[datasets.Dataset, list[str]]]:
    """Images, undecoded, and their labels by the keys of `Parts.used`.

    Raises:
        ValueError: if there are no labeled images at `path`.
    """
    folder = Path(path).expanduser()
    if is_csv(path):
        return read_csv_labels(folder, column, label_column)
    if is_plain_folder(path):
        return read_class_folders(folder)
    reader, files = detect_reader(path)
    if not reader.has_columns:
        raise ValueError(f"{path!r} has images and no labels: give a folder with one subfolder per class")
    parts = read_train_and_validation(path, reader, files)
    return {name: select_labels(rows, column, label_column, path) for name, rows in parts.items()}


def is_csv(path: str) -> bool:
    """Whether `path` is a CSV file."""
    file = Path(path).expanduser()
    return bool(path) and file.is_file() and file.suffix.lower() == ".csv"


def is_plain_folder(path: str) -> bool:
    """Whether `path` is a folder that no reader with columns reads, or nothing, which is reported as a missing folder."""
    folder = Path(path).expanduser()
    if not path or (not folder.exists() and not HUB_ID.fullmatch(path)):
        return True
    return folder.is_dir() and isinstance(detect_reader(str(folder))[0], FolderReader)


def read_train_and_validation(path: str, reader: Reader, files: list[str]) -> dict[str, datasets.Dataset]:
    """Rows with columns by the keys of `Parts.used`.

    Raises:
        ValueError: as `assign_splits`.
    """
    splits = reader.read_splits(files)
    parts = assign_splits({name: len(rows) for name, rows in splits.items()}, path)
    return {use: splits[name] for use, name in parts.used.items()}


def select_labels(rows, column: str | None, label_column: str | None, path: str) -> tuple[datasets.Dataset, list[str]]:
    """Images, undecoded, and labels of rows with columns.

    Raises:
        ValueError: if there is no column of labels, with the columns' names.
    """
    import datasets

    names = rows.column_names
    if label_column is None:
        typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        label_column = next((name for name in (*typed, *LABEL_COLUMNS) if name in names), None)
    if label_column not in names:
        missing = f"no column {label_column!r}" if label_column else "no column of labels"
        raise ValueError(f"{path!r} has {missing}: its columns are {', '.join(names)}; give data.label_column")
    feature = rows.features[label_column]
    labels = rows[label_column][:]
    to_text = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
    return select_images(rows, column or detect_image_column(rows.features), path), [to_text(label) for label in labels]


# --- CSV ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CsvColumn:
    """A column to read from a CSV file.

    Args:
        content: of one field, as error messages name it: path, label, ….
        setting: by which the user names the column.
        name: of the column; None for the first of `usual_names` that the file has.
    """

    content: str
    setting: str
    name: str | None = None
    usual_names: tuple[str, ...] = ()


def csv_rows(text: TextIO) -> csv.DictReader:
    """Rows of a CSV file with a header, from its beginning, by column.

    Commas, semicolons or tabs are between the fields: those of which the header has most. Spreadsheets write semicolons
    where a comma is the decimal sign.
    """
    header = text.readline()
    text.seek(0)
    return csv.DictReader(text, delimiter=max(",;\t", key=header.count))


def read_csv(file: Path, columns: Sequence[CsvColumn]) -> list[tuple[str, ...]]:
    """The fields of `columns`, row by row, of a CSV file with a header.

    Raises:
        ValueError: if a column is missing, with those there are, if there are no rows, or if a row lacks a field.
    """
    with file.open(newline="", encoding="utf-8-sig") as text:
        reader = csv_rows(text)
        present = reader.fieldnames or []
        names = []
        for column in columns:
            name = column.name or next((name for name in column.usual_names if name in present), None)
            if name not in present:
                missing = f"no column {name!r}" if name else f"no column of {column.content}s"
                raise ValueError(f"{file} has {missing}: its columns are {', '.join(present)}; give {column.setting}")
            names.append(name)
        rows = [tuple(row[name] for name in names) for row in reader]
    if not rows:
        raise ValueError(f"{file} has no rows: give one with {' and '.join(column.content for column in columns)} each")
    for number, row in enumerate(rows, start=2):
        for column, value in zip(columns, row):
            if not value:
                raise ValueError(f"{file}, line {number} has no {column.content}")
    return rows


def read_csv_labels(
    file: Path, column: str | None, label_column: str | None
) -> dict[str, tuple[datasets.Dataset, list[str]]]:
    """Images and labels of a CSV file with a header, by part. Relative paths start at the file's folder.

    Raises:
        ValueError: as `read_csv` and `divide_rows`.
    """
    rows = read_csv(
        file,
        [
            CsvColumn("path", "data.column", column, PATH_COLUMNS),
            CsvColumn("label", "data.label_column", label_column, LABEL_COLUMNS),
        ],
    )
    folder = file.resolve().parent
    return {
        use: (dataset_from_paths([os.path.join(folder, path) for path, _ in part]), [label for _, label in part])
        for use, part in divide_rows(file, rows).items()
    }


def divide_rows(file: Path, rows: Sequence[tuple[str, ...]]) -> dict[str, list[tuple[str, ...]]]:
    """Rows of `read_csv` by the keys of `Parts.used`, as the file's column of parts says; all as "train" if it has none.

    Raises:
        ValueError: if a row of that column says anything but a usual name of a part, or no row says train.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv_rows(lines)
        column = next((name for name in PART_COLUMNS if name in (reader.fieldnames or ())), None)
        names = [row[column] or "" for row in reader] if column else []
    if column is None:
        return {"train": list(rows)}
    for number, name in enumerate(names, start=2):
        if meaning_of(name) is None:
            raise ValueError(
                f"{file}, line {number} has the {column} {name!r}: {EXPECTED}; or rename the column, if it tells no parts"
            )
    parts = assign_splits(Counter(names), str(file))
    return {use: [row for row, name in zip(rows, names) if name == wanted] for use, wanted in parts.used.items()}


# --- class folders -----------------------------------------------------------------------------------------------------


def read_class_folders(folder: Path) -> dict[str, tuple[datasets.Dataset, list[str]]]:
    """Images and labels of class folders, or of those in `train/` and `val/`.

    Raises:
        ValueError: as `find_parts` and `find_class_folders`.
    """
    parts = find_parts(folder)
    left_out, labeled = LeftOut(), {}
    for use, parent in {"train": ""}.items() if parts is None else parts.used.items():
        paths_by_class = find_class_folders(folder / parent, left_out)
        labels = [name for name, paths in paths_by_class.items() for _ in paths]
        labeled[use] = dataset_from_paths([path for paths in paths_by_class.values() for path in paths]), labels
    left_out.report(str(folder))
    if parts is not None:
        parts.report(str(folder), {name: count_images(folder / name) for name in parts.left_aside})
    return labeled


def find_parts(folder: Path) -> Parts | None:
    """The subfolders that are parts of the whole; None if they are classes.

    They are parts where one has a usual name for training, and another one for validation or test, or there is no other. A
    class may be called train or test where that says nothing of the kind.

    Raises:
        ValueError: if two subfolders mean the same, or if it is unclear what they are.
    """
    names = subfolders(folder)
    parts = assign_parts(names, str(folder))
    if parts is None:
        if len(names) > 1 and all(map(meaning_of, names)):
            raise ValueError(
                f"labeled folder {str(folder)!r} has {' and '.join(names)} and nothing to train on: {EXPECTED}; rename one"
            )
        return None
    if parts.validation is not None or len(names) == 1:
        return parts
    if len(subfolders(folder / parts.train)) > 1:
        raise ValueError(
            f"labeled folder {str(folder)!r} has {' and '.join(names)}, and {parts.train} may be a class or a part: "
            f"give {str(folder / parts.train)!r} if it holds the classes, or rename it if it is one"
        )
    return None


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, without hidden ones and images, in order; none if there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".") and not is_zarr(entry.name)
        )


def holds_boxes(folder: Path) -> bool:
    """Whether a folder holds files of boxes and no images, by their names."""
    found = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image_name(entry.name):
                return False
            found |= os.path.splitext(entry.name)[1].lower() in BOX_ENDINGS
    return found


def find_class_folders(folder: Path, left_out: LeftOut) -> dict[str, list[str]]:
    """Class names with the paths of their images, one class per subfolder, in the names' order.

    Raises:
        ValueError: if there is no such folder, there are fewer than two classes, or one has no image; as
            `check_within_classes`.
    """
    if not folder.is_dir():
        raise ValueError(f"labeled folder {str(folder)!r} does not exist: give a folder with one subfolder per class")
    names = subfolders(folder)
    if len(names) < 2:
        raise ValueError(
            f"labeled folder {str(folder)!r} has {len(names)} class folder{'s' * (len(names) != 1)}: "
            "give at least two, each with the images of one class"
        )
    if len(names) == 2 and IMAGE_FOLDER in names and any(name in LABEL_MAP_FOLDERS for name in names):
        task = "detection" if any(holds_boxes(folder / name) for name in names) else "segmentation"
        raise ValueError(
            f"labeled folder {str(folder)!r} has {' and '.join(names)}, which are no classes: give a folder with one "
            f"subfolder per class, or use simmim finetune {task}"
        )
    images = {name: find_images(folder / name, left_out) for name in names}
    check_within_classes(folder, names)
    return images


def check_within_classes(folder: Path, names: Sequence[str]) -> None:
    """Refuse classes that hold parts, whose images would be mixed, and tell of folders that look like parts of other names.

    Args:
        names: of the class folders in `folder`.

    Raises:
        ValueError: where folders in a class mean training, and validation or test.
    """
    within = {name: subfolders(folder / name) for name in names}
    for name, found in within.items():
        meanings = {meaning_of(inner): inner for inner in found}
        others = [meanings[meaning] for meaning in (VALIDATION, TEST) if meaning in meanings]
        if TRAINING in meanings and others:
            train = meanings[TRAINING]
            raise ValueError(
                f"class folder {str(folder / name)!r} has {' and '.join([train, *others])}, which would be mixed: put parts "
                f"above classes, {train}/{name} and {others[0]}/{name}, or give a CSV file with a column split"
            )
    first, *rest = within.values()
    if len(first) > 1 and all(found == first for found in rest) and not any(holds_images(folder / name) for name in names):
        notify(
            f"the {len(names)} class folders of {str(folder)!r}, {name_some(names)}, hold the same folders, "
            f"{name_some(first)}: if these are the classes and those are parts of the images, name the parts train and val"
        )


def holds_images(folder: Path) -> bool:
    """Whether images lie in a folder itself."""
    with os.scandir(folder) as entries:
        return any(is_image_name(entry.name) for entry in entries)
