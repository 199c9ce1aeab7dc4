"""Patch-aligned random masking with a masked patch size larger than the encoder's patches (SimMIM, arXiv 2111.09886,
section 3.2).

The image is divided into square mask units, "masked patches" in the paper. A fixed number of randomly chosen units is masked
in every image. The mask is returned at the resolution of the encoder's patches.
True = masked: replaced by the mask token, and predicted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simmim.encoders.base import MAX_GROUPS
from simmim.messages import counted


@dataclass(frozen=True)
class BlockMasking:
    """Draws random masks made of square mask units.

    Args:
        unit_px: side of a mask unit (the paper's masked patch size) in pixels, a multiple of the patch size; 32 at 192 px in
            the paper.
        ratio: mask ratio, in (0, 1): share of the units that are masked; their number is rounded up.
        patch_size: side of the encoder's patches in pixels.

    Raises:
        ValueError: when an argument is out of range or the unit is no multiple of the patch size.
    """

    unit_px: int = 32
    ratio: float = 0.6
    patch_size: int = 4

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise ValueError(f"patch size is {self.patch_size} px: give a positive number of pixels")
        if self.unit_px < 1 or self.unit_px % self.patch_size:
            below = max(self.unit_px // self.patch_size, 1) * self.patch_size
            raise ValueError(
                f"mask unit is {self.unit_px} px and patches are {self.patch_size} px: "
                f"give a multiple of the patch size, for instance {below} or {below + self.patch_size}"
            )
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"mask ratio is {self.ratio}: give a number between 0 and 1, for example 0.6 as in the paper")

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Number of mask units per column and per row of an image: (rows, columns).

        Args:
            image_size: (height, width) in pixels.

        Raises:
            ValueError: when the unit does not divide both sides; the message lists units that do.
        """
        return unit_grid(image_size, self.unit_px, self.patch_size)

    def num_masked_units(self, image_size: tuple[int, int]) -> int:
        """Number of masked units per image: ⌈ratio · number of units⌉.

        Args:
            image_size: (height, width) in pixels.

        Raises:
            ValueError: when all units would be masked, or the unit does not divide the image.
        """
        rows, columns = self.grid(image_size)
        # Rounded before the ceiling: 0.07 · 100 is 7.000000000000001 in floating point, and must mask 7 units, not 8.
        num_masked = math.ceil(round(self.ratio * rows * columns, 9))
        if num_masked >= rows * columns:
            raise ValueError(
                f"mask ratio {self.ratio} masks all {rows * columns} units of {self.unit_px} px in an image of "
                f"{image_size[0]}×{image_size[1]} px: give a smaller unit or ratio"
            )
        return num_masked

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator, seeds: list[int] | None = None
    ) -> Tensor:
        """Draw an independent mask for each image of a batch, on the generator's device.

        Args:
            image_size: (height, width) in pixels.
            generator: the only source of randomness.
            seeds: one per image. The generator is seeded with each in turn, so that the mask of an image does not depend on
                its batch.

        Returns:
            (batch_size, height / patch_size, width / patch_size) bool, True = masked.

        Raises:
            ValueError: for another number of seeds than images, and as `num_masked_units`.
        """
        rows, columns = self.grid(image_size)
        num_masked = self.num_masked_units(image_size)
        noise = torch.empty(batch_size, rows * columns, device=generator.device)
        if seeds is None:
            noise.uniform_(generator=generator)
        elif len(seeds) != batch_size:
            raise ValueError(f"{len(seeds)} seeds for {counted(batch_size, 'image')}: give one per image")
        else:
            for row, seed in zip(noise, seeds, strict=True):
                row.uniform_(generator=generator.manual_seed(seed))
        # The units with the smallest noise are masked: a uniformly random choice of exactly `num_masked` units.
        unit_mask = torch.zeros_like(noise, dtype=torch.bool)
        unit_mask.scatter_(1, noise.argsort(dim=1)[:, :num_masked], True)
        patches_per_side = self.unit_px // self.patch_size
        return enlarge(unit_mask.view(batch_size, rows, columns), patches_per_side)


