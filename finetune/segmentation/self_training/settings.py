"""Settings of self-training in segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from simmim.finetune.self_training.settings import SelfTrainingFields


@dataclass(frozen=True)
class PseudoMaskSettings(SelfTrainingFields):
    """How the images of data.unlabeled are learned from, pixel by pixel.

    Args:
        cutmix: probability that a box of another unlabeled image is pasted into the student's view, with its pseudo-labels;
            by default 0.5.
        color_jitter: brightness, contrast and saturation of the student's view are scaled by 1 − color_jitter to
            1 + color_jitter; by default 0.5 where kornia is installed, else 0.
        rand_augment: magnitude of RandAugment's changes of colors in the student's view, 0 to 10; by default 0. Those of its
            operations that move pixels are left out.
    """

    cutmix: float | None = None
    color_jitter: float | None = None
    rand_augment: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_strong_views(self.rand_augment, cutmix=self.cutmix)
        if not 0 <= (self.color_jitter or 0) < 1:
            raise ValueError(f"self_training.color_jitter is {self.color_jitter}: give a share in [0, 1), 0 for none")
