"""A dense model on images of any size: whole, or window by window with the windows' logits averaged.

Functions of a model from images, (B, channels, height, width) normalized, to logits, (B, K, H, W), at any resolution. Sizes
are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.finetune.dense.windows import WINDOWS_PER_FORWARD, Size, pad_to, passes_whole, windows_of

MAX_SCORES = 2**26  # logits resized at a time, 256 MiB in float32


def dense_logits(
    model: Callable[[Tensor], Tensor], images: Tensor, window: Size, inference: str = "auto", stride: int | None = None
) -> Tensor:
    """Logits for every pixel, (B, K, height, width) float32.

    Args:
        window: size of the images in training. Smaller images are padded to it, as in training: with the mean color, to the
            right and below.
        inference: whole; slide, window by window; or auto, which is whole where `passes_whole` says so.
        stride: as of `resize_logits`.
    """
    if inference == "auto":
        inference = "whole" if passes_whole(images, window) else "slide"
    height, width = images.shape[2:]
    padded = pad_to(images, window)
    logits = whole_logits(model, padded, stride) if inference == "whole" else sliding_logits(model, padded, window, stride)
    return logits[:, :, :height, :width]


def whole_logits(model: Callable[[Tensor], Tensor], images: Tensor, stride: int | None = None) -> Tensor:
    """Logits of one pass over whole images; `stride` as of `resize_logits`."""
    return resize_logits(model(images), images.shape[2:], stride)  # type: ignore[arg-type]


def sliding_logits(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    window: Size,
    stride: int | None = None,
    windows_per_forward: int = WINDOWS_PER_FORWARD,
) -> Tensor:
    """Logits of windows that overlap by a third or more and end at the images' edges, averaged where windows overlap.

    Args:
        images: not smaller than the window.
        stride: as of `resize_logits`.
        windows_per_forward: of all images together.
    """
    total, num_windows = None, images.new_zeros(images.shape[2:], dtype=torch.float32)
    for group, views in windows_of(images, window, windows_per_forward):
        logits = resize_logits(model(views), window, stride)
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
        for (top, left), part in zip(group, logits.split(len(images))):
            total[:, :, top : top + window[0], left : left + window[1]] += part
            num_windows[top : top + window[0], left : left + window[1]] += 1
    return total / num_windows


def resize_logits(logits: Tensor, size: Size, stride: int | None = None) -> Tensor:
    """Logits at another resolution, float32, by bilinear interpolation.

    Args:
        stride: pixels of `size` along a side of a cell. Where it does not divide an image, the last cells reach over its
            edge, and so do the logits before they are cut. By default they are of the image alone.
    """
    logits = logits.float()
    if stride is not None:
        covered = (logits.shape[2] * stride, logits.shape[3] * stride)
        return resize_logits(logits, covered)[:, :, : size[0], : size[1]]
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def most_likely_class(logits: Tensor, size: Size, max_scores: int = MAX_SCORES) -> Tensor:
    """The class of the highest logit after resizing to `size`, (B, height, width) int64; of equal ones the first.

    Args:
        max_scores: logits resized at a time, so that large photographs with many classes fit into memory.
    """
    group_size = max(1, max_scores // (len(logits) * math.prod(size)))
    best_logits, best_classes = None, None
    for first in range(0, logits.shape[1], group_size):
        highest, classes = resize_logits(logits[:, first : first + group_size], size).max(dim=1)
        if best_logits is None:
            best_logits, best_classes = highest, classes
        else:
            better = highest > best_logits
            best_logits = torch.where(better, highest, best_logits)
            best_classes = torch.where(better, classes + first, best_classes)
    return best_classes
