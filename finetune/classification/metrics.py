"""What validation says of a classifier: rates over all images, and of each class by the table of confusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

TOP = 5
# Beyond, the table of confusions, classes squared, is neither small nor readable.
MOST_CLASSES = 2000


class ClassMetrics(nn.Module):
    """Accuracy, macro F1, from six classes on top-5 accuracy, and the table of confusions, over a validation pass; over all
    processes, as torchmetrics sums them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.rates = nn.ModuleDict({"accuracy": MulticlassAccuracy(classes, average="micro")})
        self.rates["macro_f1"] = MulticlassF1Score(classes, average="macro")
        if classes > TOP:
            self.rates["top5_accuracy"] = MulticlassAccuracy(classes, average="micro", top_k=TOP)
        self.confusions = MulticlassConfusionMatrix(classes) if classes <= MOST_CLASSES else None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits (B, classes), labels (B,)."""
        for metric in (*self.rates.values(), *([self.confusions] if self.confusions is not None else [])):
            metric.update(logits, labels)

    def confusion_table(self) -> Tensor | None:
        """(classes, classes) int64 on the CPU, a row a true class; starts anew. None for too many classes."""
        if self.confusions is None:
            return None
        table = self.confusions.compute().cpu()
        self.confusions.reset()
        return table


@dataclass(frozen=True)
class ClassRow:
    """One class of a validation pass.

    Attributes:
        name: of the class.
        precision: share of what was taken for it that is; nan where nothing was.
        recall: share of its images that were found; nan where there are none.
        f1: their harmonic mean, 0 where nothing was right.
        images: how many it has.
    """

    name: str
    precision: float
    recall: float
    f1: float
    images: int


def class_rows(confusions: Tensor, names: Sequence[str]) -> list[ClassRow]:
    """Precision, recall and F1 of each class from its row (true) and column (taken for it), in float64."""
    table = confusions.double()
    right, true, taken = table.diag(), table.sum(dim=1), table.sum(dim=0)
    f1 = torch.nan_to_num(2 * right / (true + taken))
    columns = zip(names, (right / taken).tolist(), (right / true).tolist(), f1.tolist(), true.long().tolist())
    return [ClassRow(*row) for row in columns]
