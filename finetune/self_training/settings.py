"""Settings of self-training that every task has."""

from __future__ import annotations

from dataclasses import dataclass

from simmim.finetune.augment.color import MAX_MAGNITUDE
from simmim.messages import did_you_mean

ALIGNMENTS = ("labels", "uniform", "none")


@dataclass(frozen=True)
class SelfTrainingFields:
    """How the images of data.unlabeled are learned from, whatever the task.

    Args:
        ratio: unlabeled images per labeled one in a step.
        start: share of the steps that are taken on labels alone, before there are pseudo-labels.
        weight: of the loss of the pseudo-labels. It is reached in as many steps as `start` takes.
        alignment: shares of the classes that the predictions for unlabeled images are drawn to: those of the labels,
            uniform, or none, where neither tells them.
    """

    ratio: int | None = None
    start: float = 0.05
    weight: float = 1.0
    alignment: str = "labels"

    def __post_init__(self) -> None:
        if self.ratio is not None and self.ratio < 1:
            raise ValueError(f"self_training.ratio is {self.ratio}: give 1 unlabeled image per labeled one, or more")
        if not 0 <= self.start <= 1:
            raise ValueError(f"self_training.start is {self.start}: give a share of the steps, from 0 to 1")
        if self.weight <= 0:
            raise ValueError(f"self_training.weight is {self.weight}: give a positive weight")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"unknown self_training.alignment {self.alignment!r}{did_you_mean(self.alignment, ALIGNMENTS)}")

    def check_strong_views(self, magnitude: float | None, **probabilities: float | None) -> None:
        """Check what changes the student's views.

        Args:
            magnitude: of RandAugment.
            probabilities: by the names of their settings.

        Raises:
            ValueError: naming the setting.
        """
        if not 0 <= (magnitude or 0) <= MAX_MAGNITUDE:
            raise ValueError(f"self_training.rand_augment is {magnitude}: give a number from 0 to {MAX_MAGNITUDE:g}")
        for name, value in probabilities.items():
            if not 0 <= (value or 0) <= 1:
                raise ValueError(f"self_training.{name} is {value}: give a probability")


def check_unlabeled_column(unlabeled: str | None, column: str | None) -> None:
    """Refuse a column of unlabeled images without these.

    Raises:
        ValueError: naming data.unlabeled.
    """
    if column is not None and unlabeled is None:
        raise ValueError("data.unlabeled_column is about unlabeled images: give them by data.unlabeled, or leave it out")


def check_has_unlabeled(unlabeled: str | None, chosen: SelfTrainingFields) -> None:
    """Refuse settings of self-training without unlabeled images.

    Raises:
        ValueError: naming data.unlabeled.
    """
    if unlabeled is None and chosen != type(chosen)():
        raise ValueError("self_training is about unlabeled images: give them by data.unlabeled, or leave it out")