@dataclass(frozen=True)
class SharedCanvas:
    """How the units of a canvas are dealt out to the images that share it, at random and in equal parts.

    Every unit is visible in exactly one of the images, with the same probability for each. Where the parts cannot be equal,
    they differ by one unit, and chance decides who has more.

    Args:
        share: images on a canvas, 2 to `MAX_GROUPS`.
        unit_px: side of a mask unit in pixels; a multiple of `stride`.
        patch_size: side of the encoder's patches in pixels.
        stride: pixels per token of the last map that is shared. A token must not hold pixels of two images.

    Raises:
        ValueError: for a share or unit that cannot work, saying what would.
    """

    share: int
    unit_px: int
    patch_size: int
    stride: int

    def __post_init__(self) -> None:
        check_share(self.share)
        if self.unit_px < 1 or self.unit_px % self.stride:
            above = max(-(-self.unit_px // self.stride), 1) * self.stride
            raise ValueError(
                f"model.mask_unit is {self.unit_px} px and the last stage on canvases has a token for {self.stride} px: "
                f"give a multiple of {self.stride} px, for instance {above}, or fewer stages"
            )

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of mask units in an image of (height, width) pixels.

        Raises:
            ValueError: when the unit does not divide the image, or there are fewer units than images.
        """
        rows, columns = unit_grid(image_size, self.unit_px, self.stride)
        if rows * columns < self.share:
            raise ValueError(
                f"model.share is {self.share} and images of {image_size[0]}×{image_size[1]} px have {rows * columns} mask "
                f"unit{'s' * (rows * columns > 1)} of {self.unit_px} px: give a smaller model.share or model.mask_unit"
            )
        return rows, columns

    def num_masked_units(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The smallest and the largest number of units that an image lacks."""
        units = math.prod(self.grid(image_size))
        return units - -(-units // self.share), units - units // self.share

    def draw(self, image_size: tuple[int, int], seeds: Sequence[int], device: torch.device) -> Tensor:
        """Masks of a batch. `share` consecutive images are on a canvas, fewer at the end, and their seeds decide.

        Returns:
            (len(seeds), height / patch, width / patch) bool, True = masked.
        """
        rows, columns = self.grid(image_size)
        generator = torch.Generator(device)
        canvases = [seeds[first : first + self.share] for first in range(0, len(seeds), self.share)]
        noise = torch.empty(len(canvases), rows * columns + 1, device=device)
        for row, own in zip(noise, canvases):
            # Hashed: sums and differences of seeds coincide more often than chance has it.
            seed = random.Random("/".join(map(str, own))).getrandbits(62)
            row.uniform_(generator=generator.manual_seed(seed))
        ranks = noise[:, :-1].argsort(dim=1).argsort(dim=1)
        first_image = (noise[:, -1:] * self.share).long()  # the first image to get a unit may get one more
        owners = (ranks + first_image) % self.share
        masked = owners[:, None] != torch.arange(self.share, device=device)[:, None]
        return enlarge(masked.view(-1, rows, columns)[: len(seeds)], self.unit_px // self.patch_size)


def check_share(share: int) -> None:
    """Check the number of images on a canvas.

    Raises:
        ValueError: for one that is out of range.
    """
    if not 2 <= share <= MAX_GROUPS:
        raise ValueError(f"model.share is {share}: give the number of images on a canvas, 2 to {MAX_GROUPS}")


def unit_grid(image_size: tuple[int, int], unit_px: int, step_px: int) -> tuple[int, int]:
    """Rows and columns of mask units in an image of (height, width) pixels.

    Args:
        step_px: of which units are multiples.

    Raises:
        ValueError: when the unit does not divide the image, naming units that do.
    """
    height, width = image_size
    if height < 1 or width < 1 or height % unit_px or width % unit_px:
        sides = [unit for unit in range(1, min(height, width) + 1) if not height % unit and not width % unit]
        fitting = [unit for unit in sides if unit % step_px == 0 and unit < max(height, width)]
        hint = f"units that do: {', '.join(map(str, fitting))}" if fitting else "choose another image size"
        raise ValueError(f"mask unit of {unit_px} px does not divide an image of {height}×{width} px; {hint}")
    return height // unit_px, width // unit_px


def enlarge(maps: Tensor, scale: int) -> Tensor:
    """(B, H, W) to (B, scale · H, scale · W): every element becomes a square."""
    return maps.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
