"""Random erasing (arXiv 1708.04896): a rectangle of noise in some images of the batch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

# Share of the image's area, and height over width, as published.
AREA, RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
MAX_DRAWS = 10


def draw_box(seed: int, probability: float, height: int, width: int) -> tuple[int, int, int, int] | None:
    """The box of an image that is erased.

    Args:
        probability: that a box is erased.
        height, width: of the image in pixels.

    Returns:
        Top, left, height and width in pixels; None for no box, by chance or as none of `MAX_DRAWS` fits.
    """
    generator = random.Random(f"{seed}/erasing")
    if generator.random() >= probability:
        return None
    for _ in range(MAX_DRAWS):
        area = height * width * generator.uniform(*AREA)
        ratio = math.exp(generator.uniform(*map(math.log, RATIO)))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            return generator.randint(0, height - rows), generator.randint(0, width - columns), rows, columns
    return None


def erase(images: Tensor, seeds: Sequence[int], probability: float) -> Tensor:
    """Images with normal noise in their boxes.

    Args:
        images: (B, channels, height, width), normalized, so that the noise has their deviation.
        seeds: one per image, for box and noise.
        probability: share of the images that have a box.
    """
    boxes = [draw_box(seed, probability, *images.shape[-2:]) for seed in seeds]
    if not any(boxes):
        return images
    images = images.clone()
    for row, box in enumerate(boxes):
        if box is not None:
            top, left, rows, columns = box
            # On the CPU: the same noise on every kind of device.
            generator = torch.Generator().manual_seed(random.Random(f"{seeds[row]}/noise").getrandbits(62))
            noise = torch.randn(images.shape[1], rows, columns, generator=generator)
            images[row, :, top : top + rows, left : left + columns] = noise.to(images, non_blocking=True)
    return images
