"""A step of self-training: labeled images by their labels, unlabeled ones by those of the teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.data import normalize
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.classification.module import ClassificationFinetuning
from simmim.finetune.classification.self_training.pseudo_labels import PseudoLabeler, PseudoLabels
from simmim.finetune.classification.self_training.teacher import Teacher


class SelfTraining(ClassificationFinetuning):
    """Classification with unlabeled images. A batch without any is a step on labels alone.

    The loss is that of the labeled images plus `weight` times the cross entropy of confident pseudo-labels, summed and
    divided by the number of unlabeled images. Images without a confident pseudo-label do not pass through the student.

    Args:
        model, preprocessing, changes, learning_rate, optim, class_weights: as of `ClassificationFinetuning`.
        strong: random changes of the student's views of unlabeled images.
        labeler: chooses pseudo-labels.
        teacher: predicts from weak views. It must be among the run's callbacks.
        start: optimizer steps on labels alone; the weight of the pseudo-labels grows in as many steps after them.
        weight: of the loss of the pseudo-labels.

    Attributes:
        counts: (4 + classes,), of unlabeled images since they were last reported: shown, confident, confident of known
            class, confident and right, and confident by pseudo-label.
    """

    counts: Tensor

    def __init__(
        self,
        *arguments: Any,
        strong: BatchChanges,
        labeler: PseudoLabeler,
        teacher: Teacher,
        start: int,
        weight: float,
    ) -> None:
        super().__init__(*arguments)
        self.strong, self.labeler, self.teacher = strong, labeler, teacher
        self.start, self.weight = start, weight
        self.register_buffer("counts", torch.zeros(4 + self.model.head.out_features, dtype=torch.int64))

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
        loss = labeled_loss + self.weight_at(self.global_step) * pseudo_loss
        self.log("loss", loss, prog_bar=True, batch_size=num_labeled, sync_dist=True)
        self.log("labeled_loss", labeled_loss, batch_size=num_labeled, sync_dist=True)
        self.log("pseudo_loss", pseudo_loss, batch_size=num_unlabeled, sync_dist=True)
        self.count(pseudo, batch["label"][num_labeled:])
        return loss

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
        return self.labeler(of_weak, of_labeled, lambda value: self.trainer.strategy.reduce(value, reduce_op="mean"))

    def weight_at(self, step: int) -> float:
        """The weight of the pseudo-labels' loss at an optimizer step from `start` on."""
        return self.weight * min(1.0, (step - self.start + 1) / max(self.start, 1))

    def count(self, pseudo: PseudoLabels, known: Tensor) -> None:
        """Add a batch to the counts, and log its shares.

        Args:
            known: (U,), true classes where they are known, else −1. Nothing but these counts depends on them.
        """
        confident, is_known = pseudo.confident, pseudo.confident & (known >= 0)
        right = is_known & (pseudo.labels == known)
        by_class = F.one_hot(pseudo.labels[confident], self.model.head.out_features).sum(dim=0)
        totals = torch.stack([torch.tensor(len(known), device=known.device), confident.sum(), is_known.sum(), right.sum()])
        counts = self.trainer.strategy.reduce(torch.cat([totals, by_class]), reduce_op="sum")
        self.counts += counts
        self.log("confident_share", counts[1] / counts[0], prog_bar=True)
        if counts[2]:
            self.log("pseudo_label_accuracy", counts[3] / counts[2])
