"""Segmentation as a LightningModule: cross entropy over pixels, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import normalize
from simmim.data.label_maps import ClassScheme
from simmim.finetune.augment.color import ColorSettings, recolor
from simmim.finetune.segmentation.iou import iou_by_class, mean_iou, pixel_accuracy
from simmim.finetune.segmentation.model import Segmenter
from simmim.finetune.segmentation.sliding import dense_logits, most_likely_class, resize_logits
from simmim.finetune.settings import OptimSettings
from simmim.training.module import TrainingModule

NUM_SHOWN = 6  # images of the first validation batches, in pictures


def of_this_process(value: Tensor) -> Tensor:
    """The value as it is."""
    return value


def pixel_loss(
    logits: Tensor,
    label_maps: Tensor,
    ignored_id: int,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    mean_of: Callable[[Tensor], Tensor] = of_this_process,
    stride: int | None = None,
) -> Tensor:
    """Mean cross entropy over the pixels that are not ignored, weighted by their classes; 0 where all are ignored.

    Args:
        logits: (B, classes, H, W) at any resolution; resized to that of the label maps.
        label_maps: (B, height, width) class ids, and `ignored_id`.
        weights: (classes,).
        smoothing: share of the target that is spread over all classes.
        mean_of: the mean of a number over all processes, for a loss whose mean over them is that of all pixels.
        stride: as of `resize_logits`.
    """
    label_maps = label_maps.long()
    total = F.cross_entropy(
        resize_logits(logits, label_maps.shape[1:], stride),  # type: ignore[arg-type]
        label_maps,
        weight=weights,
        ignore_index=ignored_id,
        reduction="sum",
        label_smoothing=smoothing,
    )
    counted = label_maps[label_maps != ignored_id]
    count = counted.numel() if weights is None else weights[counted].sum()
    # Not torch's own mean: in a crop all pixels may be ignored, and 0 / 0 would spoil the step.
    return total / mean_of(torch.as_tensor(count, device=total.device, dtype=total.dtype)).clamp(min=1e-6)


def balanced_weights(pixels: Sequence[int]) -> tuple[float, ...]:
    """Per class one over the root of its share of the pixels, scaled to a mean of 1 over the pixels; 0 for a class without a
    pixel, as there may be in cross-validation.

    Args:
        pixels: training pixels of each class.
    """
    shares = [count / sum(pixels) for count in pixels]
    weights = [1 / math.sqrt(share) if share else 0.0 for share in shares]
    mean = sum(share * weight for share, weight in zip(shares, weights))
    return tuple(weight / mean for weight in weights)


@dataclass(frozen=True)
class ShownImage:
    """One validation image for pictures.

    Attributes:
        image: (channels, height, width) uint8.
        label_map, predicted: class ids, (height, width) at the label map's own size.
    """

    image: Tensor
    label_map: Tensor
    predicted: Tensor


class SegmentationFinetuning(TrainingModule):
    """Trains a `Segmenter`, the encoder layer-wise slower than the heads.

    After a validation `confusion` holds its confusion matrix and `shown` its first images.

    Args:
        model: what is trained.
        preprocessing: by whose statistics images are normalized; saved with the model.
        scheme: the classes.
        inference: whole, slide or auto, as of `dense_logits`.
        learning_rate: as a function of the optimizer step, from 0.
        optim: decay, smoothing, clipping.
        auxiliary: weight of the auxiliary head's loss.
        class_weights: of each class in the loss.
        jitter: of colors, see `ColorSettings`.
    """

    model: Segmenter
    class_weights: Tensor | None

    def __init__(
        self,
        model: Segmenter,
        preprocessing: Preprocessing,
        scheme: ClassScheme,
        inference: str,
        learning_rate: Callable[[int], float],
        optim: OptimSettings,
        auxiliary: float = 0.4,
        class_weights: Sequence[float] | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model, learning_rate, optim.weight_decay, optim.clip, optim.layer_decay)
        self.preprocessing, self.scheme, self.inference = preprocessing, scheme, inference
        self.label_smoothing, self.auxiliary = optim.label_smoothing, auxiliary
        self.color = ColorSettings(jitter=jitter)
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.pixels = MulticlassConfusionMatrix(len(scheme.classes), ignore_index=scheme.ignored_id, validate_args=False)
        self.confusion: Tensor | None = None
        self.shown: list[ShownImage] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross entropy of both heads over the pixels that are not ignored."""
        images = self.changed(batch["image"], batch["seed"], self.color)
        output = self.model(images, with_auxiliary=True)
        loss = self.training_loss(output.logits, batch["label_map"], self.model.stride)
        if output.auxiliary is not None:
            auxiliary = self.training_loss(output.auxiliary, batch["label_map"], self.model.auxiliary_stride)
            loss = loss + self.auxiliary * auxiliary
        self.log("loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def changed(self, images: Tensor, seeds: Sequence[int], color: ColorSettings) -> Tensor:
        """Images of changed colors, normalized. No pixel moves.

        Args:
            images: (B, channels, height, width), uint8 or shares in [0, 1].
            seeds: one per image.
        """
        if color.active:
            images = recolor(images, seeds, color.draw_changes(seeds, images.shape[1]), color, self.preprocessing.mean)
        return normalize(images, self.preprocessing.mean, self.preprocessing.std)

    def training_loss(self, logits: Tensor, label_maps: Tensor, stride: int) -> Tensor:
        """`pixel_loss` with the weights and smoothing of training. The mean over several processes, whose crops have other
        numbers of pixels that count, is the loss of one process."""
        own = (self.scheme.ignored_id, self.class_weights, self.label_smoothing)
        return pixel_loss(logits, label_maps, *own, self.mean_of_processes, stride)

    def mean_of_processes(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes."""
        if self._trainer is None or self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.clone(), reduce_op="mean")  # type: ignore[return-value]

    def on_validation_epoch_start(self) -> None:
        """Forget the images of the validation before."""
        self.shown = []

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Count pixels by labeled and predicted class at the label maps' own size."""
        images = normalize(batch["image"], self.preprocessing.mean, self.preprocessing.std)
        label_maps = batch["label_map"].long()
        window = self.preprocessing.image_size
        logits = dense_logits(self.model, images, window, self.inference, self.model.stride)
        predicted = most_likely_class(logits, label_maps.shape[1:])
        self.pixels.update(predicted, label_maps)
        loss = pixel_loss(logits, label_maps, self.scheme.ignored_id)
        self.log("validation_loss", loss, on_epoch=True, batch_size=len(images), sync_dist=True)
        for row in range(min(len(images), NUM_SHOWN - len(self.shown))):
            self.shown.append(ShownImage(*(part[row].cpu() for part in (batch["image"], label_maps, predicted))))

    def on_validation_epoch_end(self) -> None:
        """Log the mean and each class's intersection over union, of all devices together."""
        self.confusion = self.pixels.compute().cpu()
        self.pixels.reset()
        values = {"mean_iou": mean_iou(self.confusion), "pixel_accuracy": pixel_accuracy(self.confusion)}
        # Every device has the same numbers already; without sync_dist Lightning would warn.
        self.log_dict(values, prog_bar=True, sync_dist=True)
        by_class = zip(self.scheme.classes, iou_by_class(self.confusion).tolist())
        self.log_dict({f"iou/{name}": value for name, value in by_class if not math.isnan(value)}, sync_dist=True)
