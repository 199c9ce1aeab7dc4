"""Batches of labeled and unlabeled images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import Sampler

from simmim.data import ImageSamples, IndexedSamples

if TYPE_CHECKING:
    import datasets


class Key(NamedTuple):
    """What is taken: from the unlabeled or the labeled images, (epoch, index) of these."""

    unlabeled: bool
    key: tuple[int, int]


class SelfTrainingSamples(IndexedSamples):
    """Labeled images and, from a step on, unlabeled ones. Epochs are those of the labeled images.

    Args:
        labeled, unlabeled: the samples.
        ratio: unlabeled images per labeled one.
        first: number of the first batch with unlabeled images.
    """

    def __init__(self, labeled: ImageSamples, unlabeled: ImageSamples, ratio: int, first: int) -> None:
        self.labeled, self.unlabeled, self.ratio, self.first = labeled, unlabeled, ratio, first
        self.seed = labeled.seed

    def __len__(self) -> int:
        return len(self.labeled)

    @property
    def num_images(self) -> int:
        return len(self.labeled) + len(self.unlabeled)

    @property
    def sources(self) -> tuple[datasets.Dataset, ...]:
        return (*self.labeled.sources, *self.unlabeled.sources)

    def part(self, key: Key) -> ImageSamples:
        """The samples that a key is of."""
        return self.unlabeled if key.unlabeled else self.labeled

    def __getitem__(self, key: Key) -> dict:
        return self.part(key)[key.key]

    def path_of(self, key: Key) -> str:
        return self.part(key).path_of(key.key)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0) -> Sampler:
        labeled = self.labeled.batches(batch_size, rank, world_size, start)
        unlabeled = self.unlabeled.batches(batch_size * self.ratio, rank, world_size, max(start - self.first, 0))
        return PairedBatches(labeled, unlabeled, max(self.first - start, 0))


class PairedBatches(Sampler):
    """Batches of labeled keys, followed by unlabeled ones after the first `num_alone` batches."""

    def __init__(self, labeled: Sampler, unlabeled: Sampler, num_alone: int) -> None:
        self.labeled, self.unlabeled, self.num_alone = labeled, unlabeled, num_alone

    def __iter__(self) -> Iterator[list[Key]]:
        unlabeled = iter(self.unlabeled)
        for number, keys in enumerate(self.labeled):
            batch = [Key(False, key) for key in keys]
            if number >= self.num_alone:
                batch += [Key(True, key) for key in next(unlabeled)]
            yield batch
