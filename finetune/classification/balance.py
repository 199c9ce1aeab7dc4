"""Classes of different sizes: weights of the loss, or an order that shows all classes equally often."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simmim.data import ImageSamples
from simmim.data.labels import class_indices


def class_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> Tensor:
    """Inverse frequencies, (classes,) float32, with a mean of 1 over the images, so that the scale of the loss stays.

    Args:
        labels: of the training images; every class occurs.
    """
    counts = np.bincount(np.asarray(labels), minlength=num_classes)
    return torch.from_numpy(counts.sum() / (num_classes * counts)).float()


def balanced_order(rows_by_class: Sequence[Sequence[int]], num_images: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """The images of an epoch as (row, number of times that the row came before in this epoch).

    All classes come equally often, up to one, and within a class all rows, up to one. The order of a class's rows is drawn
    again for each round.

    Args:
        rows_by_class: rows of each class.
        num_images: images in the epoch.
    """
    generator = random.Random(f"{seed}/balance/{epoch}")
    # Classes take turns, in another order each epoch, so that the remainder falls to other classes each time.
    turns = generator.sample(range(len(rows_by_class)), len(rows_by_class))
    waiting: list[list[tuple[int, int]]] = [[] for _ in rows_by_class]
    rounds = [0] * len(rows_by_class)
    order = []
    for position in range(num_images):
        label = turns[position % len(turns)]
        if not waiting[label]:
            rows = list(rows_by_class[label])
            waiting[label] = [(row, rounds[label]) for row in generator.sample(rows, len(rows))]
            rounds[label] += 1
        order.append(waiting[label].pop())
    return order


class BalancedSamples(ImageSamples):
    """`ImageSamples` whose epochs show all classes equally often. An image that repeats in an epoch has another view."""

    def __init__(self, source, view, channels: int, seed: int, **options) -> None:
        super().__init__(source, view, channels, seed, **options)
        rows: dict[int, list[int]] = {}
        for row, label in enumerate(class_indices(source).tolist()):
            rows.setdefault(label, []).append(row)
        self.rows_by_class = [rows[label] for label in sorted(rows)]
        self.orders: dict[int, list[tuple[int, int]]] = {}

    def balanced_row(self, epoch: int, index: int) -> tuple[int, int]:
        """The row of the `index`-th image of an epoch, and how often it came before in this epoch."""
        if epoch not in self.orders:
            # A batch may end one epoch and begin the next; earlier epochs are not needed again.
            self.orders = {known: order for known, order in self.orders.items() if known == epoch - 1}
            self.orders[epoch] = balanced_order(self.rows_by_class, len(self), self.seed, epoch)
        return self.orders[epoch][index]

    def row_of(self, key: tuple[int, int]) -> int:
        """The row of the source that belongs to a key."""
        return self.balanced_row(*key)[0]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        row, repeat = self.balanced_row(*key)
        return super().__getitem__((f"{key[0]}.{repeat}", row))  # type: ignore[index]
