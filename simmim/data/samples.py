"""Samples: views of images by (epoch, index), or in the order of a stream.

Everything random about a sample (its position in the order, its crop, flip and mask) is a function of (seed, epoch, index)
only, so that batches do not depend on the number of workers or devices, and a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import copy
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from simmim.data.batch_order import EndlessBatchSampler
from simmim.data.decode import MAX_PIXELS, STRETCHED, open_picture
from simmim.data.kept_pictures import KeptPictures
from simmim.data.pictures import Picture
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.data.rows import Rows
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

MAX_REPLACEMENTS = 32
View = Callable[[Picture, random.Random], Tensor]


def further_views(picture: Picture, views: Sequence[View], generator: random.Random) -> dict:
    """More views of a picture, as the sample's `views`; without any no entry.

    They are drawn by what `generator` would return next, which is the sample's seed, and it stays as it is: all else that is
    random about the sample is as without them.
    """
    if not views:
        return {}
    own = random.Random(f"{copy.copy(generator).getrandbits(62)}/views")
    return {"views": [view(picture, own) for view in views]}


class IndexedSamples(Dataset, ABC):
    """Samples by keys, and the order in which a run takes them.

    Attributes:
        seed: of everything random.
    """

    seed: int

    @abstractmethod
    def __len__(self) -> int:
        """Training images that make an epoch."""

    @abstractmethod
    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0) -> Sampler:
        """Endless batches of keys.

        Args:
            batch_size: training images per batch of this rank.
            rank, world_size: this process and the number of processes.
            start: batches to skip, those that a resumed run has done.
        """

    @abstractmethod
    def path_of(self, key: Any) -> str:
        """The path of a key's image, or its row where it has no path."""

    @property
    def num_images(self) -> int:
        """All images that may be read."""
        return len(self)

    @property
    @abstractmethod
    def sources(self) -> tuple[datasets.Dataset, ...]:
        """The images, undecoded: those that make an epoch, then further ones."""


