"""Cross-validation on labeled images: parts of which each is held out in turn."""

from __future__ import annotations

import random

import numpy as np

from simmim.data import LabeledImages


def assign_folds(labels: np.ndarray, num_parts: int, seed: int) -> np.ndarray:
    """The part of each of N labels: the labels of each class are divided evenly, in an order drawn by `seed`.

    Remainders go to the parts in turn over the classes, so that the sizes of the parts differ by one at most.

    Args:
        labels: (N,) class indices.

    Returns:
        (N,) int64, parts from 0.

    Raises:
        ValueError: when a class has fewer labels than there are parts.
    """
    generator = random.Random(f"folds/{seed}")
    part_of = np.empty(len(labels), np.int64)
    num_assigned = 0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < num_parts:
            raise ValueError(
                f"class {label} has {len(rows)} labels, which cannot be divided into {num_parts} parts: give fewer parts"
            )
        part_of[generator.sample(rows.tolist(), len(rows))] = (num_assigned + np.arange(len(rows))) % num_parts
        num_assigned += len(rows)
    return part_of


def hold_out_fold(labels: LabeledImages, part: int, num_parts: int, seed: int) -> LabeledImages:
    """The training images without those of one part to train on, and that part to validate with.

    Raises:
        ValueError: as `assign_folds`.
    """
    part_of = assign_folds(np.asarray(labels.train["label"]), num_parts, seed)
    train, validation = (np.flatnonzero(rows).tolist() for rows in (part_of != part, part_of == part))
    return LabeledImages(labels.train.select(train), labels.train.select(validation), labels.classes)
