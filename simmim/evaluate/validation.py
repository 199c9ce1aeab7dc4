"""Checks of the vectors and labels that k-NN and linear probe receive.

Shape letters: N images, D values of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def validate_vectors(vectors: np.ndarray, part: str, dtype: type = np.float32) -> np.ndarray:
    """`vectors` as a writable (N, D) array of `dtype`.

    Args:
        part: train or test, for the message.

    Raises:
        ValueError: when they are no matrix, empty or not finite.
    """
    vectors = np.require(vectors, dtype, ["C", "W"])  # Arrow's memory is read-only, and torch warns about that
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"{part} vectors have shape {vectors.shape}: give (images, values), at least one of each")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise ValueError(f"{part} vector {row} is not finite: leave it out, or embed without autocast")
    return vectors


def validate_labeled_vectors(
    vectors: np.ndarray, labels: Sequence[int] | np.ndarray, part: str, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """`vectors` as by `validate_vectors`, and one label per vector, (N,) int64.

    Raises:
        ValueError: as `validate_vectors`; when the labels are not one class index from 0 per vector.
    """
    vectors, labels = validate_vectors(vectors, part, dtype), np.asarray(labels)
    if labels.shape != (len(vectors),):
        raise ValueError(f"{part} labels have shape {labels.shape}: give one for each of {len(vectors)} vectors")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{part} labels are of type {labels.dtype}: give class indices, whole numbers from 0")
    if labels.min() < 0:
        raise ValueError(f"a {part} label is {labels.min()}: give class indices from 0")
    return vectors, labels.astype(np.int64)


def size_of_smallest_class(labels: np.ndarray, files: np.ndarray | None = None) -> int:
    """Labels, or with `files` files, of the class that has the fewest.

    Args:
        labels: (T,) class indices.
        files: (T,), the number of the file that each image is a page of.
    """
    if files is not None:
        labels = np.unique(np.stack([labels, files]), axis=1)[0]
    return int(np.unique(labels, return_counts=True)[1].min())


def check_same_dim(train: np.ndarray, test: np.ndarray) -> None:
    """Check that training and test vectors have the same D.

    Raises:
        ValueError: naming both.
    """
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train vectors have {train.shape[1]} values, test vectors {test.shape[1]}: give the same feature")
