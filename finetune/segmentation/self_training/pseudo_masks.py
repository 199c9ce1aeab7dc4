"""Label maps that a teacher predicts, and how they are pasted into one another.

Shapes: U unlabeled images, P of them with a partner; K classes; (height, width) of the views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from simmim.finetune.segmentation.sliding import MAX_SCORES, resize_logits
from simmim.finetune.self_training.pseudo_labels import (
    LEAST_SHARE,
    MEANS_DECAY,
    PseudoLabeler,
    sum_and_count,
    update_mean,
)


class PixelProbabilities:
    """The classes' probabilities of the pixels that are inside of images, (pixels, K) in parts, some images at a time.

    They are computed anew each time they are iterated over, as those of large images with many classes would not fit into
    memory together.

    Args:
        logits: (B, K, h, w) at any resolution; resized to that of `inside`.
        inside: (B, height, width) bool, the pixels that count.
        stride: as of `resize_logits`.
        max_scores: logits resized at a time.
    """

    def __init__(self, logits: Tensor, inside: Tensor, stride: int | None = None, max_scores: int = MAX_SCORES) -> None:
        self.logits, self.inside, self.stride = logits, inside, stride
        self.images_at_once = max(1, max_scores // (logits.shape[1] * math.prod(inside.shape[1:])))

    def __iter__(self) -> Iterator[Tensor]:
        for logits, inside in zip(self.logits.split(self.images_at_once), self.inside.split(self.images_at_once)):
            probabilities = resize_logits(logits, inside.shape[1:], self.stride).softmax(dim=1)  # type: ignore[arg-type]
            yield probabilities.permute(0, 2, 3, 1)[inside]


class PixelLabeler(PseudoLabeler):
    """`PseudoLabeler` whose c is of each class: the mean confidence on labeled pixels that are predicted as it.

    Pixels of small or thin objects are never as sure as those of the background: with one c for all, nothing but the largest
    class would be learned from (class-balanced self-training, arXiv 1810.07911, has a threshold for each class for the same
    reason). A class that is predicted for no labeled pixel has the c of all classes.

    Args:
        num_classes, target, decay, aligned: as of `PseudoLabeler`.
    """

    confidence_by_class: Tensor
    predicted_shares: Tensor

    def __init__(self, num_classes: int, target: Tensor, decay: float = MEANS_DECAY, aligned: bool = True) -> None:
        super().__init__(num_classes, target, decay, aligned)
        # Of all labeled pixels: the sum of the confidence of those predicted as a class, and their share.
        self.register_buffer("confidence_by_class", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("predicted_shares", torch.full((num_classes,), 1 / num_classes))

    def update_confidence(self, labeled: Iterable[Tensor], total: Callable[[Tensor], Tensor], decay: Tensor) -> None:
        """As of `PseudoLabeler`, for each class too."""
        super().update_confidence(labeled, total, decay)
        sums = total(sum_and_count(self.predicted(part) for part in labeled))
        update_mean(self.confidence_by_class, sums[[*range(self.num_classes), -1]], decay)
        update_mean(self.predicted_shares, sums[self.num_classes :], decay)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.predicted_shares)

    def predicted(self, probabilities: Tensor) -> Tensor:
        """For each pixel the confidence in the class that is predicted, and 1 for it: (pixels, 2 · classes)."""
        likeliest = probabilities == probabilities.amax(dim=1, keepdim=True)
        return torch.cat([probabilities * likeliest, likeliest.to(probabilities)], dim=1)

    def confidence(self) -> Tensor:
        """(classes,)."""
        own = self.confidence_by_class / self.predicted_shares.clamp(min=LEAST_SHARE)
        return torch.where(self.predicted_shares > LEAST_SHARE, own, self.labeled_confidence)


def paste_boxes(
    images: Tensor, masks: Tensor, partners: Tensor, partner_masks: Tensor, boxes: Tensor, ignored_id: int
) -> tuple[Tensor, Tensor]:
    """Images and label maps with the boxes of their partners, where these hold a pixel that is not ignored.

    Args:
        images: (U, channels, height, width).
        masks: (U, height, width), class ids and `ignored_id`.
        partners, partner_masks: (P, …), of the images whose boxes are not empty, in order.
        boxes: (U, 4), top, left, bottom and right in pixels.
    """
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    rows, columns = (torch.arange(side, device=images.device) for side in masks.shape[1:])
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    mixed = (boxes[:, 2] > boxes[:, 0]).nonzero()[:, 0]
    inside = inside[mixed]
    # A box of pixels that teach nothing would only hide what does.
    inside &= (inside & (partner_masks != ignored_id)).any(dim=(1, 2), keepdim=True)
    images, masks = images.clone(), masks.clone()
    images[mixed] = torch.where(inside[:, None], partners, images[mixed])
    masks[mixed] = torch.where(inside, partner_masks, masks[mixed])
    return images, masks
