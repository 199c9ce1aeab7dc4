"""Arithmetic of boxes: (x1, y1, x2, y2) in pixels, exclusive, in tensors (…, 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

COMPARED_AT_ONCE = 1000  # boxes, for the memory of their overlaps


def areas(boxes: Tensor) -> Tensor:
    """Area of each box, (…,)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union, (…,), of pairs that broadcast; 0 where both boxes are empty."""
    intersection, union = intersect(first, second)
    return intersection / union.clamp(min=1e-9)


def generalized_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Generalized intersection over union (arXiv 1902.09630), (…,) in (−1, 1], of pairs that broadcast."""
    intersection, union = intersect(first, second)
    hull = torch.cat([torch.minimum(first, second)[..., :2], torch.maximum(first, second)[..., 2:]], dim=-1)
    area = areas(hull).clamp(min=1e-9)
    return intersection / union.clamp(min=1e-9) - (area - union) / area


def intersect(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union."""
    corner = torch.maximum(first[..., :2], second[..., :2])
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - corner).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection, areas(first) + areas(second) - intersection


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, max_overlap: float) -> Tensor:
    """Indices of the boxes that remain, by falling score: greedily, each removes later ones of its class with which its
    intersection over union is above `max_overlap`.

    Args:
        boxes: (N, 4).
        scores, classes: (N,).
    """
    order = scores.argsort(descending=True, stable=True)
    remaining = order[:0]
    for some in order.split(COMPARED_AT_ONCE):
        some = some[~removes(boxes, classes, remaining, some, max_overlap).any(dim=0)]
        # Row by row on the CPU: each decision depends on those before, and a GPU would wait for every one.
        rows = removes(boxes, classes, some, some, max_overlap).cpu().numpy()
        removed: np.ndarray = np.zeros(len(some), dtype=bool)
        kept: list[int] = []
        for row in range(len(rows)):
            if not removed[row]:
                kept.append(row)
                removed |= rows[row]
        remaining = torch.cat([remaining, some[torch.tensor(kept, dtype=torch.long, device=order.device)]])
    return remaining


def removes(boxes: Tensor, classes: Tensor, first: Tensor, second: Tensor, max_overlap: float) -> Tensor:
    """Whether each of some boxes removes each of others, (N, M) bool, by their indices, (N,) and (M,)."""
    overlap = overlaps(boxes[first][:, None], boxes[second][None])
    return (overlap > max_overlap) & (classes[first][:, None] == classes[second][None])
