"""Settings of classification."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finetune.augment import AffineSettings
from finetune.settings import TransferSettings


@dataclass(frozen=True)
class LabeledSettings:
    """The labeled images and how they are augmented.

    Args:
        path: folder with a folder for each class, or with train and val (or test) folders that have them; or a CSV file of
            paths and labels, Parquet files, a saved datasets folder, a hub id.
        column: which holds the images, in sources that have columns; found by default.
        label_column: which holds the labels; found by default.
        strict: stop at the first image that cannot be read.
        max_skipped_share: stop when a larger share of the training images cannot be read.
        crop_scale: range of the random crop's share of the image's area.
        crop_ratio: range of the crop's width over height.
        flip: probability of mirroring left and right.
        affine: small random rotations, zooms, shears and shifts.
        evaluation_crop: share of the sides that validation sees; by default 0.875, for images up to 64 px all.
    """

    path: str
    column: str | None = None
    label_column: str | None = None
    strict: bool = False
    max_skipped_share: float = 0.05
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    flip: float = 0.5
    affine: AffineSettings = AffineSettings(degrees=10, zoom=0.1, shear=0.1, shift=0.05)
    evaluation_crop: float | None = None

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale is {self.crop_scale}: give shares of the area, 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio is {self.crop_ratio}: give width over height, 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}: give a probability")
        if self.evaluation_crop is not None and not 0 < self.evaluation_crop <= 1:
            raise ValueError(f"data.evaluation_crop is {self.evaluation_crop}: give a share of the sides in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TransferSettings):
    """One fine-tuning run for classification.

    Args:
        data: the labeled images; in Python a path alone will do.
        labels_per_class: use so many training images of each class, drawn by the seed; all by default.
    """

    task: ClassVar[str] = "classification"

    data: LabeledSettings
    labels_per_class: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", LabeledSettings(self.data))
        super().__post_init__()

    def label_provenance(self) -> dict:
        """How many labels of each class."""
        return {"labels_per_class": self.labels_per_class}
