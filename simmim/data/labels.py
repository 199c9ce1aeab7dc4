"""Labeled images: where they come from, a validation part, and so many labels a class."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.index import dataset_from_paths, find_images
from simmim.data.sources import HUB_ID, classify, found_column, image_column, load, without_telemetry

if TYPE_CHECKING:
    import datasets

VALIDATION_NAMES = ("val", "valid", "validation", "test")
IMAGE_FOLDER, MASK_FOLDERS = "images", ("masks", "annotations", "labels")  # of scenes with a class for every pixel
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "target", "category", "labels", "cls")


@dataclass(frozen=True)
class LabeledImages:
    """Labeled images read: undecoded columns `image` and `label` for training and validation, and the classes' names."""

    train: datasets.Dataset
    validation: datasets.Dataset
    classes: tuple[str, ...]


@dataclass(frozen=True)
class LabeledSource:
    """All of a source's labeled images, before any are drawn.

    Attributes:
        path: where they come from.
        classes: the classes' names, in order.
        train: undecoded column `image`.
        rows: of `train`, by class name.
        validation: as `train`; None where the source has no such part, and a fifth of `train` is held out by seed.
        validation_rows: of `validation`, by class name.
    """

    path: str
    classes: tuple[str, ...]
    train: datasets.Dataset
    rows: Mapping[str, Sequence[int]]
    validation: datasets.Dataset | None = None
    validation_rows: Mapping[str, Sequence[int]] | None = None

    def draw_rows(self, labels_per_class: int | None, seed: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Rows by class name, to train on and to validate with; the latter of `train` where there is no `validation`.

        Args:
            labels_per_class, seed: as of `read_labeled_images`, with the same choice for the same seed.

        Raises:
            ValueError: as `read_labeled_images`.
        """
        generator = random.Random(f"labels/{seed}")
        rows = {name: list(self.rows[name]) for name in self.classes}
        if self.validation_rows is not None:
            held_out = {name: list(self.validation_rows[name]) for name in self.classes}
        else:
            held_out = {}
            for name in self.classes:
                if len(rows[name]) < 2:
                    raise ValueError(
                        f"class {name!r} has 1 image: give at least 2, one to train on and one to validate with"
                    )
                drawn = set(generator.sample(rows[name], max(1, len(rows[name]) // 5)))
                held_out[name] = sorted(drawn)
                rows[name] = [row for row in rows[name] if row not in drawn]
        if labels_per_class is not None:
            for name in self.classes:
                if not 1 <= labels_per_class <= len(rows[name]):
                    raise ValueError(
                        f"{labels_per_class} labels per class asked for, class {name!r} has {len(rows[name])} training "
                        f"images: give 1 to {min(len(rows[name]) for name in self.classes)}"
                    )
                rows[name] = sorted(generator.sample(rows[name], labels_per_class))
        return rows, held_out

    def draw(self, labels_per_class: int | None, seed: int) -> LabeledImages:
        """The images of `draw_rows`."""
        rows, held_out = self.draw_rows(labels_per_class, seed)
        validation = self.train if self.validation is None else self.validation
        names = list(self.classes)
        return LabeledImages(chosen(self.train, rows, names), chosen(validation, held_out, names), self.classes)


def read_labeled_images(
    path: str | Path,
    labels_per_class: int | None,
    seed: int,
    column: str | None = None,
    label_column: str | None = None,
) -> LabeledImages:
    """Read labeled images and choose what to train on and what to validate with.

    `path` is a folder with one subfolder a class; one with such folders in `train/` and in `val/` or `test/`; a CSV file
    of paths (relative to it) and labels; Parquet files; a saved `datasets` folder or a hub id, with or without a
    validation split. Where there is none, a fifth of each class, drawn by `seed`, is held out before any label is chosen.

    Args:
        labels_per_class: keep so many training images of each class, drawn by `seed`; None keeps all.
        column, label_column: which columns hold image and label; found by default.

    Raises:
        ValueError: when there are fewer than two classes, the two parts' classes differ, a class has a single image and
            has to be divided, or fewer training images than asked for.
    """
    return open_labeled_source(path, column, label_column).draw(labels_per_class, seed)


def open_labeled_source(path: str | Path, column: str | None = None, label_column: str | None = None) -> LabeledSource:
    """As `read_labeled_images`, without drawing: for those who draw more than once.

    Raises:
        ValueError: when there are fewer than two classes or the two parts' classes differ.
    """
    parts = {name: by_class(*part) for name, part in read_parts(str(path), column, label_column).items()}
    data, rows, names = parts["train"]
    if "validation" not in parts:
        return LabeledSource(str(path), tuple(names), data, rows)
    validation, held_out, validation_names = parts["validation"]
    if set(names) != set(validation_names):
        raise ValueError(
            f"classes differ between the training and the validation images of {str(path)!r}: only in one of them: "
            f"{', '.join(sorted(set(names) ^ set(validation_names)))}"
        )
    return LabeledSource(str(path), tuple(names), data, rows, validation, held_out)


def by_class(data: datasets.Dataset, labels: list[str]) -> tuple[datasets.Dataset, dict[str, list[int]], list[str]]:
    """The images, the rows of each class, and the classes' names in order (by number where all are numbers).

    Raises:
        ValueError: when there are fewer than two classes.
    """
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    if len(rows) < 2:
        raise ValueError(f"all images have the label {next(iter(rows), None)!r}: give at least two classes")
    numbers = all(name.lstrip("-").isdecimal() for name in rows)
    return data, rows, sorted(rows, key=int if numbers else str)


def chosen(data: datasets.Dataset, rows: dict[str, list[int]], names: list[str]) -> datasets.Dataset:
    """The given rows of each class, labeled by the class's place in `names`; no image is copied."""
    labels = [-1] * len(data)
    for label, name in enumerate(names):
        for row in rows[name]:
            labels[row] = label
    return data.add_column("label", labels).select([row for name in names for row in rows[name]])


def read_parts(path: str, column: str | None, label_column: str | None) -> dict[str, tuple[datasets.Dataset, list[str]]]:
    """Images and labels of "train", and of "validation" where the source has such a part."""
    folder = Path(path).expanduser()
    if path and folder.is_file() and folder.suffix == ".csv":
        return {"train": read_csv(folder, column, label_column)}
    if not path or (not folder.exists() and not HUB_ID.fullmatch(path)) or is_plain_folder(folder):
        return read_class_folders(folder)
    kind, files = classify(path)
    if kind == "paths":
        raise ValueError(f"{path!r} has images and no labels: give a folder with one subfolder a class")
    return {name: read_columns(part, column, label_column, path) for name, part in parts_of(kind, files).items()}


def is_plain_folder(folder: Path) -> bool:
    """Whether `folder` is a folder of images, and not one of shards or a saved dataset."""
    return folder.is_dir() and classify(str(folder))[0] == "folder"


def parts_of(kind: str, files: list[str]) -> dict:
    """A source with columns as "train", and "validation" where it has a part of one of `VALIDATION_NAMES`."""
    splits = load_splits(kind, files)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    held_out = next((splits[name] for name in VALIDATION_NAMES if name in splits), train)
    return {"train": train} if held_out is train else {"train": train, "validation": held_out}


def load_splits(kind: str, files: list[str]) -> dict:
    """A source's parts by name; a source without parts is all "train"."""
    datasets = without_telemetry()

    if kind == "saved":
        saved = datasets.load_from_disk(files[0])
        return dict(saved) if isinstance(saved, dict) else {"train": saved}
    if kind == "hub":
        try:
            return dict(datasets.load_dataset(files[0]))
        except (OSError, ValueError):
            return {"train": load(kind, files)}  # which says what is the matter
    return {"train": load(kind, files)}


def read_columns(data, column: str | None, label_column: str | None, path: str) -> tuple[datasets.Dataset, list[str]]:
    """Images and labels of a dataset with columns.

    Raises:
        ValueError: when there is no column of labels, listing the columns.
    """
    import datasets

    names = data.column_names
    if label_column is None:
        typed = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        label_column = next((name for name in (*typed, *LABEL_COLUMNS) if name in names), None)
    if label_column not in names:
        asked = f"no column {label_column!r}" if label_column else "no column of labels"
        raise ValueError(f"{path!r} has {asked}: its columns are {', '.join(names)}; give data.label_column")
    feature = data.features[label_column]
    values = data[label_column]
    as_text = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
    return image_column(data, column or found_column(data.features), path), [as_text(value) for value in values]


def read_csv(file: Path, column: str | None, label_column: str | None) -> tuple[datasets.Dataset, list[str]]:
    """Images and labels of a CSV file with a header; relative paths start at the file's own folder.

    Raises:
        ValueError: when a column is missing, listing those there are, or a row has no value.
    """
    with file.open(newline="", encoding="utf-8-sig") as text:
        reader = csv.DictReader(text)
        names = reader.fieldnames or []
        column = column or next((name for name in PATH_COLUMNS if name in names), None)
        label_column = label_column or next((name for name in LABEL_COLUMNS if name in names), None)
        for wanted, what, setting in ((column, "paths", "data.column"), (label_column, "labels", "data.label_column")):
            if wanted not in names:
                asked = f"no column {wanted!r}" if wanted else f"no column of {what}"
                raise ValueError(f"{file} has {asked}: its columns are {', '.join(names)}; give {setting}")
        rows = [(row[column], row[label_column]) for row in reader]
    if not rows:
        raise ValueError(f"{file} has no rows: give one with a path and a label each")
    for number, (path, label) in enumerate(rows, start=2):
        if not path or not label:
            raise ValueError(f"{file}, line {number} has no {'path' if not path else 'label'}")
    home = file.resolve().parent
    return dataset_from_paths([os.path.join(home, path) for path, _ in rows]), [label for _, label in rows]


def read_class_folders(folder: Path) -> dict[str, tuple[datasets.Dataset, list[str]]]:
    """Images and labels of class folders, or of those in `train/` and `val/`."""
    validation = next((folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()), None)
    parts = {"train": folder}
    if (folder / "train").is_dir() and validation is not None:
        parts = {"train": folder / "train", "validation": validation}
    read = {}
    for part, place in parts.items():
        paths_of = class_folders(place)
        labels = [name for name, paths in paths_of.items() for _ in paths]
        read[part] = dataset_from_paths([path for paths in paths_of.values() for path in paths]), labels
    return read


def class_folders(folder: Path) -> dict[str, list[str]]:
    """Class name to image paths, one class a subfolder, in the names' order.

    Raises:
        ValueError: when there is no such folder, there are fewer than two classes, or one has no image.
    """
    if not folder.is_dir():
        raise ValueError(f"labeled folder {str(folder)!r} does not exist: give a folder with one subfolder a class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise ValueError(
            f"labeled folder {str(folder)!r} has {len(names)} class folder{'s' * (len(names) != 1)}: "
            "give at least two, each with the images of one class"
        )
    if len(names) == 2 and IMAGE_FOLDER in names and any(name in MASK_FOLDERS for name in names):
        raise ValueError(
            f"labeled folder {str(folder)!r} has {' and '.join(names)}, which are no classes: give a folder with one "
            "subfolder a class, or use simmim finetune segmentation"
        )
    return {name: find_images(folder / name) for name in names}
