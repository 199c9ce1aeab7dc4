"""Images of any size, whole or window by window. Sizes are (height, width)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

OVERLAP = 1 / 3  # of the sides of neighboring windows, as published for UPerNet on Swin
MAX_WHOLE_AREA = 4  # in windows; larger images are not passed as a whole
WINDOWS_PER_FORWARD = 8


def passes_whole(images: Tensor, window: Size) -> bool:
    """Whether images, (B, channels, height, width), are small enough to be passed as a whole."""
    return images[0, 0].numel() <= MAX_WHOLE_AREA * math.prod(window)


def windows_of(
    images: Tensor, window: Size, windows_per_forward: int = WINDOWS_PER_FORWARD
) -> Iterator[tuple[list[Size], Tensor]]:
    """The windows that cover images, some at a time: their corners, (top, left), and the views, (corners × B, channels,
    height, width), all images of a corner together.

    Args:
        images: (B, channels, height, width), not smaller than the window.
        windows_per_forward: of all images together.
    """
    corners = [
        (top, left)
        for top in window_starts(images.shape[2], window[0])
        for left in window_starts(images.shape[3], window[1])
    ]
    per_forward = max(1, windows_per_forward // len(images))
    for first in range(0, len(corners), per_forward):
        group = corners[first : first + per_forward]
        yield group, torch.cat([images[:, :, top : top + window[0], left : left + window[1]] for top, left in group])


def window_starts(side: int, window: int) -> list[int]:
    """First pixels of windows that cover a side: evenly spread, neighbors overlapping by `OVERLAP` or more."""
    if side <= window:
        return [0]
    count = math.ceil((side - window) / max(1, math.floor(window * (1 - OVERLAP)))) + 1
    return [round(index * (side - window) / (count - 1)) for index in range(count)]


def pad_to(images: Tensor, size: Size) -> Tensor:
    """Normalized images padded with zeros, the mean color, to the right and below, to no less than `size`."""
    padding = [max(0, wanted - side) for wanted, side in zip(size, images.shape[2:])]
    return F.pad(images, (0, padding[1], 0, padding[0])) if any(padding) else images
