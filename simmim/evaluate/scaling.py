"""Vectors standardized or whitened by the training vectors, before neighbors are looked for or a classifier is fitted.

Few directions, such as the mean color and where something is, have most of the variance of features and drown the others.

Shape letters: T images to train on, D values of a feature vector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from simmim.evaluate.labeled import Split

SCALINGS = ("none", "standardized", "whitened")
# Added to the variances, whose mean is 1: directions without variance are noise. And of T ≤ D vectors full whitening would
# make all distances equal.
WHITENING_FLOOR = 0.1


def scaling_named(name: str, train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The change of vectors, (…, D), by mean and variances of `train`, (T, D).

    standardized: each value has mean 0 and variance 1 over `train`. whitened: then rotated to the principal directions of
    `train`, each divided by the root of its variance plus `WHITENING_FLOOR`.
    """
    if name == "none":
        return lambda vectors: vectors
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    std[std < 1e-6 * max(std.max(), 1e-30)] = 1.0  # values that do not vary stay 0
    if name == "standardized":
        return lambda vectors: ((vectors - mean) / std).astype(np.float32)
    _, singular, directions = np.linalg.svd((train - mean) / std, full_matrices=False)
    scale = 1 / np.sqrt(singular**2 / len(train) + WHITENING_FLOOR)
    return lambda vectors: (((vectors - mean) / std) @ directions.T * scale).astype(np.float32)


def scaled_split(split: Split, scalings: Sequence[str], plain: Collection[str] = ()) -> Split:
    """A split with each feature in each of `scalings`, named "stage 2, whitened".

    Args:
        plain: names of the features that stay as they are.
    """
    train: dict[str, np.ndarray] = {}
    test: dict[str, np.ndarray] = {}
    for name, vectors in split.train.items():
        for scaling in ("none",) if name in plain else scalings:
            full = name if scaling == "none" else f"{name}, {scaling}"
            change = scaling_named(scaling, vectors)
            train[full], test[full] = change(vectors), change(split.test[name])
    return split._replace(train=train, test=test)
