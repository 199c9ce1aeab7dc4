"""Labeled images: classes, a validation part, and a number of labels per class drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simmim.data.arrangement import arrange_labeled
from simmim.data.decode import STRETCHED
from simmim.data.held_out import number_files
from simmim.data.label_sources import read_labels
from simmim.data.parts import validating_use
from simmim.messages import counted, notify
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class LabeledImages:
    """Labeled images to train on and to validate with.

    Attributes:
        train, validation: columns `image`, undecoded, and `label`, an index of `classes`.
        classes: the classes' names.
        test_validates: whether `validation` is a part that is called test.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    classes: tuple[str, ...]
    test_validates: bool = False


@dataclass(frozen=True)
class LabeledSource:
    """All labeled images of a source, before any are drawn.

    Attributes:
        path: of the source.
        classes: the classes' names, in order.
        train: column `image`, undecoded.
        rows: rows of `train` by class name.
        validation: as `train`; None if the source has no such part, and a fifth of `train` is held out.
        validation_rows: rows of `validation` by class name; a class may have none.
        test_validates: as of `LabeledImages`.
    """

    path: str
    classes: tuple[str, ...]
    train: datasets.Dataset
    rows: Mapping[str, Sequence[int]]
    validation: datasets.Dataset | None = None
    validation_rows: Mapping[str, Sequence[int]] | None = None
    test_validates: bool = False

    def draw_rows(
        self, labels_per_class: int | None, seed: int, validation_seed: int | None = None
    ) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Rows by class name, to train on and to validate with; the latter of `train` if there is no `validation`.

        Args:
            labels_per_class, seed, validation_seed: as of `read_labeled_images`; the same seeds draw the same rows.

        Raises:
            ValueError: as `read_labeled_images`.
        """
        if labels_per_class is not None and labels_per_class < 1:
            raise ValueError(f"{labels_per_class} labels per class asked for: give 1 or more")
        generator = random.Random(f"labels/{seed}")
        hold_out = generator if validation_seed is None else random.Random(f"validation/{validation_seed}")
        rows = {name: list(self.rows[name]) for name in self.classes}
        if self.validation_rows is not None:
            held_out = {name: list(self.validation_rows.get(name, ())) for name in self.classes}
        else:
            held_out = {}
            files = number_files(self.train)
            for name in self.classes:
                rows[name], held_out[name] = hold_out_fifth(name, rows[name], files, hold_out)
        if labels_per_class is not None:
            for name in self.classes:
                if not rows[name]:
                    raise ValueError(f"class {name!r} of {self.path!r} has no training image: add some, or leave it out")
                if len(rows[name]) >= labels_per_class:  # a smaller class draws nothing, and changes no other's draw
                    rows[name] = sorted(generator.sample(rows[name], labels_per_class))
        return rows, held_out

    def draw(self, labels_per_class: int | None, seed: int, validation_seed: int | None = None) -> LabeledImages:
        """The images of `draw_rows`."""
        rows, held_out = self.draw_rows(labels_per_class, seed, validation_seed)
        validation = self.train if self.validation is None else self.validation
        names = list(self.classes)
        return LabeledImages(
            select_labeled_rows(self.train, rows, names),
            select_labeled_rows(validation, held_out, names),
            self.classes,
            self.test_validates,
        )


def hold_out_fifth(
    name: str, rows: Sequence[int], files: np.ndarray | None, generator: random.Random
) -> tuple[list[int], list[int]]:
    """The rows of a class to train on, and a fifth to validate with: of images that are pages of files, whole files.

    Args:
        name: of the class.
        files: as of `number_files`.

    Raises:
        ValueError: where there are not two images, or two files.
    """
    of_file: dict[int, list[int]] = {}
    for row in rows:
        of_file.setdefault(row if files is None else int(files[row]), []).append(row)
    if len(of_file) < 2:
        pages, least = (", pages of 1 file, which resemble one another", "2 files") if len(rows) > 1 else ("", "2")
        raise ValueError(
            f"class {name!r} has {counted(len(rows), 'image')}{pages}: give at least {least}, one to train on and one to "
            "validate with"
        )
    drawn = set(generator.sample(list(of_file), max(1, len(of_file) // 5)))
    held_out = sorted(row for file in drawn for row in of_file[file])
    return [row for file, of_one in of_file.items() if file not in drawn for row in of_one], held_out


def read_labeled_images(
    path: str | Path,
    labels_per_class: int | None,
    seed: int,
    column: str | None = None,
    label_column: str | None = None,
    validation_seed: int | None = None,
    reading: Reading = STRETCHED,
) -> LabeledImages:
    """Read labeled images and choose what to train on and what to validate with.

    `path` is a folder with one subfolder per class; one with such folders in `train/` and in `val/` or `test/`; a CSV file
    of paths (relative to it) and labels; Parquet files; a saved `datasets` folder or a hub id, with or without a
    validation split. If there is none, a fifth of each class is held out before any label is chosen: of images that are
    pages of files, a fifth of the files.

    Args:
        labels_per_class: keep at most this number of training images of each class, drawn by `seed`; None keeps all. Of a
            class with fewer, which is a `Notice`, all are kept.
        column, label_column: the columns of images and labels; detected by default.
        validation_seed: draws the fifth that is held out, the same whatever `seed` is; by default `seed` draws it. Of no
            effect where the source has a validation part.
        reading: which pages or files make an image.

    Raises:
        ValueError: as `open_labeled_source`; if a class has a single image and must be divided, or no training
            image; for fewer than 1 label per class.
    """
    images = open_labeled_source(path, column, label_column, reading).draw(labels_per_class, seed, validation_seed)
    if shortage := describe_shortage(np.bincount(class_indices(images.train)), labels_per_class):
        notify(shortage)
    return images


def describe_shortage(counts: Sequence[int] | np.ndarray, labels_per_class: int | None) -> str:
    """What there is to say of classes with fewer labels than asked for; empty where there are none.

    Args:
        counts: training images of each class, before or after labels are drawn.
    """
    few = [] if labels_per_class is None else [int(count) for count in counts if count < labels_per_class]
    if labels_per_class is None or not few:
        return ""
    have, fewest = ("has" if len(few) == 1 else "have"), (f", the smallest {min(few)}" if len(few) > 1 else f", {few[0]}")
    asked = counted(labels_per_class, "label")
    return f"{asked} per class: {len(few)} of {counted(len(counts), 'class')} {have} fewer{fewest}, and all are taken"


def open_labeled_source(
    path: str | Path, column: str | None = None, label_column: str | None = None, reading: Reading = STRETCHED
) -> LabeledSource:
    """As `read_labeled_images`, without drawing, so that several draws read the labels once.

    Raises:
        ValueError: if there are fewer than two classes, or an image of the validation part has a class that no training
            image has. Classes that are not validated are a `Notice`.
    """
    read = read_labels(str(path), column, label_column)
    parts = {name: group_by_class(*arrange_labeled(*part, reading)) for name, part in read.items()}
    images, rows, names = parts["train"]
    use = validating_use(parts)
    if use is None:
        return LabeledSource(str(path), tuple(names), images, rows)
    validation, validation_rows, validation_names = parts[use]
    if new := sorted(set(validation_names) - set(names)):
        raise ValueError(
            f"classes differ between the training and the validation images of {str(path)!r}: no training image of "
            f"{', '.join(new)}; add some, or leave these validation images out"
        )
    if missing := sorted(set(names) - set(validation_names)):
        notify(f"no validation image of {str(path)!r} is of {', '.join(missing)}: nothing is measured of these classes")
    return LabeledSource(str(path), tuple(names), images, rows, validation, validation_rows, use == "test")


def group_by_class(images: datasets.Dataset, labels: list[str]) -> tuple[datasets.Dataset, dict[str, list[int]], list[str]]:
    """The images, the rows of each class, and the classes' names in order (as numbers if all are numbers).

    Raises:
        ValueError: if there are fewer than two classes.
    """
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    if len(rows) < 2:
        raise ValueError(f"all images have the label {next(iter(rows), None)!r}: give at least two classes")
    are_numbers = all(name.lstrip("-").isdecimal() for name in rows)
    return images, rows, sorted(rows, key=int if are_numbers else str)


def select_labeled_rows(images: datasets.Dataset, rows: dict[str, list[int]], names: list[str]) -> datasets.Dataset:
    """The given rows of each class with a column `label`, the index of the class in `names`. No image is copied."""
    # Arrays: `datasets` makes a fingerprint of what it is given, for which it visits each number of a list by itself.
    labels = np.full(len(images), -1)
    for label, name in enumerate(names):
        labels[list(rows[name])] = label
    chosen = np.array([row for name in names for row in rows[name]], dtype=np.int64)
    return images.add_column("label", labels).select(chosen)


def class_indices(images: datasets.Dataset) -> np.ndarray:
    """The column `label`, (rows,) int64, read at once: a column of `datasets` that is gone through gives one row at a time.

    Args:
        images: with a column `label` of indices.
    """
    return np.asarray(images["label"][:], dtype=np.int64)
