"""The order of samples: batches of keys, (epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EndlessBatchSampler(Sampler):
    """Endless batches of (epoch, index): the shuffled epochs one after another, cut into global batches.

    Every epoch holds every sample exactly once, whatever the batch size; a batch may end one epoch and begin the next. Rank
    r takes the r-th part of each global batch, so that a global batch has the same samples on any number of devices.

    Args:
        num_samples: samples in an epoch.
        batch_size: samples per batch of this rank.
        seed: of the epochs' orders.
        rank, world_size: this process and the number of processes.
        start: batches to skip, those that a resumed run has done.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.arange(0)
        batch = self.start
        while True:
            first = (batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
                keys.append((epoch, int(order[position % self.num_samples])))
            yield keys
            batch += 1


class SequentialBatchSampler(Sampler):
    """Batches of (0, index) in order, every sample once; the last batch may be smaller.

    Args:
        num_samples: all samples.
        batch_size: samples per batch of this rank.
        rank, world_size: this process, which takes every `world_size`-th sample, and the number of processes.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices, self.batch_size = range(rank, num_samples, world_size), batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)
