"""Labeled images: class folders, a validation part, and so many labels a class."""
from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.sources import find_images, image_dataset

if TYPE_CHECKING:
    import datasets

VALIDATION_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class LabeledImages:
    """Class folders read: paths and class indices for training and validation, and the classes' names."""

    train: datasets.Dataset
    validation: datasets.Dataset
    classes: tuple[str, ...]


def labeled_images(folder: str | Path, labels_per_class: int | None, seed: int) -> LabeledImages:
    """Images in class folders: `folder/CLASS/…`, or `folder/train/CLASS/…` beside `folder/val/CLASS/…` (or `test`).

    Without a validation folder a fifth of each class, drawn by `seed`, is held out before any label is chosen.

    Args:
        labels_per_class: keep so many training images of each class, drawn by `seed`; None keeps all.

    Raises:
        ValueError: when there are fewer than two classes, the two folders' classes differ, or a class has fewer training
            images than asked for.
    """
    folder = Path(folder).expanduser()
    validation_folder = next((folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()), None)
    split = (folder / "train").is_dir() and validation_folder is not None
    train = class_folders(folder / "train" if split else folder)
    generator = random.Random(f"labels/{seed}")
    if split:
        validation = class_folders(validation_folder)
        if train.keys() != validation.keys():
            raise ValueError(
                f"classes differ between {folder / 'train'} and {validation_folder}: only in one of them: "
                f"{', '.join(sorted(train.keys() ^ validation.keys()))}"
            )
    else:
        validation = {}
        for name, paths in train.items():
            if len(paths) < 2:
                raise ValueError(f"class {name!r} has 1 image: give at least 2, one to train on and one to validate with")
            held_out = set(generator.sample(paths, max(1, len(paths) // 5)))
            validation[name] = sorted(held_out)
            train[name] = [path for path in paths if path not in held_out]
    if labels_per_class is not None:
        for name, paths in train.items():
            if not 1 <= labels_per_class <= len(paths):
                raise ValueError(
                    f"{labels_per_class} labels per class asked for, class {name!r} has {len(paths)} training images: "
                    f"give 1 to {min(map(len, train.values()))}"
                )
            train[name] = sorted(generator.sample(paths, labels_per_class))
    classes = tuple(train)
    return LabeledImages(*(with_labels(part, classes) for part in (train, validation)), classes)


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
    return {name: find_images(folder / name) for name in names}


def with_labels(paths_of: dict[str, list[str]], classes: tuple[str, ...]) -> datasets.Dataset:
    """The classes' paths in one dataset, labelled by their place in `classes`."""
    paths = [path for name in classes for path in paths_of[name]]
    labels = [label for label, name in enumerate(classes) for _ in paths_of[name]]
    return image_dataset(paths, labels)
