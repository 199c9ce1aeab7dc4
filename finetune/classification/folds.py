"""Cross-validation on labeled images: parts of which each is held out in turn."""

from __future__ import annotations

import random

import numpy as np

from simmim.data import LabeledImages
from simmim.data.held_out import number_files
from simmim.data.labels import class_indices
from simmim.messages import counted

NEVER_HELD_OUT = -1


def assign_folds(labels: np.ndarray, num_parts: int, seed: int, files: np.ndarray | None = None) -> np.ndarray:
    """The part of each of N labels: the labels of each class are divided evenly, in an order drawn by `seed`.

    Remainders go to the parts in turn over the classes, so that the sizes of the parts differ by one at most.

    Args:
        labels: (N,) class indices.
        files: (N,), the file that each is a page of: pages of one file resemble one another, and are in one part, so that
            it is the files of a class that are divided evenly. None where each is a file of its own.

    Returns:
        (N,) int64, parts from 0. A class with fewer labels, or files, than parts is in some of them; one with a single
        label, or of a single file, is in none, `NEVER_HELD_OUT`, as nothing of it would be left to train on.

    Raises:
        ValueError: when no class has as many labels as there are parts; when pages are of so few files that a part would
            have none.
    """
    counts = np.bincount(labels)
    if counts.max() < num_parts:
        raise ValueError(
            f"no class has more than {counted(int(counts.max()), 'label')}, which cannot be divided into {num_parts} parts: "
            "give fewer parts"
        )
    generator = random.Random(f"folds/{seed}")
    part_of = np.empty(len(labels), np.int64)
    num_assigned = 0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        together = rows if files is None else files[rows]
        order = np.unique(together).tolist()
        if len(order) == 1:
            part_of[rows] = NEVER_HELD_OUT
            continue
        parts = {key: (num_assigned + number) % num_parts for number, key in enumerate(generator.sample(order, len(order)))}
        part_of[rows] = [parts[key] for key in together.tolist()]
        num_assigned += len(order)
    if files is not None and num_assigned < num_parts:
        raise ValueError(
            f"labeled images are pages of {counted(len(np.unique(files)), 'file')}, held out whole, and a class of one "
            f"never: too few to choose rates by {num_parts} parts; give more files or labels, fewer parts "
            "(folds), or a single rate (lr_factors of one number, layer_decays empty), which tunes nothing"
        )
    return part_of


def fewest_files(labels: LabeledImages, num_parts: int, seed: int) -> int | None:
    """The smallest number of files whose pages a class has, of labels that are divided; None where each is a file.

    Raises:
        ValueError: as `assign_folds`.
    """
    files, classes = number_files(labels.train), class_indices(labels.train)
    if files is None:
        return None
    assign_folds(classes, num_parts, seed, files)
    return min(len(np.unique(files[classes == label])) for label in np.unique(classes))


def hold_out_fold(labels: LabeledImages, part: int, num_parts: int, seed: int) -> LabeledImages:
    """The training images without those of one part to train on, and that part to validate with.

    Raises:
        ValueError: as `assign_folds`.
    """
    part_of = assign_folds(class_indices(labels.train), num_parts, seed, number_files(labels.train))
    train, validation = (np.flatnonzero(rows).tolist() for rows in (part_of != part, part_of == part))
    return LabeledImages(labels.train.select(train), labels.train.select(validation), labels.classes)
