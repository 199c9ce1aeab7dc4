"""Which point learns which object: ATSS (arXiv 1912.02424), whose threshold follows from each object's own candidates.

Shape letters: P points of all levels, N objects, M candidates of an object.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmim.finetune.detection.boxes import overlaps
from simmim.finetune.detection.pyramid import ANCHOR_CELLS

CANDIDATES = 9  # of each level, as published
BACKGROUND = -1


def assign_points(points: Tensor, strides: Tensor, level_sizes: Sequence[int], boxes: Tensor) -> Tensor:
    """The object of each point, (P,) int64 in 0 … N − 1, or `BACKGROUND`.

    Of each level the points nearest to the object's center are its candidates. Those are taken that lie inside the box and
    whose anchor, a square around the point, overlaps it by no less than mean plus standard deviation over the candidates.
    A point that several objects want goes to the one that its anchor overlaps most. An object that gets none, for being
    smaller than a cell for instance, takes its best candidate: no object goes unlearned, which the paper does not promise.

    Args:
        points: (P, 2), (x, y) in pixels, level by level.
        strides: (P,), pixels per cell.
        level_sizes: number of points of each level.
        boxes: (N, 4).
    """
    if not len(boxes):
        return torch.full((len(points),), BACKGROUND, dtype=torch.long, device=points.device)
    candidates = nearest_points(points, level_sizes, boxes)
    half = (ANCHOR_CELLS / 2 * strides)[candidates, None]
    near = points[candidates]
    overlap = overlaps(torch.cat([near - half, near + half], dim=-1), boxes[:, None])  # (N, M)
    threshold = overlap.mean(dim=1) + (overlap.std(dim=1) if overlap.shape[1] > 1 else 0)
    inside = ((near > boxes[:, None, :2]) & (near < boxes[:, None, 2:])).all(dim=-1)
    taken = (overlap >= threshold[:, None]) & inside
    wishes = torch.full((len(boxes), len(points)), -1.0, device=points.device)
    wishes.scatter_(1, candidates, torch.where(taken, overlap, -1.0))
    strength, objects = wishes.max(dim=0)
    objects[strength < 0] = BACKGROUND
    give_each_a_point(objects, candidates, overlap + inside)
    return objects


def nearest_points(points: Tensor, level_sizes: Sequence[int], boxes: Tensor) -> Tensor:
    """The candidates of each object, (N, M): of each level the `CANDIDATES` points nearest to its center."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = (points - centers[:, None]).square().sum(dim=-1)
    candidates, first = [], 0
    for count in level_sizes:
        nearest = distances[:, first : first + count].topk(min(CANDIDATES, count), dim=1, largest=False).indices
        candidates.append(nearest + first)
        first += count
    return torch.cat(candidates, dim=1)


def give_each_a_point(objects: Tensor, candidates: Tensor, merit: Tensor) -> None:
    """Give every object that has no point the best candidate that is free, or that its object can spare; in place.

    Args:
        objects: of each point, (P,).
        candidates, merit: (N, M).
    """
    counts = torch.bincount(objects[objects >= 0], minlength=len(candidates))
    for number in (counts == 0).nonzero()[:, 0].tolist():
        order = candidates[number, merit[number].argsort(descending=True, stable=True)]
        for point in order.tolist():
            owner = int(objects[point])
            if owner == BACKGROUND or counts[owner] > 1:
                if owner != BACKGROUND:
                    counts[owner] -= 1
                objects[point], counts[number] = number, 1
                break
