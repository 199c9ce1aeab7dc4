"""A dense model on images of any size: whole, or window by window with the windows' logits averaged.

Functions of a model that takes images, (B, channels, height, width) normalized, and gives logits, (B, K, H, W), at any
resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

OVERLAP = 1 / 3  # of neighboring windows' sides, as published for UPerNet on Swin
WHOLE_UP_TO = 4  # windows' areas that are still seen as a whole
WINDOWS_AT_ONCE = 8
SCORES_AT_ONCE = 2**26  # of enlarged logits, 256 MiB in float32


def dense_logits(model: Callable[[Tensor], Tensor], images: Tensor, window: Size, how: str = "auto") -> Tensor:
    """Logits for every pixel, (B, K, height, width) float32, by one of `whole`, `slide` and `auto`, which is whole for
    images of up to `WHOLE_UP_TO` windows.

    Args:
        window: (height, width) of the images in training, to which smaller ones are filled up, as there: with the mean
            color, to the right and below.
    """
    if how == "auto":
        how = "whole" if images[0, 0].numel() <= WHOLE_UP_TO * math.prod(window) else "slide"
    height, width = images.shape[2:]
    filled = filled_up(images, window)
    logits = whole_logits(model, filled) if how == "whole" else sliding_logits(model, filled, window)
    return logits[:, :, :height, :width]


def whole_logits(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """One pass over whole images."""
    return enlarged(model(images), images.shape[2:])


def sliding_logits(model: Callable[[Tensor], Tensor], images: Tensor, window: Size) -> Tensor:
    """Windows that overlap by a third or more and end at the images' edges; where several see a pixel, their mean.

    Args:
        images: not smaller than the window.
    """
    corners = [
        (top, left)
        for top in window_starts(images.shape[2], window[0])
        for left in window_starts(images.shape[3], window[1])
    ]
    at_once = max(1, WINDOWS_AT_ONCE // len(images))
    total, seen = None, images.new_zeros(images.shape[2:], dtype=torch.float32)
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        views = torch.cat([images[:, :, top : top + window[0], left : left + window[1]] for top, left in some])
        logits = enlarged(model(views), window)
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
        for (top, left), part in zip(some, logits.split(len(images))):
            total[:, :, top : top + window[0], left : left + window[1]] += part
            seen[top : top + window[0], left : left + window[1]] += 1
    return total / seen


def window_starts(side: int, window: int) -> list[int]:
    """Where windows begin along a side so that they cover it: evenly spread, neighbors overlapping by `OVERLAP` or more."""
    if side <= window:
        return [0]
    count = math.ceil((side - window) / max(1, math.floor(window * (1 - OVERLAP)))) + 1
    return [round(index * (side - window) / (count - 1)) for index in range(count)]


def filled_up(images: Tensor, size: Size) -> Tensor:
    """Normalized images with zeros, the mean color, to the right and below until they are no smaller than `size`."""
    missing = [max(0, side - have) for side, have in zip(size, images.shape[2:])]
    return F.pad(images, (0, missing[1], 0, missing[0])) if any(missing) else images


def enlarged(logits: Tensor, size: Size) -> Tensor:
    """Logits at another resolution, (height, width), float32."""
    logits = logits.float()
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def best_class(logits: Tensor, size: Size) -> Tensor:
    """The class of the highest logit after enlarging to `size`, (B, height, width) int64, the first of equals.

    So many classes at a time that large photographs with many classes fit into memory.
    """
    at_once = max(1, SCORES_AT_ONCE // (len(logits) * math.prod(size)))
    best, chosen = None, None
    for first in range(0, logits.shape[1], at_once):
        highest, which = enlarged(logits[:, first : first + at_once], size).max(dim=1)
        if best is None:
            best, chosen = highest, which
        else:
            better = highest > best
            best = torch.where(better, highest, best)
            chosen = torch.where(better, which + first, chosen)
    return chosen
