"""Samples whose views grow in the course of a run: the first batches are of small images, later ones of larger.

What is drawn for a sample stays a function of (seed, epoch, index), and the order of samples is as without. The number of a
batch decides the size of its images, so that a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler, get_worker_info

from simmim.data.samples import ImageSamples, IndexedSamples, StreamedSamples, View

if TYPE_CHECKING:
    import datasets


class SizedBatches(Sampler):
    """Batches of (number of the size, key), from batches of keys.

    Args:
        batches: of keys, those from `start` on.
        first_batches: the first batch of each size, ascending from 0.
    """

    def __init__(self, batches: Sampler, start: int, first_batches: Sequence[int]) -> None:
        self.inner, self.start, self.first_batches = batches, start, first_batches

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        for number, keys in enumerate(self.inner, start=self.start):
            size = bisect_right(self.first_batches, number) - 1
            yield [(size, key) for key in keys]


class GrowingSamples(IndexedSamples):
    """The same images as samples of several sizes. Its keys are (number of the size, key of the samples).

    Args:
        by_size: samples of the same images, which differ in their views alone. Decoded images are kept once for all.
        first_batches: the first batch of each size, ascending from 0.
    """

    def __init__(self, by_size: Sequence[ImageSamples], first_batches: Sequence[int]) -> None:
        self.by_size, self.first_batches = by_size, first_batches
        self.seed, self.source = by_size[0].seed, by_size[0].source
        for samples in by_size:
            samples.cache = by_size[0].cache

    def __len__(self) -> int:
        return len(self.by_size[0])

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0) -> SizedBatches:
        return SizedBatches(self.by_size[0].batches(batch_size, rank, world_size, start), start, self.first_batches)

    @property
    def sources(self) -> tuple[datasets.Dataset, ...]:
        return self.by_size[0].sources

    def path_of(self, key: tuple[int, Any]) -> str:
        return self.by_size[0].path_of(key[1])

    def __getitem__(self, key: tuple[int, Any]) -> dict:
        size, own = key
        return self.by_size[size][own]


class GrowingStream(StreamedSamples):
    """A stream whose samples have several sizes.

    Args:
        stream, channels, seed, options: as of `StreamedSamples`.
        views: the views of each size, the first of which is the sample's image.
        first_batches: the first batch of each size, ascending from 0.
        batch_size: samples of a batch over all ranks; of one of several that are accumulated in a step.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        views: Sequence[Sequence[View]],
        first_batches: Sequence[int],
        batch_size: int,
        channels: int,
        seed: int,
        *options: Any,
    ) -> None:
        super().__init__(stream, views[0][0], channels, seed, *options)
        self.views, self.first_batches, self.batch_size = views, first_batches, batch_size

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        num_workers, turn = (info.num_workers, info.id) if info else (1, 0)
        own = copy.copy(self)
        samples, share, number = StreamedSamples.__iter__(own), self.batch_size // self.world_size, 0
        while True:
            # Loading processes take turns, a batch each; a sample is read when it is asked for.
            batch = self.batches_done + turn + number // share * num_workers
            own.view, *own.further = self.views[bisect_right(self.first_batches, batch) - 1]
            yield next(samples)
            number += 1
