"""Classification: mean-pooled features of the final norm, one linear layer, cross entropy, accuracy."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from finetune.augment import AffineSettings, warp
from finetune.settings import OptimSettings
from simmim.checkpoint import Preprocessing, save_encoder
from simmim.convert import read_encoder
from simmim.data import normalise
from simmim.optim import adamw, parameter_groups
from simmim.swinv2 import SwinV2
from simmim.training.sharding import clip_gradients, shard
from simmim.training.watch import judge_step


class Classifier(nn.Module):
    """An encoder and a linear head on its pooled features."""

    def __init__(self, encoder: SwinV2, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, (B, channels, height, width), to logits, (B, classes)."""
        return self.head(self.encoder(images).pooled)


class ClassificationFinetuning(pl.LightningModule):
    """Trains a `Classifier`, the encoder layer-wise slower than the head or not at all.

    Args:
        model: what is trained.
        preprocessing: by whose statistics images are normalised; saved with the model.
        affine: changes of the training images.
        learning_rate: as a function of the optimiser step, from 0.
        optim: decay, smoothing, clipping.
        freeze: keep the encoder as it is.
    """

    def __init__(
        self,
        model: Classifier,
        preprocessing: Preprocessing,
        affine: AffineSettings,
        learning_rate: Callable[[int], float],
        optim: OptimSettings,
        freeze: bool,
    ) -> None:
        super().__init__()
        self.model, self.preprocessing, self.affine = model, preprocessing, affine
        self.learning_rate, self.optim, self.freeze = learning_rate, optim, freeze
        self.accuracy = MulticlassAccuracy(model.head.out_features, average="micro")
        if freeze:
            model.encoder.requires_grad_(False)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross entropy with smoothed labels on augmented images."""
        if self.freeze:
            self.model.encoder.eval()
        images = normalise(batch["image"], self.preprocessing.mean, self.preprocessing.std)
        if self.affine.active:
            images = warp(images, self.affine.matrices(batch["seed"]))
        logits = self.model(images)
        loss = F.cross_entropy(logits.float(), batch["label"], label_smoothing=self.optim.label_smoothing)
        self.log("loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Accuracy and loss over all validation images."""
        logits = self.model(normalise(batch["image"], self.preprocessing.mean, self.preprocessing.std)).float()
        self.accuracy(logits, batch["label"])
        self.log("accuracy", self.accuracy, on_epoch=True, prog_bar=True, batch_size=len(logits))
        loss = F.cross_entropy(logits, batch["label"])
        self.log("validation_loss", loss, on_epoch=True, batch_size=len(logits), sync_dist=True)

    def configure_model(self) -> None:
        """Divide the model among the devices where the strategy is to."""
        shard(self, self.model)

    def configure_optimizers(self):
        """AdamW with layer-wise learning rates, and the schedule, step by step."""
        depths = self.model.encoder.config.depths
        groups = parameter_groups(self.model, 1.0, self.optim.weight_decay, self.optim.layer_decay, depths)
        optimiser = adamw(groups)
        # The groups' rates are their layers' scales, so that the schedule's value is the head's rate.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.learning_rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the norm over all parameters, and log that norm; a step that is not finite is skipped."""
        norm = clip_gradients(self.model.parameters(), self.optim.clip)
        judge_step(self, optimizer, norm)
        self.log("grad_norm", norm)
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier read: the model, its classes' names, and how to feed it."""

    model: Classifier
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def save_classifier(
    folder: Path, model: Classifier, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
) -> None:
    """Write encoder and head into `folder`; what loads the encoder alone takes no notice of the head's files."""
    save_encoder(folder, model.encoder, preprocessing, provenance, head=model.head.state_dict(), classes=classes)


def load_classifier(path: str | Path) -> SavedClassifier:
    """A fine-tuned classifier, in evaluation mode, from its run folder or from a classifier in any format that
    `simmim.load_encoder` reads.

    Raises:
        ValueError: when there is none, or its weights do not fit.
    """
    saved = read_encoder(path)
    head, classes = saved.checkpoint.head, saved.checkpoint.classes
    if not head:
        raise ValueError(f"{str(path)!r} holds an encoder but no classifier: give a run of simmim finetune")
    model = Classifier(saved.encoder, len(classes))
    model.head.load_state_dict(head)
    return SavedClassifier(model.eval(), classes, saved.preprocessing)
