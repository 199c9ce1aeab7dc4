"""Losses of a detector: focal loss of classes, generalized overlap of boxes, centerness, and the dice loss of masks; sums,
with the count to divide by.

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
MAX_MASKS = 256  # learned of a batch, for the memory of their maps; CondInst's implementation has 500 at twice the stride
EPSILON = 1e-5  # of the dice loss, as in CondInst


class LossSums(NamedTuple):
    """Losses summed over points, each to be divided by the positive points of all devices and accumulated parts.

    Attributes:
        classes, boxes, centerness: scalars with gradients, also where there are no objects.
        num_positive: points with an object, a scalar without a gradient.
        masks: as the other losses; 0 where boxes alone are learned.
    """

    classes: Tensor
    boxes: Tensor
    centerness: Tensor
    num_positive: Tensor
    masks: Tensor

    @property
    def total(self) -> Tensor:
        """The weighted sum."""
        return self.classes + BOX_WEIGHT * self.boxes + self.centerness + self.masks


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
        sum_mask_losses(predictions, owner, positive, targets),
    )


def target_stride(stride: int) -> int:
    """The stride of the masks that are learned: half that of the features, if that is even, as the paper does."""
    return stride // 2 if stride % 2 == 0 else stride


def sum_mask_losses(predictions: Predictions, owner: Tensor, positive: Tensor, targets: Sequence[Targets]) -> Tensor:
    """The dice losses of the masks of all positive points, a scalar with a gradient, also where there are none.

    Of more than `MAX_MASKS` points some are evaluated, evenly spread over all, and count for the others.

    Args:
        owner, positive: (B, P), the number of the object of each point, and whether it has one.
        targets: of each image, with masks at `target_stride` of the features.
    """
    total = predictions.logits.new_zeros(())
    if predictions.mask_features is None:
        return total
    rows, points = positive.nonzero().unbind(dim=1)
    count = len(rows)
    if count > MAX_MASKS:
        chosen = torch.linspace(0, count - 1, MAX_MASKS, dtype=torch.float64).round().long().to(rows.device)
        rows, points = rows[chosen], points[chosen]
    factor = predictions.mask_stride // target_stride(predictions.mask_stride)
    for row, one in enumerate(targets):
        of_image = points[rows == row]
        masks = one.masks[~one.ignored][owner[row, of_image]]  # type: ignore[index]
        total = total + dice_losses(predictions.mask_logits(row, of_image), masks, factor).sum()
    return total * (count / max(1, len(rows)))


def dice_losses(logits: Tensor, wanted: Tensor, factor: int) -> Tensor:
    """1 − the dice coefficient of each of N masks, (N,) in [0, 1], with squares below as in the paper (equation 3).

    Args:
        logits: (N, H, W).
        wanted: (N, h, w) uint8, 0 to 255, of cells that are `factor` times finer and end with the image.
    """
    height, width = wanted.shape[1:]
    if factor > 1:
        logits = F.interpolate(logits[:, None], scale_factor=factor, mode="bilinear")[:, 0]
    found, known = logits[:, :height, :width].sigmoid().flatten(1), wanted.flatten(1).float() / 255
    both = (found * known).sum(dim=1)
    return 1 - 2 * both / (found.square().sum(dim=1) + known.square().sum(dim=1) + EPSILON)


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
