"""Losses of a detector: focal loss of classes, generalized overlap of boxes, centerness; sums, with the count to divide by.

Shape letters: B images, P points, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.finetune.detection.assignment import BACKGROUND, assign_points
from simmim.finetune.detection.boxes import generalized_overlaps
from simmim.finetune.detection.pyramid import Predictions
from simmim.finetune.detection.views import Targets

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (arXiv 1708.02002), as published
BOX_WEIGHT = 2.0  # of the overlap's loss beside the others, as in ATSS


class LossSums(NamedTuple):
    """Losses summed over points, each to be divided by the positive points of all devices and accumulated parts.

    Attributes:
        classes, boxes, centerness: scalars with gradients, also where there are no objects.
        num_positive: points with an object, a scalar without a gradient.
    """

    classes: Tensor
    boxes: Tensor
    centerness: Tensor
    num_positive: Tensor

    @property
    def total(self) -> Tensor:
        """The weighted sum."""
        return self.classes + BOX_WEIGHT * self.boxes + self.centerness


def sum_losses(predictions: Predictions, targets: Sequence[Targets]) -> LossSums:
    """Losses of B images.

    Points without an object inside the box of an ignored one are not background: they have no class loss.

    Args:
        targets: of each image, on the device of the predictions.
    """
    owners, objects = [], []
    for one in targets:
        found, ignored = one.boxes[~one.ignored], one.boxes[one.ignored]
        owner = assign_points(predictions.points, predictions.strides, point_counts(predictions), found)
        covered = inside_any(predictions.points, ignored) & (owner == BACKGROUND)
        owners.append((owner, covered))
        objects.append((found, one.classes[~one.ignored]))
    owner, covered = (torch.stack(parts) for parts in zip(*owners))
    positive = owner != BACKGROUND
    wanted = torch.zeros_like(predictions.logits)
    boxes = predictions.distances.new_zeros((*positive.shape, 4))
    for row, (found, classes) in enumerate(objects):
        points = positive[row].nonzero()[:, 0]
        wanted[row, points, classes[owner[row, points]]] = 1
        boxes[row, points] = found[owner[row, points]].to(boxes)
    predicted, boxes = predictions.boxes()[positive], boxes[positive]
    points = predictions.points.expand(len(targets), -1, -1)[positive]
    return LossSums(
        focal_loss(predictions.logits, wanted)[~covered].sum(),
        (1 - generalized_overlaps(predicted, boxes)).sum(),
        F.binary_cross_entropy_with_logits(predictions.centerness[positive], centerness(points, boxes), reduction="sum"),
        positive.sum(),
    )


def point_counts(predictions: Predictions) -> list[int]:
    """Number of points of each level."""
    return [height * width for height, width in predictions.sizes]


def inside_any(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether each point, (P, 2), lies inside one of some boxes; (P,) bool."""
    inside = (points[:, None] > boxes[None, :, :2]) & (points[:, None] < boxes[None, :, 2:])
    return inside.all(dim=-1).any(dim=-1)


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss of each class, of the shape of the logits (arXiv 1708.02002, equation 5).

    Args:
        wanted: 1 for the class of the object, else 0.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probability = logits.sigmoid()
    missed = torch.where(wanted > 0, 1 - probability, probability)
    return torch.where(wanted > 0, ALPHA, 1 - ALPHA) * missed**GAMMA * entropy


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How near to the center of its box each point is, 1 there and 0 on a side or outside (FCOS, equation 3).

    Args:
        points: (N, 2).
        boxes: (N, 4).
    """
    before, after = (points - boxes[:, :2]).clamp(min=0), (boxes[:, 2:] - points).clamp(min=0)
    ratio = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)
    return ratio.prod(dim=1).sqrt()
