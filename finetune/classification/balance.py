"""Classes of different sizes: weights for the loss, or an order that shows all classes equally often."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simmim.data import ImageSamples


def class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """Inverse frequencies, (classes,) float32, whose mean over the images is 1, so that the loss keeps its scale.

    Args:
        labels: of the training images; every class occurs.
    """
    counts = np.bincount(np.asarray(labels), minlength=classes)
    return torch.from_numpy(counts.sum() / (classes * counts)).float()


def balanced_order(rows: Sequence[Sequence[int]], count: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """Which images make up an epoch: (row, how often it was shown in it before); all classes equally often, up to one.

    Within a class, rows come round in an order drawn anew each time, so that each is shown equally often, up to one.

    Args:
        rows: of each class.
        count: of images in the epoch.
    """
    generator = random.Random(f"{seed}/balance/{epoch}")
    # Classes take turns, in another order each epoch: what does not divide evenly falls to other classes each time.
    turns = generator.sample(range(len(rows)), len(rows))
    waiting: list[list[tuple[int, int]]] = [[] for _ in rows]
    rounds = [0] * len(rows)
    order = []
    for position in range(count):
        label = turns[position % len(turns)]
        if not waiting[label]:
            waiting[label] = [(row, rounds[label]) for row in generator.sample(list(rows[label]), len(rows[label]))]
            rounds[label] += 1
        order.append(waiting[label].pop())
    return order


class BalancedSamples(ImageSamples):
    """`ImageSamples` whose epochs show all classes equally often; an image that comes again in an epoch has another view."""

    def __init__(self, source, view, channels: int, seed: int, keep_decoded: bool = False) -> None:
        super().__init__(source, view, channels, seed, keep_decoded)
        rows: dict[int, list[int]] = {}
        for row, label in enumerate(source["label"]):
            rows.setdefault(label, []).append(row)
        self.rows = [rows[label] for label in sorted(rows)]
        self.orders: dict[int, list[tuple[int, int]]] = {}

    def place(self, epoch: int, index: int) -> tuple[int, int]:
        """Of an epoch's `index`-th image, its row and how often it was shown before in this epoch."""
        if epoch not in self.orders:
            # A batch may end one epoch and begin the next; older ones do not come again.
            self.orders = {known: order for known, order in self.orders.items() if known == epoch - 1}
            self.orders[epoch] = balanced_order(self.rows, len(self), self.seed, epoch)
        return self.orders[epoch][index]

    def row_of(self, key: tuple[int, int]) -> int:
        """The source's row behind a key."""
        return self.place(*key)[0]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        row, shown = self.place(*key)
        return super().__getitem__((f"{key[0]}.{shown}", row))
