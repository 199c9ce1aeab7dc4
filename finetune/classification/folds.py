"""Cross-validation on labeled images: parts of which each is held out in turn."""

from __future__ import annotations

import random

import numpy as np

from simmim.data import LabeledImages


def fold_of(labels: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """A part, from 0, for each of N labels: each class's labels divided evenly, in an order drawn by `seed`.

    What does not divide evenly goes to parts in turn over the classes, so that the parts' sizes differ by one at most.

    Args:
        labels: (N,) class indices.

    Returns:
        (N,) int64.

    Raises:
        ValueError: when a class has fewer labels than there are parts.
    """
    generator = random.Random(f"folds/{seed}")
    part_of = np.empty(len(labels), np.int64)
    given = 0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < parts:
            raise ValueError(f"class {label} has {len(rows)} labels: {parts} parts need as many at least, give fewer")
        part_of[generator.sample(rows.tolist(), len(rows))] = (given + np.arange(len(rows))) % parts
        given += len(rows)
    return part_of


def held_out_fold(labels: LabeledImages, part: int, parts: int, seed: int) -> LabeledImages:
    """The training images without those of one part, and that part to validate with.

    Raises:
        ValueError: as `fold_of`.
    """
    part_of = fold_of(np.asarray(labels.train["label"]), parts, seed)
    train, validation = (np.flatnonzero(chosen).tolist() for chosen in (part_of != part, part_of == part))
    return LabeledImages(labels.train.select(train), labels.train.select(validation), labels.classes)
