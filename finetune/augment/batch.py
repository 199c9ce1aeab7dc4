"""All random changes of a batch of labeled images, in order, on its device.

Colors change before images are normalized; all movements are one warp; erasing and mixing come last. The changes of an image
follow from its seed, that is from (seed, epoch, index), and from nothing else, apart from the neighbor it is mixed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simmim.data import normalize
from simmim.finetune.augment.affine import AffineSettings, warp
from simmim.finetune.augment.color import ColorSettings, movement_matrices, recolor
from simmim.finetune.augment.erasing import erase
from simmim.finetune.augment.mixing import MixSettings, mix


@dataclass(frozen=True)
class BatchChanges:
    """The random changes of a batch.

    Args:
        affine: small rotations, zooms, shears and shifts.
        color: RandAugment, its movements included, and jitter.
        erasing: probability that a box of an image is erased.
        mixing: mixup and cutmix.
    """

    affine: AffineSettings = AffineSettings()
    color: ColorSettings = ColorSettings()
    erasing: float = 0.0
    mixing: MixSettings = MixSettings()

    def augment(self, images: Tensor, seeds: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Change each image on its own, and normalize.

        Args:
            images: (B, channels, height, width), uint8, or shares in [0, 1] with NaN where there is no data.
            seeds: one per image.
            mean, std: one per channel, of values in [0, 1].

        Returns:
            The same shape, float.
        """
        movements = None
        if self.color.active:
            changes = self.color.draw_changes(seeds, images.shape[1])
            images, movements = recolor(images, seeds, changes, self.color, mean), movement_matrices(changes)
        images = normalize(images, mean, std)
        if self.affine.active or movements is not None:
            images = warp(images, self.matrices(seeds, movements))
        return erase(images, seeds, self.erasing) if self.erasing else images

    def matrices(self, seeds: Sequence[int], movements: Tensor | None) -> Tensor:
        """Affine changes and RandAugment's movements as one matrix per image, (B, 2, 3).

        Args:
            movements: (B, 2, 3); None for none.
        """
        if movements is None:
            return self.affine.matrices(list(seeds))
        if not self.affine.active:
            return movements
        last_row = torch.tensor([0.0, 0.0, 1.0]).expand(len(seeds), 1, 3)
        first, second = (torch.cat((matrix, last_row), dim=1) for matrix in (self.affine.matrices(list(seeds)), movements))
        return (first @ second)[:, :2]

    def mix(self, images: Tensor, targets: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mix images, and targets of (B, classes), with those of their neighbors where mixing is set."""
        if not self.mixing.active:
            return images, targets
        return mix(images, targets, [self.mixing.draw(seed, *images.shape[-2:]) for seed in seeds])