class ImageSamples(IndexedSamples):
    """Samples by (epoch, index), each a function of that and the seed.

    A sample is a dict: `image` (channels, height, width), uint8, or float32 of deep images;
    `seed`, for everything else that is random about it; `label`
    if the source has labels; `skipped`, the (path, reason) of unreadable images that it replaces; `gray_copies`, the path of
    a color image that is read as gray; `views`, further views of the same image where there are any.

    Args:
        source: column `image`, undecoded, and `label` if there are labels.
        view: `RandomView` or `EvaluationView`.
        channels: of the samples.
        seed: of everything random.
        keep_decoded: hold decoded images in memory, for small data sets.
        max_pixels: larger images count as unreadable.
        reading: how values become pictures.
        further: more views of each image.
        kept: shrunk images on disk, by which each file is decoded once.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        view: View,
        channels: int,
        seed: int,
        keep_decoded: bool = False,
        max_pixels: int = MAX_PIXELS,
        reading: Reading = STRETCHED,
        further: Sequence[View] = (),
        kept: KeptPictures | None = None,
    ) -> None:
        self.max_pixels, self.reading, self.further, self.kept = max_pixels, reading, further, kept
        self.source, self.view, self.channels, self.seed = source, view, channels, seed
        self.rows = Rows(source)
        self.labeled = "label" in source.column_names
        self.cache: dict[int, tuple[Picture, int | None]] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0) -> Sampler:
        return EndlessBatchSampler(len(self), batch_size, self.seed, rank, world_size, start)

    @property
    def sources(self) -> tuple[datasets.Dataset, ...]:
        return (self.source,)

    def row_of(self, key: tuple[int, int]) -> int:
        """The source's row of a key."""
        return key[1]

    def path_of(self, key: tuple[int, int]) -> str:
        return self.name_of(self.row_of(key))

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        generator = random.Random(f"{self.seed}/{epoch}/{index}")
        skipped = []
        for _ in range(MAX_REPLACEMENTS):
            try:
                sample = self.view_of(index, generator)
                break
            except UNREADABLE as error:
                skipped.append((self.rows[self.source_row(index)]["image"]["path"], describe_error(error)))
                index = self.replacement(generator)
        else:
            raise ValueError(
                f"{MAX_REPLACEMENTS} images in a row could not be read, the last {skipped[-1][0]}: {skipped[-1][1]}"
            )
        return {**sample, "seed": generator.getrandbits(62), "skipped": skipped}

    def source_row(self, index: int) -> int:
        """The source's row of the sample at `index`."""
        return index

    def replacement(self, generator: random.Random) -> int:
        """The index of another sample, for one that cannot be read."""
        return generator.randrange(len(self.source))

    def view_of(self, index: int, generator: random.Random) -> dict:
        """The views of the image at `index`, with its label if there are labels."""
        picture, label = self.load(index)
        gray_copies = [self.name_of(index)] if picture.loses_color else []
        sample = {"image": self.view(picture, generator), "gray_copies": gray_copies}
        sample |= further_views(picture, self.further, generator)
        return sample | ({"label": label} if self.labeled else {})

    def name_of(self, index: int) -> str:
        """The path of the image at `index` of the source, or its row."""
        return self.rows[index]["image"]["path"] or f"image {index}"

    def load(self, index: int) -> tuple[Picture, int | None]:
        """The image at `index` and its label."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        row = self.rows[index]
        how = (row["image"], self.channels, self.max_pixels, self.reading)
        picture = self.kept.open(row["image"], lambda: open_picture(*how)) if self.kept else open_picture(*how)
        if self.cache is not None:
            self.cache[index] = picture.decoded(), row.get("label")
            return self.cache[index]
        return picture, row.get("label")


class StreamedSamples(IterableDataset):
    """Samples of a stream, endless: epoch after epoch in a shuffled order of its shards and through a shuffle buffer.

    Every (rank, worker) reads its own part of the stream, so that together they give each sample once per epoch. A worker
    goes on to its next epoch when its part ends; parts differ in length by what does not divide evenly.

    A sample is as from `ImageSamples`, and has a `stream_position`: (worker, epoch, samples taken of this epoch). A stream
    that starts at these positions continues exactly there.

    Args:
        stream: rows `{"image": …}`.
        view, channels, seed, max_pixels, reading, further: as of `ImageSamples`.
        buffer: samples that the shuffle buffer holds, undecoded.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        view: View,
        channels: int,
        seed: int,
        buffer: int,
        max_pixels: int = MAX_PIXELS,
        reading: Reading = STRETCHED,
        further: Sequence[View] = (),
    ) -> None:
        self.reading, self.further = reading, further
        self.stream, self.view, self.channels, self.seed = stream, view, channels, seed
        self.buffer, self.max_pixels = buffer, max_pixels
        self.rank, self.world_size, self.batches_done = 0, 1, 0
        self.positions: dict[int, tuple[int, int]] = {}

    def part(self, rank: int, world_size: int, batches_done: int, positions: dict[int, tuple[int, int]]) -> StreamedSamples:
        """This rank's part, from where it had stopped.

        Args:
            batches_done: batches that this rank has taken, so that its workers take turns from where they had stopped.
            positions: (epoch, samples taken of it) of every worker.
        """
        part = copy.copy(self)
        part.rank, part.world_size, part.batches_done, part.positions = rank, world_size, batches_done, dict(positions)
        return part

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        num_workers, turn = (info.num_workers, info.id) if info else (1, 0)
        worker = (turn + self.batches_done) % num_workers
        node, num_nodes = self.rank * num_workers + worker, self.world_size * num_workers
        epoch, num_taken = self.positions.get(worker, (0, 0))
        latest, before = None, deque[dict](maxlen=MAX_REPLACEMENTS)
        while True:
            is_empty = True
            for number, row in enumerate(self.rows(epoch, node, num_nodes)):
                is_empty = False
                # The last row before the position is read again: an unreadable first row is replaced by it.
                if number < num_taken - 1:
                    before.append(row)
                    continue
                generator = random.Random(f"{self.seed}/{epoch}/{node}/{number}")
                name = f"row {number} of part {node}"
                sample, skipped, latest = self.view_or_replacement(row, latest, generator, name)
                if latest is None and before:  # that row is unreadable too, and one before it stood in
                    latest = self.last_readable(before)
                before.clear()
                if sample is None or latest is None or number < num_taken:
                    continue
                yield {
                    **sample,
                    "seed": generator.getrandbits(62),
                    "skipped": skipped,
                    "stream_position": (worker, epoch, number + 1),
                    "file": latest["image"]["path"],
                }
            if is_empty:
                raise ValueError(f"a part of the stream (worker {node} of {num_nodes}) holds no images: use fewer workers")
            epoch, num_taken = epoch + 1, 0

    def last_readable(self, rows: Sequence[dict]) -> dict | None:
        """The last row whose image can be read; None where there is none."""
        for row in reversed(rows):
            with contextlib.suppress(*UNREADABLE):
                self.view_of(row, random.Random(0), "")
                return row
        return None

    def view_or_replacement(
        self, row: dict, latest: dict | None, generator: random.Random, name: str
    ) -> tuple[dict | None, list[tuple[str, str]], dict | None]:
        """The sample of a row's image (`view_of`), the skipped files, and the row it comes from: if the image is unreadable,
        `latest`, the last row that could be read. No sample if there is none yet."""
        try:
            return self.view_of(row, generator, name), [], row
        except UNREADABLE as error:
            skipped = [(row["image"]["path"] or name, describe_error(error))]
        if latest is None:
            return None, skipped, None
        return self.view_of(latest, generator, name), skipped, latest

    def view_of(self, row: dict, generator: random.Random, name: str) -> dict:
        """The views of a row's image.

        Args:
            name: of the row, where the image has no path.
        """
        picture = open_picture(row["image"], self.channels, self.max_pixels, self.reading)
        gray_copies = [row["image"]["path"] or name] if picture.loses_color else []
        sample = {"image": self.view(picture, generator), "gray_copies": gray_copies}
        return sample | further_views(picture, self.further, generator)

    def rows(self, epoch: int, node: int, num_nodes: int) -> Iterator[dict]:
        """One epoch's rows of one of `num_nodes` parts."""
        from datasets.distributed import split_dataset_by_node

        stream = self.stream.shuffle(seed=self.seed, buffer_size=self.buffer)
        stream = split_dataset_by_node(stream, node, num_nodes)
        stream.set_epoch(epoch)  # after dividing, which resets the epoch
        # iter() instead of a plain loop, which would divide the part again among the loading processes.
        for batch in stream.iter(batch_size=1):
            yield {"image": batch["image"][0]}
