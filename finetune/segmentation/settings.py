"""Settings of semantic segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simmim.finetune.dense.settings import ScaledScenesSettings, check_inference
from simmim.finetune.segmentation.self_training.settings import PseudoMaskSettings
from simmim.finetune.segmentation.upernet import check_head
from simmim.finetune.self_training.settings import check_has_unlabeled, check_unlabeled_column
from simmim.finetune.settings import EncoderSettings, OptimSettings, TransferSettings

INFERENCES = ("auto", "whole", "slide")


@dataclass(frozen=True)
class SceneSettings(ScaledScenesSettings):
    """The labeled images, the classes, and how training varies them.

    Args:
        path: folder with images/ and masks/ whose files have the same names, or with train/ and val/ (or test/) that have
            these; or a CSV file of the paths of images and label maps, Parquet files, a saved datasets folder, a hub id.
        unlabeled: images without labels to learn from too (see self_training): a folder, or any other source that
            pre-training reads. Labeled and validation images among them are left out.
        unlabeled_column: holds the unlabeled images, in sources with columns; detected by default.
        mask_column: holds the label maps, in sources with columns; detected by default.
        classes: names in the order of the values; by default those in PATH/classes.txt, one per line, or else the values
            that occur.
        values: value of each class in the label maps; 0, 1, … by default.
        ignore_index: value of ignored pixels in the label maps; -1 for none.
        crop_class_share: crops in which one class has a larger share are drawn again, up to ten times.
        inference: whole, slide (windows of image_size that overlap by a third, logits averaged), or auto: whole up to four
            times the area of image_size.
    """

    unlabeled: str | None = None
    unlabeled_column: str | None = None
    mask_column: str | None = None
    classes: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    ignore_index: int = 255
    crop_class_share: float = 0.75
    inference: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("classes", "values"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 < self.crop_class_share <= 1:
            raise ValueError(f"data.crop_class_share is {self.crop_class_share}: give a share in (0, 1], 1 for any crop")
        check_inference(self.inference, INFERENCES)
        check_unlabeled_column(self.unlabeled, self.unlabeled_column)


@dataclass(frozen=True)
class HeadSettings:
    """The head, UPerNet, and its auxiliary head.

    Args:
        width: channels of the head; by default 512 as published, 64 for nano and micro.
        norm: batch, as published (over all devices with trainer.sync_batchnorm), or image, for small batches; by default
            batch from 4 images per device and forward pass on.
        dropout: probability that a channel of the fused map is zeroed in training.
        auxiliary: weight of the loss of a second, small head on the last stage but one; 0 for no such head.
    """

    width: int | None = None
    norm: str | None = None
    dropout: float = 0.1
    auxiliary: float = 0.4

    def __post_init__(self) -> None:
        check_head(self.width or 16, self.norm or "batch")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"head.dropout is {self.dropout}: give a share in [0, 1)")
        if self.auxiliary < 0:
            raise ValueError(f"head.auxiliary is {self.auxiliary}: give a weight, 0 for none")


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(TransferSettings):
    """One fine-tuning run for semantic segmentation.

    Args:
        data: the labeled images; in Python a path is enough.
        labels: number of labeled training images, drawn by the seed so that every class is among them; all by default.
        class_weights: none, or balanced: the loss of a pixel is weighted by one over the root of its class's share.
        head: the head.
        self_training: how unlabeled images are learned from, where data.unlabeled gives some.
    """

    task: ClassVar[str] = "segmentation"

    data: SceneSettings
    labels: int | None = None
    class_weights: str = "none"
    head: HeadSettings = HeadSettings()
    encoder: EncoderSettings = EncoderSettings()
    optim: OptimSettings = OptimSettings(label_smoothing=0.0)
    self_training: PseudoMaskSettings = PseudoMaskSettings()

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", SceneSettings(self.data))
        if self.class_weights not in ("none", "balanced"):
            raise ValueError(f"class_weights is {self.class_weights!r}: give none or balanced")
        super().__post_init__()
        check_has_unlabeled(self.data.unlabeled, self.self_training)
