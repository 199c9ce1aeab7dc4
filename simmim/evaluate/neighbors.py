"""k nearest neighbors among feature vectors: how well the classes are separated, with nothing fitted.

Shape letters: N images, T of them to train on, D values of a feature vector. Labels are class indices from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.evaluate.validation import (
    check_same_dim,
    size_of_smallest_class,
    validate_labeled_vectors,
    validate_vectors,
)

# The largest block of similarities in memory: 1,024 × 16,384 float32 are 64 MiB.
TEST_ROWS, TRAIN_ROWS = 1024, 16384
# Training vectors that are held out in turn. More tell little more (an accuracy of 4,096 has a standard error below 0.8
# points), and for 50,000 each feature would take minutes.
HELD_OUT_VECTORS = 4096


def knn_accuracy(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> float:
    """Share of the test vectors that `knn_predict` classifies correctly, in [0, 1].

    Args:
        test_labels: (N,) class indices; a class that is not in `train_labels` counts as wrong.

    Raises:
        ValueError: as `knn_predict`.
    """
    test, test_labels = validate_labeled_vectors(test, test_labels, "test")
    predictions = knn_predict(train, train_labels, test, k, temperature, num_classes, device)
    return float(np.mean(predictions == test_labels))


def knn_predict(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """The class of each test vector by its `k` nearest training vectors, as in DINO's evaluation (arXiv 2104.14294).

    A neighbor of cosine similarity s votes for its class with weight exp(s / temperature). Of classes with equal votes the
    first wins. At most `TEST_ROWS` × `TRAIN_ROWS` similarities are in memory.

    Args:
        train, test: (T, D) and (N, D).
        train_labels: (T,) class indices.
        k: number of neighbors; at most T are used.
        temperature: the smaller, the more the nearest neighbors count.
        num_classes: upper limit that the labels are checked against.
        device: where similarities are computed.

    Returns:
        (N,) int64.

    Raises:
        ValueError: for vectors that are no finite matrix, of different D, or that do not match their labels; a label, k or
            temperature out of range.
    """
    train, labels = validate_labeled_vectors(train, train_labels, "train")
    test = validate_vectors(test, "test")
    check_same_dim(train, test)
    check_knn_settings(k, temperature)
    if num_classes is not None and labels.max() >= num_classes:
        raise ValueError(f"a train label is {labels.max()}: with {num_classes} classes, give 0 to {num_classes - 1}")
    label_of, num_classes = torch.from_numpy(labels), num_classes or int(labels.max()) + 1
    predictions = []
    for first in range(0, len(test), TEST_ROWS):
        similarity, neighbors = nearest_vectors(test[first : first + TEST_ROWS], train, k, device)
        predictions.append(vote(similarity, label_of[neighbors], temperature, num_classes))
    return np.concatenate(predictions)


def held_out_knn_accuracy(
    vectors: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
    files: np.ndarray | None = None,
) -> float | None:
    """Share of the vectors that their `k` nearest others classify correctly, in [0, 1].

    It compares features by training vectors alone. Of more than `HELD_OUT_VECTORS` it asks for that many, drawn with a
    fixed seed, and all others are neighbors. None where a class has a single label, or file: it could not be right.

    Args:
        vectors: (T, D).
        labels: (T,) class indices.
        k, temperature, device: as of `knn_predict`.
        files: (T,), the file that each image is a page of: pages of its own file, which resemble it, are no neighbors. None
            where each is a file of its own.

    Raises:
        ValueError: as `knn_predict`.
    """
    vectors, labels = validate_labeled_vectors(vectors, labels, "train")
    check_knn_settings(k, temperature)
    if size_of_smallest_class(labels, files) < 2:
        return None
    correct, label_of, num_classes = 0, torch.from_numpy(labels), int(labels.max()) + 1
    file_of = torch.arange(len(labels)) if files is None else torch.from_numpy(files)
    most_pages = int(file_of.unique(return_counts=True)[1].max())
    held_out = np.random.default_rng(0).permutation(len(vectors))[:HELD_OUT_VECTORS]
    for first in range(0, len(held_out), TEST_ROWS):
        asked = held_out[first : first + TEST_ROWS]
        similarity, neighbors = nearest_vectors(vectors[asked], vectors, k + most_pages, device)
        own = file_of[neighbors] == file_of[asked, None]
        # To the end and without a vote; who finds too few of its own, as among duplicates, has more than k others.
        order = own.sort(dim=1, stable=True).indices[:, :k]
        similarity, neighbors = (values.gather(1, order) for values in (similarity.masked_fill(own, -torch.inf), neighbors))
        predicted = vote(similarity, label_of[neighbors], temperature, num_classes)
        correct += int((predicted == labels[asked]).sum())
    return correct / len(held_out)


def check_knn_settings(k: int, temperature: float) -> None:
    """Check number of neighbors and temperature.

    Raises:
        ValueError: when one is out of range.
    """
    if k < 1:
        raise ValueError(f"k is {k}: give 1 or more neighbors")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number")


def vote(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> np.ndarray:
    """The class with the most votes, (N,) int64.

    Args:
        similarity, labels: of the neighbors, (N, k), the nearest first.
    """
    # Relative to the nearest neighbor's vote: a small temperature would exceed the largest number.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(similarity), num_classes).scatter_add_(1, labels, weights)
    return votes.argmax(dim=1).numpy()


def nearest_vectors(queries: np.ndarray, vectors: np.ndarray, k: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Cosine similarity and row of each query's `k` most similar vectors, or of all where there are fewer.

    A vector of zeros has similarity 0 to every vector.

    Returns:
        Two tensors (N, k) on the CPU, the nearest first.
    """
    queries_unit = F.normalize(torch.from_numpy(queries).to(device), dim=1)
    similarity = queries_unit.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries_unit.device)
    for first in range(0, len(vectors), TRAIN_ROWS):
        vectors_unit = F.normalize(torch.from_numpy(vectors[first : first + TRAIN_ROWS]).to(device), dim=1)
        best, position = (queries_unit @ vectors_unit.T).topk(min(k, len(vectors_unit)), dim=1)
        similarity, rows = torch.cat([similarity, best], dim=1), torch.cat([rows, position + first], dim=1)
        similarity, position = similarity.topk(min(k, similarity.shape[1]), dim=1)
        rows = rows.gather(1, position)
    return similarity.cpu(), rows.cpu()
