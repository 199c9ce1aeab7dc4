"""What the steps of self-training have in common, whatever is labeled."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from simmim.finetune.self_training.pseudo_labels import PseudoLabeler
from simmim.finetune.self_training.teacher import Teacher
from simmim.training.module import TrainingModule


class SelfTrainingSteps(TrainingModule):
    """Teacher, pseudo-labels and their counts; the base of a task's module, beside the one that trains on labels alone.

    Args:
        arguments: of the module that trains on labels alone.
        strong: random changes of the student's views of unlabeled images, as the task makes them.
        labeler: chooses pseudo-labels.
        teacher: predicts from weak views. It must be among the run's callbacks.
        start: optimizer steps on labels alone; the weight of the pseudo-labels grows in as many steps after them.
        weight: of the loss of the pseudo-labels.

    Attributes:
        TOTALS: what is counted beside the classes; the first is what was shown, the second what was confident.
        counts: (totals + classes,), since they were last reported; the classes' are of the confident pseudo-labels.
    """

    TOTALS: ClassVar[tuple[str, ...]] = ("unlabeled", "confident")

    counts: Tensor
    labeler: PseudoLabeler

    def __init__(
        self, *arguments: Any, strong: Any, labeler: PseudoLabeler, teacher: Teacher, start: int, weight: float
    ) -> None:
        super().__init__(*arguments)
        self.strong, self.labeler, self.teacher, self.start, self.weight = strong, labeler, teacher, start, weight
        num_classes = len(labeler.mean_prediction)
        self.register_buffer("counts", torch.zeros(len(self.TOTALS) + num_classes, dtype=torch.int64))

    def weight_at(self, step: int) -> float:
        """The weight of the pseudo-labels' loss at an optimizer step from `start` on."""
        return self.weight * min(1.0, (step - self.start + 1) / max(self.start, 1))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")  # type: ignore[return-value]

    def log_losses(self, labeled: Tensor, pseudo: Tensor, num_labeled: int, num_unlabeled: int) -> Tensor:
        """The loss of the step, of those of the labels and the pseudo-labels; all three are logged."""
        loss = labeled + self.weight_at(self.global_step) * pseudo
        self.log("loss", loss, prog_bar=True, batch_size=num_labeled, sync_dist=True)
        self.log("labeled_loss", labeled, batch_size=num_labeled, sync_dist=True)
        self.log("pseudo_loss", pseudo, batch_size=num_unlabeled, sync_dist=True)
        return loss

    def count(self, totals: list[Tensor], confident: Tensor) -> Tensor:
        """Add a batch to the counts, log the share of what is confident, and return the batch's counts over all processes.

        Args:
            totals: numbers, as `TOTALS` says.
            confident: (N,) classes of the confident pseudo-labels.
        """
        by_class = torch.bincount(confident, minlength=len(self.counts) - len(totals))
        counts = self.total(torch.cat([torch.stack(totals), by_class]))
        self.counts += counts
        self.log("confident_share", counts[1] / counts[0], prog_bar=True)
        return counts
