"""Mixup and cutmix (arXiv 1710.09412, 1905.04899): images are blended or pasted into one another, and their targets are
mixed in the same shares.

Share and box of each image are drawn from its seed. It is mixed with its neighbor in the batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """How one image is mixed.

    Attributes:
        share: its own share, in [0, 1]; the rest is its neighbor's.
        box: top, left, bottom and right in pixels of the part that the neighbor fills; None where the two are blended.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class MixSettings:
    """How images are mixed; mixup and cutmix both zero for no mixing.

    Args:
        mixup, cutmix: α of the distribution Beta(α, α) of the shares. Where both are set, each is applied to half of the
            images.
        probability: share of the images that are mixed.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    @property
    def active(self) -> bool:
        """Whether images are mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0

    def draw(self, seed: int, height: int, width: int) -> Mix:
        """The mix of the image with a seed.

        Args:
            height, width: of the image in pixels.
        """
        generator = random.Random(f"{seed}/mix")
        if generator.random() >= self.probability:
            return Mix(1.0)
        if self.cutmix > 0 and (self.mixup <= 0 or generator.random() < 0.5):
            return draw_cut(generator.betavariate(self.cutmix, self.cutmix), generator, height, width)
        return Mix(generator.betavariate(self.mixup, self.mixup))


def draw_cut(share: float, generator: random.Random, height: int, width: int) -> Mix:
    """A box of the image's shape and of 1 − `share` of its area, around a random point. It is clipped at the edges; the
    resulting share is that of the pixels outside the box."""
    side = math.sqrt(1 - share)
    rows, columns = int(height * side), int(width * side)
    top, left = generator.randrange(height) - rows // 2, generator.randrange(width) - columns // 2
    bottom, right = min(top + rows, height), min(left + columns, width)
    top, left = max(top, 0), max(left, 0)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def mix(images: Tensor, targets: Tensor, mixes: Sequence[Mix]) -> tuple[Tensor, Tensor]:
    """Mix each image with the one before it in the batch, and their targets in the same shares.

    Args:
        images: (B, channels, height, width), float.
        targets: (B, classes), shares of the classes.
        mixes: one per image.
    """
    height, width = images.shape[-2:]
    blend_shares = torch.tensor([1.0 if one.box else one.share for one in mixes], device=images.device)
    boxes = torch.tensor([one.box or (0, 0, 0, 0) for one in mixes], device=images.device)
    shares = torch.tensor([one.share for one in mixes], device=images.device)
    neighbors = images.roll(1, 0)
    blended = torch.lerp(neighbors, images, blend_shares.to(images.dtype).view(-1, 1, 1, 1))
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    inside = ((rows >= top) & (rows < bottom))[:, None, :, None] & ((columns >= left) & (columns < right))[:, None, None, :]
    mixed = torch.where(inside, neighbors, blended)
    return mixed, torch.lerp(targets.roll(1, 0), targets, shares.to(targets.dtype)[:, None])
