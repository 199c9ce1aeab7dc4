"""Which unlabeled images get which label: distribution alignment, then a threshold for each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

RELATIVE_THRESHOLD = 0.95
LEAST_SHARE = 1e-4  # of a class in the running mean of the predictions, so that no prediction is multiplied by infinity


class PseudoLabels(NamedTuple):
    """The labels of U unlabeled images.

    Attributes:
        labels: (U,) int64, the likeliest class after alignment.
        confidence: (U,) float, its probability.
        confident: (U,) bool, whether the image is learned from.
    """

    labels: Tensor
    confidence: Tensor
    confident: Tensor


class PseudoLabeler(nn.Module):
    """Labels unlabeled images by the teacher's predictions.

    With running means p̄ of its predictions p for unlabeled images, q̄ of the aligned ones, and c of max p on labeled images:

    - Distribution alignment (ReMixMatch, arXiv 1911.09785): q ∝ p · target / p̄, so that on average all classes are predicted
      as often as they are labeled.
    - An image counts where its confidence, max q, reaches 0.95 · c · r / max r of its class, r = q̄ / target. That is
      relative to labeled images (AdaMatch, 2106.04732), as a model of smoothed labels is never certain. Hard classes, which
      are predicted more rarely than they are labeled even after alignment, have a lower one (FlexMatch, 2110.08263;
      FreeMatch, 2205.07246).

    The means are part of the module's state.

    Args:
        num_classes: number of classes.
        target: (classes,), shares of the classes; None for no alignment, and equal shares in the thresholds.
        decay: of the running means. In the first batches they are plain means, which forget the initial values at once.
    """

    mean_prediction: Tensor
    mean_aligned: Tensor
    labeled_confidence: Tensor
    num_batches: Tensor
    target: Tensor | None

    def __init__(self, num_classes: int, target: Tensor | None, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_prediction", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("mean_aligned", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("labeled_confidence", torch.tensor(1.0))
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("target", target, persistent=False)

    @torch.no_grad()
    def forward(self, unlabeled: Tensor, labeled: Tensor, mean: Callable[[Tensor], Tensor]) -> PseudoLabels:
        """Update the means by a batch, and label it.

        Args:
            unlabeled: (U, classes), the teacher's probabilities.
            labeled: (B, classes), those for labeled images.
            mean: the mean of a tensor over all processes.
        """
        decay = (1 - 1 / (self.num_batches + 1)).clamp(max=self.decay)
        confidence_on_labeled = labeled.amax(dim=1).mean(dim=0, keepdim=True)
        means = mean(torch.cat([unlabeled.mean(dim=0), confidence_on_labeled]))
        self.mean_prediction.lerp_(means[:-1], 1 - decay)
        self.labeled_confidence.lerp_(means[-1], 1 - decay)
        self.num_batches += 1
        aligned = self.align(unlabeled)
        self.mean_aligned.lerp_(mean(aligned.mean(dim=0)), 1 - decay)
        confidence, labels = aligned.max(dim=1)
        return PseudoLabels(labels, confidence, confidence >= self.thresholds()[labels])

    def align(self, probabilities: Tensor) -> Tensor:
        """Distribution alignment; probabilities as they are without a target."""
        if self.target is None:
            return probabilities
        scaled = probabilities * (self.target / self.mean_prediction.clamp(min=LEAST_SHARE))
        return scaled / scaled.sum(dim=1, keepdim=True)

    def thresholds(self) -> Tensor:
        """The least confidence of each class, (classes,)."""
        learned = self.mean_aligned if self.target is None else self.mean_aligned / self.target
        return RELATIVE_THRESHOLD * self.labeled_confidence * learned / learned.max()
