"""Settings of classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simmim.data import check_num_views
from simmim.encoders.heads import HEADS
from simmim.finetune.augment.affine import AffineSettings
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.augment.color import MAX_MAGNITUDE, ColorSettings
from simmim.finetune.augment.mixing import MixSettings
from simmim.finetune.classification.self_training.settings import SelfTrainingSettings
from simmim.finetune.self_training.settings import check_has_unlabeled, check_unlabeled_column
from simmim.finetune.settings import LabeledDataSettings, TransferSettings
from simmim.messages import did_you_mean

BALANCES = ("none", "weights", "sampling")
MONITORS = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class LabeledSettings(LabeledDataSettings):
    """The labeled images and how they are augmented.

    Args:
        path: folder with a folder per class, or with train and val (or test) folders that have them; or a CSV file of paths
            and labels, Parquet files, a saved datasets folder, a hub id.
        unlabeled: images without labels to learn from too (see self_training): a folder, or any other source that
            pre-training reads. Labeled and validation images among them are left out.
        unlabeled_column: holds the unlabeled images, in sources with columns; detected by default.
        label_column: holds the labels, in sources with columns; detected by default.
        balance: for classes of different sizes: none; weights, to weight the loss of each image by the rarity of its class;
            sampling, to show all classes equally often, images of rare classes repeatedly.
        crop_scale: range of the random crop's share of the image's area; by default it follows from image size and labels.
        crop_ratio: range of the crop's width over height.
        flip: probability of mirroring left and right; by default 0.5, and 0 for gray images up to 64 px, mostly signs.
        affine: small random rotations, zooms, shears and shifts.
        rand_augment: magnitude of RandAugment, 0 to 10, 0 for none; by default it follows from image size and labels.
        rand_augment_operations: number of operations per image.
        rand_augment_spread: standard deviation of the magnitude.
        color_jitter: brightness, contrast and saturation are scaled by 1 − color_jitter to 1 + color_jitter; 0 by default.
        erasing: probability that a box is filled with noise; by default it follows from image size and labels.
        mixup: α of the distribution Beta(α, α) of the shares of two blended images, 0 for none; by default it follows from
            image size and labels.
        cutmix: the same for a box of one image that is pasted into another.
        mix_probability: share of the images that are mixed.
        evaluation_crop: share of the sides of the crops that evaluation sees; by default 0.75 with few labels, 1 where
            training sees whole images, else as published: 0.875, and 1 for images up to 64 px.
        evaluation_views: crops over which evaluation averages: 1, the central one; 5, also those in the corners; 10, also
            all of them mirrored. Validation and predictions take as many times the inference. By default 5 with few labels
            where evaluation_crop is not given, else 1.
        fold: cross-validation, as (part, number of parts): train on the labels of all parts but this one, counted from 0,
            and validate with it. The validation images are not used.
        validation_seed: draws the fifth of each class to validate with, where the images have no validation part; by default
            seed draws it, so that each seed has its own. A study holds one fifth out for all its runs.
    """

    unlabeled: str | None = None
    unlabeled_column: str | None = None
    label_column: str | None = None
    balance: str = "none"
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    flip: float | None = None
    affine: AffineSettings = AffineSettings(degrees=15, zoom=0.15, shear=0.2, shift=0.06)
    rand_augment: float | None = None
    rand_augment_operations: int = 2
    rand_augment_spread: float = 0.5
    color_jitter: float | None = None
    erasing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    mix_probability: float = 1.0
    evaluation_crop: float | None = None
    evaluation_views: int | None = None
    fold: tuple[int, int] | None = None
    validation_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_scale", "crop_ratio"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.fold is not None:
            object.__setattr__(self, "fold", tuple(self.fold))
            part, parts = self.fold
            if not 0 <= part < parts or parts < 2:
                raise ValueError(f"data.fold is {self.fold}: give (part, parts), 0 <= part < parts, 2 parts or more")
        low, high = self.crop_scale or (1.0, 1.0)
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale is {self.crop_scale}: give shares of the area, 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio is {self.crop_ratio}: give width over height, 0 < low <= high")
        for name in ("flip", "erasing", "mix_probability"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}: give a probability")
        for name, limit in (("rand_augment", MAX_MAGNITUDE), ("color_jitter", 1), ("mixup", 100), ("cutmix", 100)):
            if not 0 <= (getattr(self, name) or 0) <= limit:
                raise ValueError(f"data.{name} is {getattr(self, name)}: give a number from 0, for none, to {limit:g}")
        if self.rand_augment_operations < 1 or self.rand_augment_spread < 0:
            raise ValueError(
                f"data.rand_augment_operations is {self.rand_augment_operations} and data.rand_augment_spread "
                f"{self.rand_augment_spread}: give 1 operation or more, a deviation from 0 on"
            )
        if self.balance not in BALANCES:
            raise ValueError(f"unknown data.balance {self.balance!r}{did_you_mean(self.balance, BALANCES)}")
        check_unlabeled_column(self.unlabeled, self.unlabeled_column)
        if self.evaluation_crop is not None and not 0 < self.evaluation_crop <= 1:
            raise ValueError(f"data.evaluation_crop is {self.evaluation_crop}: give a share of the sides in (0, 1]")
        if self.evaluation_views is not None:
            check_num_views(self.evaluation_views, "data.evaluation_views")

    def changes(self) -> BatchChanges:
        """The random changes of training batches, once resolved."""
        color = ColorSettings(
            self.rand_augment or 0.0, self.rand_augment_operations, self.rand_augment_spread, self.color_jitter or 0.0
        )
        mixing = MixSettings(self.mixup or 0.0, self.cutmix or 0.0, self.mix_probability)
        return BatchChanges(self.affine, color, self.erasing or 0.0, mixing)


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(TransferSettings):
    """One fine-tuning run for classification.

    Args:
        data: the labeled images; in Python a path is enough.
        labels_per_class: number of training images per class, drawn by the seed; all of a class that has fewer. All by
            default.
        head: linear, on the mean over the last map; or attentive: a few learned queries attend over all of its tokens.
        monitor: metric by which the best model is chosen: accuracy, or macro_f1, in which all classes have the same weight.
        self_training: how unlabeled images are learned from, where data.unlabeled gives some.
    """

    task: ClassVar[str] = "classification"

    data: LabeledSettings
    labels_per_class: int | None = None
    head: str = "linear"
    monitor: str = "accuracy"
    self_training: SelfTrainingSettings = SelfTrainingSettings()

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", LabeledSettings(self.data))
        super().__post_init__()
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}{did_you_mean(self.head, HEADS)}")
        if self.monitor not in MONITORS:
            raise ValueError(f"unknown monitor {self.monitor!r}{did_you_mean(self.monitor, MONITORS)}")
        check_has_unlabeled(self.data.unlabeled, self.self_training)
