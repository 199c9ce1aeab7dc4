"""Samples by (epoch, index), their order, and batches of them.

Everything random about a sample (its place in the order, its crop, flip and mask) follows from (seed, epoch, index) and
from nothing else, so that batches do not depend on the number of workers or devices, and a resumed run goes on as if it
had never stopped.
"""

from __future__ import annotations

import copy
import multiprocessing.context
import multiprocessing.queues
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from simmim.data.decode import MAX_PIXELS, Picture, open_picture
from simmim.data.pillow_guard import UNREADABLE, describe_error

if TYPE_CHECKING:
    import datasets

REPLACEMENTS_TRIED = 32


class ImageSamples(Dataset):
    """Samples by (epoch, index), each a function of that and the seed.

    A sample is a dict: `image` uint8 (channels, height, width); `seed`, for whatever else is random about it; `label`
    where the source has labels; `skipped`, the (path, reason) of unreadable images that it replaces.

    Args:
        view: `RandomView` or `CenterView`.
        keep_decoded: hold decoded images in memory; for sets that fit.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        view: Callable[[Picture, random.Random], Tensor],
        channels: int,
        seed: int,
        keep_decoded: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.max_pixels = max_pixels
        self.source, self.view, self.channels, self.seed = source, view, channels, seed
        self.labeled = "label" in source.column_names
        self.cache: dict[int, tuple[Picture, int | None]] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self.source)

    def row_of(self, key: tuple[int, int]) -> int:
        """The source's row behind a key."""
        return key[1]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        generator = random.Random(f"{self.seed}/{epoch}/{index}")
        skipped = []
        for _ in range(REPLACEMENTS_TRIED):
            try:
                seen = self.view_of(index, generator)
                break
            except UNREADABLE as error:
                skipped.append((self.source[index]["image"]["path"], describe_error(error)))
                index = generator.randrange(len(self.source))
        else:
            raise ValueError(
                f"{REPLACEMENTS_TRIED} images in a row could not be read, the last {skipped[-1][0]}: {skipped[-1][1]}"
            )
        return {**seen, "seed": generator.getrandbits(62), "skipped": skipped}

    def view_of(self, index: int, generator: random.Random) -> dict:
        """The view of the image at `index`, with its label where there are labels."""
        picture, label = self.load(index)
        return {"image": self.view(picture, generator)} | ({"label": label} if self.labeled else {})

    def load(self, index: int) -> tuple[Picture, int | None]:
        """The image at `index` and its label."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        row = self.source[index]
        picture = open_picture(row["image"], self.channels, self.max_pixels)
        if self.cache is not None:
            self.cache[index] = picture.decoded(), row.get("label")
            return self.cache[index]
        return picture, row.get("label")


class EndlessBatchSampler(Sampler):
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


class StreamedSamples(IterableDataset):
    """Samples of a stream, endless: epoch after epoch in a shuffled order of its shards and through a shuffle buffer.

    Every (rank, worker) reads its own part of the stream, so that together they give each sample once an epoch. A worker
    goes on to its next epoch when its part is through; parts differ in length by what does not divide evenly.

    A sample is as from `ImageSamples`, and says by `place` which worker it comes from and how far that one is: (worker,
    epoch, samples taken in it). Starting at such places goes on exactly where they were noted.

    Args:
        stream: rows `{"image": …}`.
        buffer: samples that the shuffle buffer holds, undecoded.
        batch_size: samples a batch; a worker makes whole batches.
        places: of every worker (epoch, samples taken), to go on from.
        batches_done: batches taken so far by this rank, by which workers take turns where they had stopped.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        view: Callable[[Picture, random.Random], Tensor],
        channels: int,
        seed: int,
        buffer: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.stream, self.view, self.channels, self.seed = stream, view, channels, seed
        self.buffer, self.max_pixels = buffer, max_pixels
        self.rank, self.world, self.batches_done = 0, 1, 0
        self.places: dict[int, tuple[int, int]] = {}

    def part(self, rank: int, world: int, batches_done: int, places: dict[int, tuple[int, int]]) -> StreamedSamples:
        """This rank's part, from where it had stopped."""
        part = copy.copy(self)
        part.rank, part.world, part.batches_done, part.places = rank, world, batches_done, dict(places)
        return part

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        workers, turn = (info.num_workers, info.id) if info else (1, 0)
        worker = (turn + self.batches_done) % workers
        node, nodes = self.rank * workers + worker, self.world * workers
        epoch, taken = self.places.get(worker, (0, 0))
        latest = None
        while True:
            empty = True
            for position, row in enumerate(self.rows(epoch, node, nodes)):
                empty = False
                # The last row before the place is looked at again: an unreadable first one is replaced by it.
                if position < taken - 1:
                    continue
                generator = random.Random(f"{self.seed}/{epoch}/{node}/{position}")
                skipped = []
                try:
                    picture = open_picture(row["image"], self.channels, self.max_pixels)
                    view = self.view(picture, generator)
                    latest = row
                except UNREADABLE as error:
                    skipped.append((row["image"]["path"] or f"row {position} of part {node}", describe_error(error)))
                    if latest is None:
                        continue
                    view = self.view(open_picture(latest["image"], self.channels, self.max_pixels), generator)
                if position < taken:
                    continue
                seed, place = generator.getrandbits(62), (worker, epoch, position + 1)
                file = latest["image"]["path"]
                yield {"image": view, "seed": seed, "skipped": skipped, "stream_position": place, "file": file}
            if empty:
                raise ValueError(f"a part of the stream (worker {node} of {nodes}) holds no images: use fewer workers")
            epoch, taken = epoch + 1, 0

    def rows(self, epoch: int, node: int, nodes: int) -> Iterator[dict]:
        """One epoch's rows of one of `nodes` parts."""
        from datasets.distributed import split_dataset_by_node

        stream = self.stream.shuffle(seed=self.seed, buffer_size=self.buffer)
        stream = split_dataset_by_node(stream, node, nodes)
        stream.set_epoch(epoch)  # of the part: dividing forgets the epoch
        # iter() and not a plain loop: that would divide the part once more, among the loading processes it finds.
        for batch in stream.iter(batch_size=1):
            yield {"image": batch["image"][0]}


