"""All random changes of a batch of labeled images, in order, on its device.

Colors change as bytes, before normalizing; movements are one warp; erasing and mixing come last. Each image's changes
follow from its seed, that is from (seed, epoch, index), and from nothing else, except for whom it is mixed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simmim.data import normalize
from simmim.finetune.augment.affine import AffineSettings, warp
from simmim.finetune.augment.color import ColorSettings, movements, recolor
from simmim.finetune.augment.erasing import erase
from simmim.finetune.augment.mixing import MixSettings, mix


@dataclass(frozen=True)
class BatchChanges:
    """What is done to a batch.

    Args:
        affine: small rotations, zooms, shears and shifts.
        color: RandAugment, movements included, and jitter.
        erasing: probability that a box of an image is erased.
        mixing: mixup and cutmix.
    """

    affine: AffineSettings = AffineSettings()
    color: ColorSettings = ColorSettings()
    erasing: float = 0.0
    mixing: MixSettings = MixSettings()

    def changed(self, images: Tensor, seeds: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Images changed one by one and normalized.

        Args:
            images: (B, channels, height, width) uint8.
            seeds: one an image.
            mean, std: one a channel, of values in [0, 1].
        """
        moved = None
        if self.color.active:
            changes = self.color.drawn(seeds, images.shape[1])
            images, moved = recolor(images, seeds, changes, self.color), movements(changes)
        images = normalize(images, mean, std)
        if self.affine.active or moved is not None:
            images = warp(images, self.matrices(seeds, moved))
        return erase(images, seeds, self.erasing) if self.erasing else images

    def matrices(self, seeds: Sequence[int], moved: Tensor | None) -> Tensor:
        """Affine changes and RandAugment's movements as one, (B, 2, 3)."""
        if moved is None:
            return self.affine.matrices(list(seeds))
        if not self.affine.active:
            return moved
        below = torch.tensor([0.0, 0.0, 1.0]).expand(len(seeds), 1, 3)
        first, second = (torch.cat((matrix, below), dim=1) for matrix in (self.affine.matrices(list(seeds)), moved))
        return (first @ second)[:, :2]

    def mixed(self, images: Tensor, targets: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and targets, (B, classes), mixed with their neighbors'; as they are where nothing is to be mixed."""
        if not self.mixing.active:
            return images, targets
        return mix(images, targets, [self.mixing.drawn(seed, *images.shape[-2:]) for seed in seeds])
