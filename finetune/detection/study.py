"""Detection in a study: average precision by labeled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from simmim.finetune.dense.study import SceneStudyFields, scene_study
from simmim.finetune.detection.defaults import LAYER_DECAY
from simmim.finetune.detection.preparation import read_labels
from simmim.finetune.detection.settings import DetectionSettings
from simmim.finetune.label_study.results import SCENES, Measure
from simmim.finetune.label_study.settings import DEFAULT, MAY_GROW
from simmim.finetune.settings import PUBLISHED_LAYER_DECAY


@dataclass(frozen=True, kw_only=True)
class DetectionStudySettings(DetectionSettings, SceneStudyFields):
    """Average precision against labeled images: pre-trained, from scratch and other encoders, several seeds each.

    It is that of boxes, and with head.masks true that of masks.

    Args:
        task: what is learned: classification, segmentation, detection.
        labels: numbers of labeled images, separated by commas; all is every training image.
        layer_decays: layer decays tried together with each learning rate; default is that of optim, or else none (1). By
            default that and 0.75, as neither is the better one on both sides. Twice as many runs tune as with an empty list,
            which tunes the learning rate alone.
    """

    may_change_on_resume: ClassVar[tuple[str, ...]] = MAY_GROW
    run_class: ClassVar[type] = DetectionSettings

    task: str = "detection"  # type: ignore[misc]
    labels: str | int | tuple[Any, ...] = (20, 100)  # type: ignore[assignment]
    layer_decays: tuple[float | str, ...] = (DEFAULT, PUBLISHED_LAYER_DECAY)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # Every trial measures the same: what its labels hold does not decide.
        object.__setattr__(self, "head", replace(self.head, masks=bool(self.head.masks)))
        super().__post_init__()
        self.check_study()


MEASURE = Measure("ap", "AP", "", "loss", "labels", *SCENES)
MASK_MEASURE = Measure("mask_ap", "AP of masks", "", "loss", "labels", *SCENES)


def measure_of(settings: DetectionSettings) -> Measure:
    """What the trials of a study measure."""
    return MASK_MEASURE if settings.head.masks else MEASURE


STUDY = scene_study(DetectionStudySettings, MEASURE, read_labels, measure_of, LAYER_DECAY)