class SequentialBatchSampler(Sampler):
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
    for name in ("stream_position", "file"):
        if name in samples[0]:
            batch[name] = [sample[name] for sample in samples]
    if "label_map" in samples[0]:
        batch["label_map"] = torch.stack([sample["label_map"] for sample in samples])
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def build_loader(samples: Dataset, workers: int, order: Sampler | None = None, batch_size: int | None = None) -> DataLoader:
    """A loader with `workers` processes, pinned where there is a GPU.

    Args:
        order: batches of keys, for `ImageSamples`.
        batch_size: samples a batch, for `StreamedSamples`, which have an order of their own.
    """
    how = {"batch_sampler": order} if order is not None else {"batch_size": batch_size}
    return DataLoader(
        samples,
        **how,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        multiprocessing_context=quiet_context() if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
    )


class QuietQueue(multiprocessing.queues.Queue):
    """A queue that prints no traceback when the process that it feeds has died. The main process meets that death too, and
    says so."""

    @staticmethod
    def _on_queue_feeder_error(error: Exception, item) -> None:
        if not isinstance(error, BrokenPipeError):
            multiprocessing.queues.Queue._on_queue_feeder_error(error, item)


def quiet_context() -> multiprocessing.context.BaseContext:
    """The default way of starting processes, with `QuietQueue` as its queues."""
    context = multiprocessing.get_context()

    class QuietContext(type(context)):
        def Queue(self, maxsize: int = 0) -> QuietQueue:
            return QuietQueue(maxsize, ctx=self.get_context())

    return QuietContext()


def ignore_signals(worker: int) -> None:
    """In a loading process: what a terminal or a scheduler sends is for the process that trains. It sends to a group of
    processes, which this one leaves. SIGTERM stays as it is, because that is how loading processes are ended."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_num_workers(device: str) -> int:
    """Loading processes for this machine: all cores but one feed a GPU, up to 16; on a CPU, training needs them."""
    return max(1, min(available_cores() - 1, 16)) if device != "cpu" else min(max(available_cores() // 4, 1), 4)
