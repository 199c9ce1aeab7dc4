"""Which unlabeled images get which label: distribution alignment, then a threshold for each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

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

    With running means p̄ of the predictions and τ of the confidence:

    - Distribution alignment (ReMixMatch, arXiv 1911.09785): q ∝ p · target / p̄, so that on average all classes are predicted
      as often as they are labeled.
    - Self-adaptive thresholds (FreeMatch, arXiv 2205.07246): an image counts where its confidence, max q, reaches
      τ · p̄ / max p̄ of its class. Classes that are hard, which are predicted rarely, have a lower threshold.

    The means are part of the module's state.

    Args:
        num_classes: number of classes.
        target: (classes,), shares of the classes; None for no alignment.
        decay: of the running means. In the first batches they are plain means, which forget the initial values at once.
    """

    mean_prediction: Tensor
    mean_confidence: Tensor
    num_batches: Tensor
    target: Tensor | None

    def __init__(self, num_classes: int, target: Tensor | None, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_prediction", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("mean_confidence", torch.tensor(1 / num_classes))
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("target", target, persistent=False)

    @torch.no_grad()
    def forward(self, probabilities: Tensor, mean: Callable[[Tensor], Tensor]) -> PseudoLabels:
        """Update the means by a batch, and label it.

        Args:
            probabilities: (U, classes), the teacher's.
            mean: the mean of a tensor over all processes.
        """
        decay = (1 - 1 / (self.num_batches + 1)).clamp(max=self.decay)
        self.mean_prediction.lerp_(mean(probabilities.mean(dim=0)), 1 - decay)
        aligned = self.align(probabilities)
        confidence, labels = aligned.max(dim=1)
        self.mean_confidence.lerp_(mean(confidence.mean()), 1 - decay)
        self.num_batches += 1
        return PseudoLabels(labels, confidence, confidence >= self.thresholds()[labels])

    def align(self, probabilities: Tensor) -> Tensor:
        """Distribution alignment; probabilities as they are without a target."""
        if self.target is None:
            return probabilities
        scaled = probabilities * (self.target / self.mean_prediction.clamp(min=LEAST_SHARE))
        return scaled / scaled.sum(dim=1, keepdim=True)

    def thresholds(self) -> Tensor:
        """The least confidence of each class, (classes,)."""
        return self.mean_confidence * self.mean_prediction / self.mean_prediction.max()
