"""Samples by (epoch, index), their order, and batches of them.

Everything random about a sample (its place in the order, its crop, flip and mask) follows from (seed, epoch, index) and
from nothing else, so that batches do not depend on the number of workers or devices, and a resumed run goes on as if it
had never stopped.
"""
from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from simmim.data.decode import UNREADABLE, Picture, open_picture, reason

if TYPE_CHECKING:
    import datasets

REPLACEMENTS_TRIED = 32


class ImageSamples(Dataset):
    """Samples by (epoch, index), each a function of that and the seed.

    A sample is a dict: `image` uint8 (channels, height, width); `seed`, for whatever else is random about it; `label`
    where the source has labels; `skipped`, the (path, reason) of unreadable images that it replaces.

    Args:
        view: `RandomView` or `CentreView`.
        keep_decoded: hold decoded images in memory; for sets that fit.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        view: Callable[[Picture, random.Random], Tensor],
        channels: int,
        seed: int,
        keep_decoded: bool = False,
    ) -> None:
        self.source, self.view, self.channels, self.seed = source, view, channels, seed
        self.labelled = "label" in source.column_names
        self.kept: dict[int, tuple[Picture, int | None]] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        generator = random.Random(f"{self.seed}/{epoch}/{index}")
        skipped = []
        for _ in range(REPLACEMENTS_TRIED):
            try:
                picture, label = self.opened(index)
                image = self.view(picture, generator)
                break
            except UNREADABLE as error:
                skipped.append((self.source[index]["image"]["path"], reason(error)))
                index = generator.randrange(len(self.source))
        else:
            raise ValueError(
                f"{REPLACEMENTS_TRIED} images in a row could not be read, the last {skipped[-1][0]}: {skipped[-1][1]}"
            )
        sample = {"image": image, "seed": generator.getrandbits(62), "skipped": skipped}
        return sample | ({"label": label} if self.labelled else {})

    def opened(self, index: int) -> tuple[Picture, int | None]:
        """The image at `index` and its label."""
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        row = self.source[index]
        picture = open_picture(row["image"], self.channels)
        if self.kept is not None:
            self.kept[index] = picture.decoded(), row.get("label")
            return self.kept[index]
        return picture, row.get("label")


class SampleStream(Sampler):
    """Endless batches of (epoch, index): the epochs' shuffles one after another, cut into global batches.

    Every epoch holds every sample exactly once, whatever the batch size; a batch may end one epoch and begin the next.
    Rank r of a world takes the r-th part of each global batch, so that the same global batch meets the same samples on
    any number of devices.

    Args:
        count: samples in an epoch.
        batch_size: samples a batch of this rank.
        start: batches already taken, by which a resumed run begins.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        batch = self.start
        while True:
            first = (batch * self.world + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
                keys.append((epoch, int(order[position % self.count])))
            yield keys
            batch += 1


class InOrder(Sampler):
    """Batches of (0, index) in order, every sample once, the last batch as short as it comes out."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices, self.batch_size = range(rank, count, world), batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)


def collate(samples: list[dict]) -> dict:
    """Samples to a batch: images and labels stacked, seeds and skipped files as lists."""
    batch = {
        "image": torch.stack([sample["image"] for sample in samples]),
        "seed": [sample["seed"] for sample in samples],
        "skipped": [entry for sample in samples for entry in sample["skipped"]],
    }
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def batches(samples: ImageSamples, order: Sampler, workers: int) -> DataLoader:
    """A loader over `samples` in `order`, with `workers` processes, pinned where there is a GPU."""
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(device: str) -> int:
    """Loading processes for this machine: all cores but one feed a GPU, up to 16; on a CPU, training needs them."""
    return max(1, min(cores() - 1, 16)) if device != "cpu" else min(max(cores() // 4, 1), 4)
