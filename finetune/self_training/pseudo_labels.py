"""Which unlabeled images, or pixels of them, get which label: distribution alignment, then a threshold for each class.

What is labeled is called an item here: an image in classification, a pixel in segmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

RELATIVE_THRESHOLD = 0.95
LEAST_SHARE = 1e-4  # of a class in the running mean of the predictions, so that no prediction is multiplied by infinity
MEANS_DECAY = 0.98  # of the running means of predictions and confidence: over about 50 batches


class PseudoLabels(NamedTuple):
    """The labels of U unlabeled items.

    Attributes:
        labels: (U,) int64, the likeliest class after alignment.
        confidence: (U,) float, its probability.
        confident: (U,) bool, whether the item is learned from.
    """

    labels: Tensor
    confidence: Tensor
    confident: Tensor


class PseudoLabeler(nn.Module):
    """Labels unlabeled items by the teacher's predictions.

    With running means p̄ of its predictions p for unlabeled items, q̄ of the aligned ones, and c of max p on labeled items:

    - Distribution alignment (ReMixMatch, arXiv 1911.09785): q ∝ p · target / p̄, so that on average all classes are predicted
      as often as they are labeled.
    - An item counts where its confidence, max q, reaches 0.95 · c · r / max r of its class, r = q̄ / target. That is
      relative to labeled items (AdaMatch, 2106.04732), as a model of smoothed labels is never certain. Hard classes, which
      are predicted more rarely than they are labeled even after alignment, have a lower one (FlexMatch, 2110.08263;
      FreeMatch, 2205.07246).

    The means are part of the module's state.

    Args:
        num_classes: number of classes.
        target: (classes,), shares of the classes; None for no alignment, and equal shares in the thresholds.
        decay: of the running means. In the first batches they are plain means, which forget the initial values at once.
        aligned: whether predictions are aligned to the target, which the thresholds compare with in any case.
    """

    mean_prediction: Tensor
    mean_aligned: Tensor
    labeled_confidence: Tensor
    num_batches: Tensor
    target: Tensor | None

    def __init__(self, num_classes: int, target: Tensor | None, decay: float = MEANS_DECAY, aligned: bool = True) -> None:
        super().__init__()
        self.decay, self.aligned = decay, aligned
        self.register_buffer("mean_prediction", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("mean_aligned", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("labeled_confidence", torch.tensor(1.0))
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("target", target, persistent=False)

    @torch.no_grad()
    def forward(
        self, unlabeled: Iterable[Tensor], labeled: Iterable[Tensor], total: Callable[[Tensor], Tensor]
    ) -> PseudoLabels:
        """Update the means by a batch, and label it.

        Args:
            unlabeled: the teacher's probabilities, (items, classes) in one part or more. It is iterated over twice, so that
                a large batch need not be held.
            labeled: those for labeled items; there may be none.
            total: the sum of a tensor over all processes.
        """
        decay = (1 - 1 / (self.num_batches + 1)).clamp(max=self.decay)
        sums = total(sum_and_count(unlabeled))
        update_mean(self.mean_prediction, sums, decay)
        self.update_confidence(labeled, total, decay)
        self.num_batches += 1
        parts, aligned = [], torch.zeros_like(sums)
        for part in unlabeled:
            part = self.align(part)
            aligned += sum_and_count([part])
            parts.append(part.max(dim=1))
        update_mean(self.mean_aligned, total(aligned), decay)
        labels, highest = (torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "values"))
        return PseudoLabels(labels, highest, highest >= self.thresholds()[labels])

    def update_confidence(self, labeled: Iterable[Tensor], total: Callable[[Tensor], Tensor], decay: Tensor) -> None:
        """Update the mean confidence on labeled items; arguments as of `forward`."""
        sums = total(sum_and_count(part.amax(dim=1, keepdim=True) for part in labeled))
        update_mean(self.labeled_confidence, sums, decay)

    def confidence(self) -> Tensor:
        """The confidence on labeled items that thresholds are relative to, of all classes or (classes,)."""
        return self.labeled_confidence

    def align(self, probabilities: Tensor) -> Tensor:
        """Distribution alignment; probabilities as they are without it."""
        if self.target is None or not self.aligned:
            return probabilities
        scaled = probabilities * (self.target / self.mean_prediction.clamp(min=LEAST_SHARE))
        return scaled / scaled.sum(dim=1, keepdim=True)

    def thresholds(self) -> Tensor:
        """The least confidence of each class, (classes,)."""
        learned = self.mean_aligned if self.target is None else self.mean_aligned / self.target
        return RELATIVE_THRESHOLD * self.confidence() * learned / learned.max()


def sum_and_count(parts: Iterable[Tensor]) -> Tensor:
    """The sum of parts of (items, values) over all items, and their number: (values + 1,)."""
    return torch.stack([torch.cat([part.sum(dim=0), part.new_tensor([len(part)])]) for part in parts]).sum(dim=0)


def update_mean(mean: Tensor, sums: Tensor, decay: Tensor) -> None:
    """Move a running mean towards the mean of a batch; without an item it stays.

    Args:
        sums: as from `sum_and_count`, over all processes.
    """
    of_batch = (sums[:-1] / sums[-1].clamp(min=1)).view_as(mean)
    mean.lerp_(of_batch, (1 - decay) * (sums[-1] > 0))
