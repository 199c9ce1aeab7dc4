"""Cross-validation on labeled images: parts of which each is held out in turn."""

from __future__ import annotations

import random

import numpy as np

from simmim.data import LabeledImages
from simmim.data.held_out import number_files

NEVER_HELD_OUT = -1


def assign_folds(labels: np.ndarray, num_parts: int, seed: int, files: np.ndarray | None = None) -> np.ndarray:
    """The part of each of N labels: the labels of each class are divided evenly, in an order drawn by `seed`.

    Remainders go to the parts in turn over the classes, so that the sizes of the parts differ by one at most.

    Args:
        labels: (N,) class indices.
        files: (N,), the file that each is a page of: in a class of as many files as parts, or more, those of one file are in
            one part, so that the parts differ as the files do. None where each is a file of its own.

    Returns:
        (N,) int64, parts from 0. A class with fewer labels than parts is in some of them; one with a single label is in
        none, `NEVER_HELD_OUT`, as nothing of it would be left to train on.

    Raises:
        ValueError: when no class has as many labels as there are parts.
    """
    counts = np.bincount(labels)
    if counts.max() < num_parts:
        raise ValueError(
            f"no class has more than {counts.max()} labels, which cannot be divided into {num_parts} parts: give fewer parts"
        )
    generator = random.Random(f"folds/{seed}")
    part_of = np.empty(len(labels), np.int64)
    num_assigned = 0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) == 1:
            part_of[rows] = NEVER_HELD_OUT
            continue
        of_class = None if files is None else np.unique(files[rows])
        if files is not None and of_class is not None and len(of_class) >= num_parts:
            for number, file in enumerate(generator.sample(of_class.tolist(), len(of_class))):
                part_of[rows[files[rows] == file]] = (num_assigned + number) % num_parts
        else:
            part_of[generator.sample(rows.tolist(), len(rows))] = (num_assigned + np.arange(len(rows))) % num_parts
        num_assigned += len(rows)
    return part_of


def hold_out_fold(labels: LabeledImages, part: int, num_parts: int, seed: int) -> LabeledImages:
    """The training images without those of one part to train on, and that part to validate with.

    Raises:
        ValueError: as `assign_folds`.
    """
    part_of = assign_folds(np.asarray(labels.train["label"]), num_parts, seed, number_files(labels.train))
    train, validation = (np.flatnonzero(rows).tolist() for rows in (part_of != part, part_of == part))
    return LabeledImages(labels.train.select(train), labels.train.select(validation), labels.classes)
