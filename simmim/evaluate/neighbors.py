"""k nearest neighbors among vectors: how well the classes lie apart, with nothing fitted.

Shape letters: N images, T of them to train on, D values of a vector. Labels are class indices from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.evaluate.validation import check_alike, checked, checked_vectors

# Of similarities held at a time: 1,024 × 16,384 float32 are 64 MiB.
TEST_ROWS, TRAIN_ROWS = 1024, 16384


def knn(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    device: str | torch.device = "cpu",
) -> float:
    """Share of `test` that `knn_predict` gets right, in [0, 1].

    Args:
        test_labels: (N,) class indices; one that `train_labels` does not hold counts as missed.

    Raises:
        ValueError: as `knn_predict`.
    """
    test, test_labels = checked(test, test_labels, "test")
    return float(np.mean(knn_predict(train, train_labels, test, k, temperature, classes, device) == test_labels))


def knn_predict(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """The class of each test vector by its `k` nearest training vectors, as in DINO's evaluation (arXiv 2104.14294).

    Nearness is the cosine similarity s; a neighbor votes for its class with weight exp(s / temperature). Of classes with
    equal votes the first wins. At most `TEST_ROWS` × `TRAIN_ROWS` similarities are held at a time.

    Args:
        train, test: (T, D) and (N, D).
        train_labels: (T,) class indices.
        k: neighbors; no more than T are used.
        temperature: the smaller, the more the nearest counts.
        classes: number of classes, to check the labels against.
        device: where similarities are computed.

    Returns:
        (N,) int64.

    Raises:
        ValueError: for vectors that are no finite matrix, of different D, or that do not match their labels; a label, a k
            or a temperature out of range.
    """
    train, labels = checked(train, train_labels, "train")
    test = checked_vectors(test, "test")
    check_alike(train, test)
    check_vote(k, temperature)
    if classes is not None and labels.max() >= classes:
        raise ValueError(f"a train label is {labels.max()}: with {classes} classes, give 0 to {classes - 1}")
    of_train, classes = torch.from_numpy(labels), classes or int(labels.max()) + 1
    predictions = []
    for first in range(0, len(test), TEST_ROWS):
        similarity, neighbor = nearest_vectors(test[first : first + TEST_ROWS], train, k, device)
        predictions.append(elected(similarity, of_train[neighbor], temperature, classes))
    return np.concatenate(predictions)


def knn_held_out(
    vectors: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> float | None:
    """Share of the vectors that their `k` nearest others get right, each held out in turn, in [0, 1]: what training vectors
    alone tell of a feature. None with a single label in a class, which nothing could get right when it is held out.

    Raises:
        ValueError: as `knn_predict`.
    """
    vectors, labels = checked(vectors, labels, "train")
    check_vote(k, temperature)
    if np.unique(labels, return_counts=True)[1].min() < 2:
        return None
    right, of_train, classes = 0, torch.from_numpy(labels), int(labels.max()) + 1
    for first in range(0, len(vectors), TEST_ROWS):
        queries = vectors[first : first + TEST_ROWS]
        similarity, neighbor = nearest_vectors(queries, vectors, k + 1, device)
        own = neighbor == torch.arange(first, first + len(queries))[:, None]
        # Of more than k duplicates a vector itself may not be among the nearest: then the last one goes.
        own[:, -1] |= ~own.any(dim=1)
        similarity, neighbor = (found[~own].reshape(len(queries), -1) for found in (similarity, neighbor))
        predicted = elected(similarity, of_train[neighbor], temperature, classes)
        right += int((predicted == labels[first : first + len(queries)]).sum())
    return right / len(vectors)


def check_vote(k: int, temperature: float) -> None:
    """Refuse what no vote can be taken with.

    Raises:
        ValueError: saying what will do.
    """
    if k < 1:
        raise ValueError(f"k is {k}: give 1 or more neighbors")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number")


def elected(similarity: Tensor, labels: Tensor, temperature: float, classes: int) -> np.ndarray:
    """The class that gets the most votes, (N,) int64, by the neighbors' similarity and labels, two times (N, k), the
    nearest first."""
    # Votes relative to the nearest neighbor's: a small temperature would exceed the largest number.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(similarity), classes).scatter_add_(1, labels, weights)
    return votes.argmax(dim=1).numpy()


def nearest_vectors(queries: np.ndarray, vectors: np.ndarray, k: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Cosine similarity and row of each query's `k` most similar vectors, or of all where they are fewer, the nearest first:
    two times (N, k), on the CPU. A vector of zeros is like none, similarity 0."""
    unit = F.normalize(torch.from_numpy(queries).to(device), dim=1)
    similarity = unit.new_empty(len(unit), 0)
    rows = torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for first in range(0, len(vectors), TRAIN_ROWS):
        part = F.normalize(torch.from_numpy(vectors[first : first + TRAIN_ROWS]).to(device), dim=1)
        found = unit @ part.T
        best, place = found.topk(min(k, len(part)), dim=1)
        similarity, rows = torch.cat([similarity, best], dim=1), torch.cat([rows, place + first], dim=1)
        similarity, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
        rows = rows.gather(1, place)
    return similarity.cpu(), rows.cpu()
