"""Settings of self-training."""

from __future__ import annotations

from dataclasses import dataclass

from simmim.finetune.augment.color import MAX_MAGNITUDE
from simmim.messages import did_you_mean

ALIGNMENTS = ("labels", "uniform", "none")


@dataclass(frozen=True)
class SelfTrainingSettings:
    """How the images of data.unlabeled are learned from.

    Args:
        ratio: unlabeled images per labeled one in a step.
        start: share of the steps that are taken on labels alone, before there are pseudo-labels.
        weight: of the loss of the pseudo-labels. It is reached in as many steps as `start` takes.
        alignment: shares of the classes that the predictions for unlabeled images are drawn to: those of the labels,
            uniform, or none, where neither tells them.
        affine: factor of data.affine in the strong views; by default 1, and 1.5 for gray images up to 64 px, mostly signs.
        rand_augment: magnitude of RandAugment in the strong views, 0 to 10; by default 9, and 0 for gray images up to 64 px.
        erasing: probability that a box of a strong view is erased; by default 0.5.
    """

    ratio: int | None = None
    start: float = 0.05
    weight: float = 1.0
    alignment: str = "labels"
    affine: float | None = None
    rand_augment: float | None = None
    erasing: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.ratio < 1:
            raise ValueError(f"self_training.ratio is {self.ratio}: give 1 unlabeled image per labeled one, or more")
        if not 0 <= self.start <= 1:
            raise ValueError(f"self_training.start is {self.start}: give a share of the steps, from 0 to 1")
        if self.weight <= 0 or (self.affine or 0) < 0:
            raise ValueError(
                f"self_training.weight is {self.weight} and self_training.affine {self.affine}: give a positive weight and "
                "a factor from 0 on"
            )
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"unknown self_training.alignment {self.alignment!r}{did_you_mean(self.alignment, ALIGNMENTS)}")
        if not 0 <= (self.rand_augment or 0) <= MAX_MAGNITUDE:
            raise ValueError(f"self_training.rand_augment is {self.rand_augment}: give a number from 0 to {MAX_MAGNITUDE:g}")
        if not 0 <= (self.erasing or 0) <= 1:
            raise ValueError(f"self_training.erasing is {self.erasing}: give a probability")
