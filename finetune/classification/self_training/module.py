"""A step of self-training: labeled images by their labels, unlabeled ones by those of the teacher."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.data import normalize
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.classification.module import ClassificationFinetuning
from simmim.finetune.self_training.module import SelfTrainingSteps
from simmim.finetune.self_training.pseudo_labels import PseudoLabels


class SelfTraining(SelfTrainingSteps, ClassificationFinetuning):
    """Classification with unlabeled images. A batch without any is a step on labels alone.

    The loss is that of the labeled images plus `weight` times the cross entropy of confident pseudo-labels, summed and
    divided by the number of unlabeled images. Images without a confident pseudo-label do not pass through the student.

    Args:
        model, preprocessing, changes, learning_rate, optim, class_weights: as of `ClassificationFinetuning`.
        strong: random changes of the student's views of unlabeled images.
        labeler, teacher, start, weight: as of `SelfTrainingSteps`.
    """

    TOTALS: ClassVar[tuple[str, ...]] = ("unlabeled", "confident", "confident_of_known_class", "right")

    strong: BatchChanges

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Loss of labeled and of confidently labeled unlabeled images, which pass through the student together."""
        if "weak" not in batch:
            return super().training_step(batch, batch_idx)
        num_unlabeled = len(batch["weak"])
        num_labeled = len(batch["image"]) - num_unlabeled
        pseudo = self.pseudo_labels(batch["weak"], batch["image"][:num_labeled])
        rows = pseudo.confident.nonzero()[:, 0]
        images, targets = self.changed(
            batch["image"][:num_labeled], batch["label"][:num_labeled], batch["seed"][:num_labeled]
        )
        if len(rows):
            seeds = [batch["seed"][num_labeled + row] for row in rows.tolist()]
            preprocessing = self.preprocessing
            strong = self.strong.augment(batch["image"][num_labeled + rows], seeds, preprocessing.mean, preprocessing.std)
            images = torch.cat([images, strong])
        logits = self.model(images).float()
        labeled_loss = self.loss_of(logits[:num_labeled], targets)
        pseudo_loss = F.cross_entropy(logits[num_labeled:], pseudo.labels[rows], reduction="sum") / num_unlabeled
        self.count_known(pseudo, batch["label"][num_labeled:])
        return self.log_losses(labeled_loss, pseudo_loss, num_labeled, num_unlabeled)

    @torch.no_grad()
    def pseudo_labels(self, weak: Tensor, labeled: Tensor) -> PseudoLabels:
        """The teacher's labels.

        Args:
            weak: (U, channels, height, width) uint8, weak views of unlabeled images.
            labeled: (B, channels, height, width) uint8, for comparison.
        """
        images = normalize(torch.cat([weak, labeled]), self.preprocessing.mean, self.preprocessing.std)
        with self.teacher.predicting(self.model):
            probabilities = self.model(images).float().softmax(dim=1)
        of_weak, of_labeled = probabilities.split([len(weak), len(labeled)])
        return self.labeler([of_weak], [of_labeled], self.total)

    def count_known(self, pseudo: PseudoLabels, known: Tensor) -> None:
        """Add a batch to the counts, and log its shares.

        Args:
            known: (U,), true classes where they are known, else −1. Nothing but these counts depends on them.
        """
        confident, is_known = pseudo.confident, pseudo.confident & (known >= 0)
        right = is_known & (pseudo.labels == known)
        totals = [torch.tensor(len(known), device=known.device), confident.sum(), is_known.sum(), right.sum()]
        counts = self.count(totals, pseudo.labels[confident])
        if counts[2]:
            self.log("pseudo_label_accuracy", counts[3] / counts[2])
