"""What is given to the evaluations: vectors and labels, checked.

Shape letters: N images, D values of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def checked_vectors(vectors: np.ndarray, which: str, kind: type = np.float32) -> np.ndarray:
    """`vectors` as (N, D) of `kind`.

    Raises:
        ValueError: when they are no matrix, empty or not finite.
    """
    vectors = np.require(vectors, kind, ["C", "W"])  # what Arrow shows of its memory cannot be written, which torch minds
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"{which} vectors have shape {vectors.shape}: give (images, values), at least one of each")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise ValueError(f"{which} vector {row} is not finite: leave it out, or embed without autocast")
    return vectors


def checked(
    vectors: np.ndarray, labels: Sequence[int] | np.ndarray, which: str, kind: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """`vectors` as by `checked_vectors`, and one label for each, (N,) int64.

    Raises:
        ValueError: when they are not that.
    """
    vectors, labels = checked_vectors(vectors, which, kind), np.asarray(labels)
    if labels.shape != (len(vectors),):
        raise ValueError(f"{which} labels have shape {labels.shape}: give one for each of {len(vectors)} vectors")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{which} labels are of type {labels.dtype}: give class indices, whole numbers from 0")
    if labels.min() < 0:
        raise ValueError(f"a {which} label is {labels.min()}: give class indices from 0")
    return vectors, labels.astype(np.int64)


def check_alike(train: np.ndarray, test: np.ndarray) -> None:
    """Refuse vectors of different lengths.

    Raises:
        ValueError: with both.
    """
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train vectors have {train.shape[1]} values, test vectors {test.shape[1]}: give the same feature")
