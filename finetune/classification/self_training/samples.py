"""Batches of labeled and unlabeled images."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Sampler

from simmim.data import ImageSamples, IndexedSamples, Picture


class UnlabeledSamples(ImageSamples):
    """Samples of unlabeled images with two views: `image` for the student, `weak` for the teacher. Their `label` is the true
    one where it is known, else −1.

    Args:
        source: columns `image`, undecoded, and `label`.
        view: of the student.
        weak_view: of the teacher.
        channels, seed, options: as of `ImageSamples`.
    """

    def __init__(
        self,
        source,
        view: Callable[[Picture, random.Random], Tensor],
        weak_view: Callable[[Picture, random.Random], Tensor],
        channels: int,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(source, view, channels, seed, **options)
        self.weak_view = weak_view

    def view_of(self, index: int, generator: random.Random) -> dict:
        """Both views of the image at `index`, and its label."""
        picture, label = self.load(index)
        image = self.view(picture, generator)
        # Crops that are as weak as the teacher's need no second one.
        weak = image if self.view == self.weak_view else self.weak_view(picture, generator)
        gray_copies = [self.name_of(index)] if picture.loses_color else []
        return {"image": image, "weak": weak, "label": label, "gray_copies": gray_copies}


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

    def __init__(self, labeled: ImageSamples, unlabeled: UnlabeledSamples, ratio: int, first: int) -> None:
        self.labeled, self.unlabeled, self.ratio, self.first = labeled, unlabeled, ratio, first
        self.seed = labeled.seed

    def __len__(self) -> int:
        return len(self.labeled)

    @property
    def num_images(self) -> int:
        return len(self.labeled) + len(self.unlabeled)

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
