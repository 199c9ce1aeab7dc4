"""Validation metrics of a classifier: rates over all images, and per class from the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

TOP_K = 5
MAX_CONFUSION_CLASSES = 2000  # a larger confusion matrix is neither small nor readable


class ClassMetrics(nn.Module):
    """Accuracy, macro F1, top-5 accuracy for six classes and more, and the confusion matrix of a validation pass, over all
    processes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rates = nn.ModuleDict({"accuracy": MulticlassAccuracy(num_classes, average="micro")})
        self.rates["macro_f1"] = MulticlassF1Score(num_classes, average="macro")
        if num_classes > TOP_K:
            self.rates["top5_accuracy"] = MulticlassAccuracy(num_classes, average="micro", top_k=TOP_K)
        self.confusions = MulticlassConfusionMatrix(num_classes) if num_classes <= MAX_CONFUSION_CLASSES else None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, classes), labels (B,)."""
        for metric in (*self.rates.values(), *([self.confusions] if self.confusions is not None else [])):
            metric.update(logits, labels)

    def pop_confusions(self) -> Tensor | None:
        """The confusion matrix, (classes, classes) int64 on the CPU, a row per true class, and reset it. None for too many
        classes."""
        if self.confusions is None:
            return None
        confusions = self.confusions.compute().cpu()
        self.confusions.reset()
        return confusions


@dataclass(frozen=True)
class ClassRow:
    """One class in a validation pass.

    Attributes:
        name: of the class.
        precision: share of the images predicted as this class that are of it; nan where there are none.
        recall: share of the images of this class that are predicted as it; nan where there are none.
        f1: harmonic mean of the two; 0 where no image is right.
        images: number of images of this class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    images: int


def class_rows(confusions: Tensor, names: Sequence[str]) -> list[ClassRow]:
    """Precision, recall and F1 of each class from the confusion matrix, in float64."""
    confusions = confusions.double()
    correct, labeled, predicted = confusions.diag(), confusions.sum(dim=1), confusions.sum(dim=0)
    f1 = torch.nan_to_num(2 * correct / (labeled + predicted))
    columns = zip(names, (correct / predicted).tolist(), (correct / labeled).tolist(), f1.tolist(), labeled.long().tolist())
    return [ClassRow(*row) for row in columns]
