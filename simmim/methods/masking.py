"""Random block masks (SimMIM, arXiv 2111.09886, section 3.2).

The image is cut into square mask units, a fixed share of them is hidden, and the mask is handed on at patch resolution.
In every function here True means masked: hidden from the encoder, to be predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMasking:
    """How masks are drawn.

    Args:
        unit_px: side of a mask unit in pixels; a multiple of the patch size. The paper's 32 suits images of 192 px.
        ratio: share of the units that is hidden, in (0, 1); rounded up to whole units.
        patch_size: side of the encoder's patches in pixels.

    Raises:
        ValueError: for a unit, ratio or patch size that cannot work, saying what would.
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
            raise ValueError(f"mask ratio is {self.ratio}: give a share between 0 and 1, 0.6 in the paper")

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of mask units in an image of (height, width) pixels.

        Raises:
            ValueError: when the unit does not divide the image, naming units that do.
        """
        height, width = image_size
        if height < 1 or width < 1 or height % self.unit_px or width % self.unit_px:
            sides = [unit for unit in range(1, min(height, width) + 1) if not height % unit and not width % unit]
            fitting = [unit for unit in sides if unit % self.patch_size == 0 and unit < max(height, width)]
            hint = f"units that do: {', '.join(map(str, fitting))}" if fitting else "choose another image size"
            raise ValueError(f"mask unit of {self.unit_px} px does not divide an image of {height}×{width} px; {hint}")
        return height // self.unit_px, width // self.unit_px

    def num_masked_units(self, image_size: tuple[int, int]) -> int:
        """Units hidden in each image: ⌈ratio · units⌉.

        Raises:
            ValueError: when that leaves nothing visible, or the unit does not divide the image.
        """
        rows, columns = self.grid(image_size)
        # Rounded before the ceiling: 0.6 · 10 must hide 6 units, also where the product comes to 6.000000000000001.
        count = math.ceil(round(self.ratio * rows * columns, 9))
        if count >= rows * columns:
            raise ValueError(
                f"mask ratio {self.ratio} hides all {rows * columns} units of {self.unit_px} px in an image of "
                f"{image_size[0]}×{image_size[1]} px: give a smaller unit or ratio"
            )
        return count

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator, seeds: list[int] | None = None
    ) -> Tensor:
        """Masks of a batch, each image its own, on the generator's device.

        Args:
            image_size: (height, width) in pixels.
            generator: the only source of randomness.
            seeds: one per image. The generator is seeded for each, so that an image's mask does not depend on the
                batch it is in.

        Returns:
            (batch_size, height / patch, width / patch) bool, True = masked.
        """
        rows, columns = self.grid(image_size)
        count = self.num_masked_units(image_size)
        noise = torch.empty(batch_size, rows * columns, device=generator.device)
        if seeds is None:
            noise.uniform_(generator=generator)
        elif len(seeds) != batch_size:
            raise ValueError(f"{len(seeds)} seeds for {batch_size} images: give one an image")
        else:
            for row, seed in zip(noise, seeds, strict=True):
                row.uniform_(generator=generator.manual_seed(seed))
        masked = torch.zeros_like(noise, dtype=torch.bool)
        masked.scatter_(1, noise.argsort(dim=1)[:, :count], True)
        scale = self.unit_px // self.patch_size
        units = masked.view(batch_size, rows, columns)
        return units.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
