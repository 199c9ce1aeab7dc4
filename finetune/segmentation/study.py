"""Segmentation in a study: mean IoU by labeled images, with and without unlabeled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from simmim.finetune.dense.study import (
    SceneStudyFields,
    draw_of,
    opened_labels,
    published_layer_decay,
    read_study_scenes,
)
from simmim.finetune.label_study.arms import Arm
from simmim.finetune.label_study.results import SCENES, Measure
from simmim.finetune.label_study.settings import ALL, SEMI, SemiStudyFields
from simmim.finetune.label_study.task_study import OpenedLabels, TaskStudy
from simmim.finetune.label_study.unlabeled import find_unlabeled
from simmim.finetune.segmentation.preparation import read_labels
from simmim.finetune.segmentation.self_training.defaults import resolve_self_training
from simmim.finetune.segmentation.settings import SegmentationSettings
from simmim.finetune.self_training.unlabeled import check_channels
from simmim.finetune.start import Start, measure_training_images

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True)
class SegmentationStudySettings(SegmentationSettings, SceneStudyFields, SemiStudyFields):
    """Mean IoU against labeled images: pre-trained, from scratch and other encoders, several seeds each.

    Args:
        task: what is learned: classification, segmentation, detection.
        labels: numbers of labeled images, separated by commas; all is every training image.
    """

    may_change_on_resume: ClassVar[tuple[str, ...]] = SemiStudyFields.may_change_on_resume
    run_class: ClassVar[type] = SegmentationSettings

    task: str = "segmentation"  # type: ignore[misc]
    labels: str | int | tuple[Any, ...] = (20, 100)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_study()


class DrawnScenes(NamedTuple):
    """The scenes of a run; attributes as of `LabeledScenes`."""

    train: datasets.Dataset
    validation: datasets.Dataset


def open_labels(settings: SegmentationStudySettings) -> OpenedLabels:
    """The labeled scenes and the unlabeled images.

    Raises:
        ValueError: when they cannot be read, or no number of labels is left.
    """
    scenes, validation_seed = read_study_scenes(settings, read_labels)
    opened = opened_labels(settings, scenes, validation_seed)
    if settings.data.unlabeled is None:
        return opened
    # `scenes.train` has some rows of the source, where a fifth is held out.
    rows = scenes.source.hold_out(settings.seed, draw_of(settings, settings.seed, validation_seed)).train
    position = {row: number for number, row in enumerate(rows)}

    def draw(value: int | str, seed: int) -> DrawnScenes:
        how = draw_of(settings, seed, validation_seed)
        chosen = scenes.source.choose(None if value == ALL else int(value), seed, how).train
        return DrawnScenes(scenes.train.select([position[row] for row in chosen]), scenes.validation)

    reading = measure_training_images(settings.run_settings(), opened.train).reading
    found = find_unlabeled(settings, opened.labels, draw, reading, MEASURE.unit)
    return replace(opened, used_up=found.used_up, notes=(*opened.notes, *found.notes(settings)), own=found.unlabeled)


def check_start(arm: Arm, start: Start, opened: OpenedLabels, device: str) -> None:
    """Refuse unlabeled images that cannot be learned from.

    Raises:
        ValueError: as `check_channels` and `resolve_self_training`.
    """
    if arm.recipe == SEMI:
        config, unlabeled = start.encoder.config, opened.own
        check_channels(unlabeled, config.in_channels)
        resolve_self_training(start.settings, len(opened.train), len(unlabeled.images), config, device)  # type: ignore[arg-type]


MEASURE = Measure("mean_iou", "Mean IoU", "validation_loss", "cross_entropy", "labels", *SCENES)
STUDY = TaskStudy(SegmentationStudySettings, MEASURE, published_layer_decay, open_labels, check_start)
