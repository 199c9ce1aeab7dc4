"""Settings of self-training in classification."""

from __future__ import annotations

from dataclasses import dataclass

from simmim.finetune.self_training.settings import SelfTrainingFields


@dataclass(frozen=True)
class SelfTrainingSettings(SelfTrainingFields):
    """How the images of data.unlabeled are learned from.

    Args:
        affine: factor of data.affine in the strong views; by default 1, and 1.5 for gray images up to 64 px, mostly signs.
        rand_augment: magnitude of RandAugment in the strong views, 0 to 10; by default 9, and 0 for gray images up to 64 px.
        erasing: probability that a box of a strong view is erased; by default 0.5.
    """

    affine: float | None = None
    rand_augment: float | None = None
    erasing: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.affine or 0) < 0:
            raise ValueError(f"self_training.affine is {self.affine}: give a factor from 0 on")
        self.check_strong_views(self.rand_augment, erasing=self.erasing)
