"""Detection as a LightningModule: losses per positive point, average precision by COCO's rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import normalize
from simmim.finetune.augment.color import ColorSettings, recolor
from simmim.finetune.detection.ap import BOXES, MASKS, Judged, Scores, average_precision
from simmim.finetune.detection.inference import Found, find_boxes
from simmim.finetune.detection.losses import LossSums, sum_losses
from simmim.finetune.detection.masks import PackedMask, coco_rle
from simmim.finetune.detection.model import Detector
from simmim.finetune.detection.views import Targets
from simmim.finetune.settings import OptimSettings
from simmim.training.module import TrainingModule

NUM_SHOWN = 6  # images of the first validation batches, in pictures


@dataclass(frozen=True)
class ShownImage:
    """One validation image for pictures.

    Attributes:
        image: (channels, height, width), uint8 or shares in [0, 1], at the model's scale.
        given: its objects, in its own pixels.
        found: in the image's own pixels.
        own_size: (height, width) of the image itself.
        masks: of the given objects; None where boxes alone are learned.
    """

    image: Tensor
    given: Targets
    found: Found
    own_size: tuple[int, int]
    masks: tuple[PackedMask, ...] | None = None


class DetectionFinetuning(TrainingModule):
    """Trains a `Detector`, the encoder layer-wise slower than the head.

    After a validation `scores` says how good the boxes are, `mask_scores` how good the masks are where they are learned, and
    `shown` holds its first images.

    A step's loss is the sum over all points of all its images, divided by its positive points, whatever the number of
    devices and accumulated parts. How many there are is known with the last part only: each part's gradient is that of its
    sum, and the gradient of the step is divided before it is clipped.

    Args:
        model: what is trained.
        preprocessing: by whose statistics images are normalized; saved with the model.
        classes: names in order.
        inference: whole, tiles or auto, as of `find_boxes`.
        learning_rate: as a function of the optimizer step, from 0.
        optim: decay, clipping.
        jitter: of colors, see `ColorSettings`.
    """

    model: Detector

    def __init__(
        self,
        model: Detector,
        preprocessing: Preprocessing,
        classes: tuple[str, ...],
        inference: str,
        learning_rate: Callable[[int], float],
        optim: OptimSettings,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model, learning_rate, optim.weight_decay, optim.clip, optim.layer_decay)
        self.preprocessing, self.classes, self.inference = preprocessing, classes, inference
        self.color = ColorSettings(jitter=jitter)
        self.num_positive: Tensor | None = None  # of the parts of this step so far, on this device
        self.num_images = 0
        self.judged: list[Judged] = []
        self.scores: Scores | None = None
        self.mask_scores: Scores | None = None
        self.shown: list[ShownImage] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The sum of the losses over this part's points. Its value is per positive point; its gradient is that of the sum
        per image, see `on_before_optimizer_step`."""
        images = batch["image"]
        if self.color.active:
            images = recolor(images, batch["seed"], [[] for _ in images], self.color, self.preprocessing.mean)
        predictions = self.model(normalize(images, self.preprocessing.mean, self.preprocessing.std))
        sums = sum_losses(predictions, batch["objects"])
        counted = sums.num_positive
        self.num_positive = counted if self.num_positive is None else self.num_positive + counted
        self.num_images += len(images)
        means = self.means(sums)
        names = ("classes", "boxes", "centerness", *["masks"] * self.model.shape.masks)
        self.log_dict({f"loss/{name}": value for name, value in zip(names, means[1:])})
        self.log("loss", means[0], prog_bar=True, batch_size=len(images))
        per_image = sums.total / len(images)
        return per_image + (means[0] - per_image).detach()

    def means(self, sums: LossSums) -> Tensor:
        """The total and the four losses per positive point of all devices, (5,) without a gradient."""
        parts = [sums.total, sums.classes, sums.boxes, sums.centerness, sums.masks, sums.num_positive]
        values = torch.stack([part.detach().float() for part in parts])
        values = self.sum_of_devices(values)
        return values[:-1] / values[-1].clamp(min=1)

    def sum_of_devices(self, values: Tensor) -> Tensor:
        """The sum over all devices."""
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values.clone(), reduce_op="sum")  # type: ignore[return-value]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradient, which is per image, by the positive points per image of the whole step."""
        counts = torch.stack([self.num_positive.float(), self.num_positive.new_tensor(self.num_images).float()])
        num_positive, num_images = self.sum_of_devices(counts).tolist()
        factor = num_images / max(num_positive, 1.0)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self.num_positive, self.num_images = None, 0

    def on_validation_epoch_start(self) -> None:
        """Forget the images of the validation before."""
        self.judged, self.shown = [], []

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Find boxes, and keep them with those that are given, in each image's own pixels."""
        images = normalize(batch["image"], self.preprocessing.mean, self.preprocessing.std)
        size = (images.shape[2], images.shape[3])
        found = find_boxes(self.model, images, self.preprocessing.image_size, self.inference)
        masks = batch.get("masks", [None] * len(found))
        for image, one, given, own, row, labeled in zip(
            batch["image"], found, batch["objects"], batch["own_size"], batch["row"], masks, strict=True
        ):
            one, given = one.at(size, own), Targets(*(part.cpu() for part in given[:3]))
            judged = Judged(row, *(part.numpy() for part in (*given[:3], *one[:3])))
            if labeled is not None and one.masks is not None:
                judged = judged._replace(
                    masks=[coco_rle(mask, own) for mask in labeled],
                    found_masks=[coco_rle(mask.packed(own), own) for mask in one.masks],
                    size=own,
                )
            self.judged.append(judged)
            if len(self.shown) < NUM_SHOWN:
                self.shown.append(ShownImage(image.cpu(), given, one, own, labeled))

    def on_validation_epoch_end(self) -> None:
        """Log the average precisions over the images of all devices together."""
        judged = self.gathered()
        self.scores = average_precision(judged, len(self.classes), BOXES)
        self.log_scores(self.scores, "")
        if self.model.shape.masks:
            self.mask_scores = average_precision(judged, len(self.classes), MASKS)
            self.log_scores(self.mask_scores, "mask_")

    @property
    def main_scores(self) -> Scores | None:
        """Those by which the best model is chosen: of the masks, where they are learned."""
        return self.mask_scores or self.scores

    def log_scores(self, scores: Scores, prefix: str) -> None:
        """Log average precisions under names that begin with `prefix`."""
        ap, ap50, ap75 = scores.overall
        # Every device has the same numbers already; without sync_dist Lightning would warn.
        values = {f"{prefix}ap": ap, f"{prefix}ap50": ap50, f"{prefix}ap75": ap75}
        self.log_dict(values, prog_bar=True, sync_dist=True)
        values = {f"{prefix}ap_by_size/{size}": value for size, value in scores.by_size.items()}
        for name, value in zip(self.classes, scores.by_class[:, 0].tolist()):
            if not math.isnan(value):
                values[f"{prefix}ap_by_class/{name}"] = value
        self.log_dict(values, sync_dist=True)

    def gathered(self) -> list[Judged]:
        """The images of all devices, in order."""
        everything: list[Any] = [self.judged]
        if self.trainer.world_size > 1:
            everything = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everything, self.judged)
        return sorted((one for judged in everything for one in judged), key=lambda one: one.row)
