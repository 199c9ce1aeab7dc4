"""Arithmetic of boxes: (x1, y1, x2, y2) in pixels, exclusive, in tensors (…, 4)."""

from __future__ import annotations

import torch
from torch import Tensor


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
    boxes, classes = boxes[order], classes[order]
    removes = (overlaps(boxes[:, None], boxes[None]) > max_overlap) & (classes[:, None] == classes[None])
    # Row by row on the CPU: each decision depends on those before, and a GPU would wait for every one.
    rows, removed = removes.cpu().numpy(), torch.zeros(len(boxes), dtype=torch.bool)
    flags = removed.numpy()
    kept = []
    for row in range(len(rows)):
        if not flags[row]:
            kept.append(row)
            flags |= rows[row]
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]
