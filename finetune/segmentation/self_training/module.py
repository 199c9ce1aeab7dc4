"""A step of self-training: labeled images by their label maps, unlabeled ones by those of the teacher."""

from __future__ import annotations

import random
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.data import normalize
from simmim.finetune.augment.color import ColorSettings
from simmim.finetune.segmentation.module import SegmentationFinetuning
from simmim.finetune.segmentation.self_training.pseudo_masks import PixelProbabilities, paste_boxes
from simmim.finetune.segmentation.sliding import resize_logits
from simmim.finetune.self_training.module import SelfTrainingSteps


class UnlabeledViews(NamedTuple):
    """What the student sees of unlabeled images, and what it learns from them.

    Attributes:
        images: (V, channels, height, width), normalized; of those with a confident pixel alone.
        masks: (V, height, width) int64, classes of the confident pixels, else the ignored id.
        num_pixels: of all U unlabeled images, the mean over the processes.
    """

    images: Tensor
    masks: Tensor
    num_pixels: Tensor


class PseudoMaskTraining(SelfTrainingSteps, SegmentationFinetuning):
    """Segmentation with unlabeled images. A batch without any is a step on labels alone.

    The loss is that of the labeled images plus `weight` times the cross entropy of confident pixels, summed and divided by
    the number of all pixels of unlabeled images, for each head. Images without a confident pixel do not pass through the
    student, and nothing of them is pasted into others.

    Args:
        model, …: as of `SegmentationFinetuning`.
        strong: changes of colors in the student's views of unlabeled images.
        labeler, teacher, start, weight: as of `SelfTrainingSteps`.
    """

    TOTALS: ClassVar[tuple[str, ...]] = ("pixels", "confident")

    strong: ColorSettings

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Loss of labeled and of confidently labeled unlabeled images, which pass through the student together."""
        if "box" not in batch:
            return super().training_step(batch, batch_idx)
        num_labeled = len(batch["image"]) - len(batch["box"])
        unlabeled = self.unlabeled_views(batch)
        images = self.changed(batch["image"][:num_labeled], batch["seed"][:num_labeled], self.color)
        if len(unlabeled.images):
            images = torch.cat([images, unlabeled.images])
        output = self.model(images, with_auxiliary=True)
        label_maps = batch["label_map"][:num_labeled]
        labeled_loss = pseudo_loss = torch.zeros((), device=images.device)
        heads = (
            (output.logits, 1.0, self.model.stride),
            (output.auxiliary, self.auxiliary, self.model.auxiliary_stride),
        )
        for logits, weight, stride in heads:
            if logits is not None:
                labeled_loss = labeled_loss + weight * self.training_loss(logits[:num_labeled], label_maps, stride)
                pseudo_loss = pseudo_loss + weight * self.pseudo_loss(logits[num_labeled:], unlabeled, stride)
        return self.log_losses(labeled_loss, pseudo_loss, num_labeled, len(batch["box"]))

    def pseudo_loss(self, logits: Tensor, unlabeled: UnlabeledViews, stride: int) -> Tensor:
        """Cross entropy of the confident pixels over the number of all pixels; zero without any.

        Args:
            logits: (V, classes, h, w) at any resolution.
            stride: as of `resize_logits`.
        """
        resized = resize_logits(logits, unlabeled.masks.shape[1:], stride)  # type: ignore[arg-type]
        total = F.cross_entropy(resized, unlabeled.masks, ignore_index=self.scheme.ignored_id, reduction="sum")
        return total / unlabeled.num_pixels.clamp(min=1)

    @torch.no_grad()
    def unlabeled_views(self, batch: dict) -> UnlabeledViews:
        """The student's views of a batch's unlabeled images, with the teacher's labels."""
        num_unlabeled = len(batch["box"])
        num_labeled = len(batch["image"]) - num_unlabeled
        images, maps = batch["image"][num_labeled:], batch["label_map"][num_labeled:]
        seeds, boxes = batch["seed"][num_labeled:], batch["box"]
        if "partner" in batch:
            images, maps = torch.cat([images, batch["partner"]]), torch.cat([maps, batch["partner_map"]])
            of_partners = (random.Random(f"{seed}/partner").getrandbits(62) for seed in seeds)
            seeds = seeds + [seed for seed, box in zip(of_partners, boxes.tolist()) if any(box)]
        inside = maps != self.scheme.ignored_id
        masks = self.pseudo_masks(images, inside, batch["image"][:num_labeled], batch["label_map"][:num_labeled])
        self.count_pixels(masks[:num_unlabeled], inside[:num_unlabeled])
        strong = self.changed(images, seeds, self.strong)
        if "partner" in batch:
            parts = (strong[:num_unlabeled], masks[:num_unlabeled], strong[num_unlabeled:], masks[num_unlabeled:])
            strong, masks = paste_boxes(*parts, boxes, self.scheme.ignored_id)
        rows = (masks != self.scheme.ignored_id).any(dim=(1, 2)).nonzero()[:, 0]
        num_pixels = self.mean_of_processes(inside[:num_unlabeled].sum().float())
        return UnlabeledViews(strong[rows], masks[rows], num_pixels)

    def pseudo_masks(self, images: Tensor, inside: Tensor, labeled: Tensor, label_maps: Tensor) -> Tensor:
        """The teacher's label maps, (N, height, width) int64: classes of confident pixels, else the ignored id.

        Args:
            images: (N, channels, height, width), unlabeled.
            inside: (N, height, width) bool, pixels of images.
            labeled, label_maps: labeled images, for comparison.
        """
        views = normalize(torch.cat([images, labeled]), self.preprocessing.mean, self.preprocessing.std)
        with self.teacher.predicting(self.model):
            logits = self.model(views)
        of_unlabeled, of_labeled = logits.split([len(images), len(labeled)])
        pseudo = self.labeler(
            PixelProbabilities(of_unlabeled, inside, self.model.stride),
            PixelProbabilities(of_labeled, label_maps != self.scheme.ignored_id, self.model.stride),
            self.total,
        )
        masks = torch.full(inside.shape, self.scheme.ignored_id, device=inside.device)
        masks[inside] = torch.where(pseudo.confident, pseudo.labels, self.scheme.ignored_id)
        return masks

    def count_pixels(self, masks: Tensor, inside: Tensor) -> None:
        """Add label maps of a batch to the counts, and log the share of confident pixels."""
        confident = masks[masks != self.scheme.ignored_id]
        self.count([inside.sum(), torch.tensor(len(confident), device=masks.device)], confident)
