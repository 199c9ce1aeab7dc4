"""Classification as a LightningModule: cross entropy to mixed and smoothed targets, accuracy and F1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import normalize
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.classification.metrics import ClassMetrics
from simmim.finetune.classification.model import Classifier
from simmim.finetune.settings import OptimSettings
from simmim.training.module import TrainingModule


class ClassificationFinetuning(TrainingModule):
    """Trains a `Classifier`, the encoder layer-wise slower than the head and frozen parts not at all.

    Args:
        model: what is trained.
        preprocessing: by whose statistics images are normalized; saved with the model.
        changes: random changes of the training images.
        learning_rate: as a function of the optimizer step, from 0.
        optim: decay, smoothing, clipping.
        class_weights: (classes,), weight of an image of each class in the loss; all 1 by default.
    """

    model: Classifier
    class_weights: Tensor | None

    def __init__(
        self,
        model: Classifier,
        preprocessing: Preprocessing,
        changes: BatchChanges,
        learning_rate: Callable[[int], float],
        optim: OptimSettings,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(model, learning_rate, optim.weight_decay, optim.clip, optim.layer_decay)
        self.preprocessing, self.changes, self.label_smoothing = preprocessing, changes, optim.label_smoothing
        # Not in checkpoints: it follows from the labels.
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.metrics = ClassMetrics(model.head.out_features)
        self.confusions: Tensor | None = None

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross entropy to smoothed labels on changed images; the targets of mixed images are mixed in the same shares."""
        images, targets = self.changed(batch["image"], batch["label"], batch["seed"])
        loss = self.loss_of(self.model(images).float(), targets)
        self.log("loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def changed(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Randomly changed and normalized images, and their targets.

        Args:
            images: (B, channels, height, width) uint8.
            labels: (B,).
            seeds: one per image.

        Returns:
            Images, float; targets, labels as they are or, where images are mixed or weighted, shares of (B, classes).
        """
        images = self.changes.augment(images, seeds, self.preprocessing.mean, self.preprocessing.std)
        if not self.changes.mixing.active and self.class_weights is None:
            return images, labels
        return self.changes.mix(images, F.one_hot(labels, self.model.head.out_features).float(), seeds)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of logits, (B, classes), to the targets of `changed`."""
        if targets.ndim == 1:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return soft_cross_entropy(logits, targets, self.label_smoothing, self.class_weights)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log the loss and the rates of `ClassMetrics` over all validation images, by mean logits over an image's views."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        views = [batch["image"], *batch.get("views", ())]
        logits = torch.stack([self.model(normalize(view, mean, std)).float() for view in views]).mean(0)
        self.metrics.update(logits, batch["label"])
        for name, metric in self.metrics.rates.items():
            self.log(name, metric, on_epoch=True, prog_bar=name == "accuracy", batch_size=len(logits))  # type: ignore[arg-type]
        loss = F.cross_entropy(logits, batch["label"])
        self.log("validation_loss", loss, on_epoch=True, batch_size=len(logits), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the confusion matrix, a row per true class, until the next validation."""
        self.confusions = self.metrics.pop_confusions()


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy to soft targets.

    Args:
        logits: (B, classes).
        targets: (B, classes), shares of the classes.
        smoothing: share of each target that is spread over all classes.
        class_weights: (classes,); an image is weighted by its classes in their shares.
    """
    losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    return losses.mean() if class_weights is None else (losses * (targets @ class_weights)).mean()
