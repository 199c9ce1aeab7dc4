"""Tasks whose labels are places in images, in a study: a number of labeled images, every class among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from simmim.data.scene_draws import SceneDraw, SceneSource
from simmim.finetune.label_study.results import Measure
from simmim.finetune.label_study.settings import ALL, StudyFields, count_parts
from simmim.finetune.label_study.task_study import OpenedLabels, TaskStudy, validation_seed_of
from simmim.finetune.settings import PUBLISHED_LAYER_DECAY


@dataclass(frozen=True, kw_only=True)
class SceneStudyFields(StudyFields):
    """What a study of labeled scenes varies.

    Args:
        disjoint: the draws of different seeds share no image: the training images are divided among the seeds.
    """

    disjoint: bool = False  # type: ignore[misc]

    def check_study(self) -> None:
        """As of `StudyFields`.

        Raises:
            ValueError: naming the setting.
        """
        super().check_study()
        if self.data.pool is not None:  # type: ignore[attr-defined]
            raise ValueError("data.pool is set by the study: disjoint divides the training images among the seeds")


def scene_study(
    settings: type,
    measure: Measure,
    read_labels: Callable[[Any], Any],
    measure_of: Callable[[Any], Measure] | None = None,
    layer_decay: float = PUBLISHED_LAYER_DECAY,
) -> TaskStudy:
    """The study of a task.

    Args:
        settings: of its study.
        read_labels: of settings of a run: its scenes with `train`, `validation`, `test_validates` and `source`.
        measure_of: as of `TaskStudy`.
        layer_decay: of a run, whatever the number of labels.
    """
    open_labels = partial(open_scene_labels, read_labels=read_labels)
    return TaskStudy(settings, measure, lambda labels: layer_decay, open_labels, measure_of=measure_of)


def published_layer_decay(labels: float) -> float:
    """The layer decay of a run, whatever the number of labels."""
    return PUBLISHED_LAYER_DECAY


def open_scene_labels(settings: Any, read_labels: Callable[[Any], Any]) -> OpenedLabels:
    """All labeled scenes, and the numbers of labels for which there are enough.

    Raises:
        ValueError: when the labels cannot be read, a number is too small to have every class, or none is left.
    """
    return opened_labels(settings, *read_study_scenes(settings, read_labels))


def read_study_scenes(settings: Any, read_labels: Callable[[Any], Any]) -> tuple[Any, int | None]:
    """All labeled scenes, and the seed of the fifth that is held out once; None where the source has a validation part.

    Raises:
        ValueError: when the labels cannot be read.
    """
    run = settings.run_settings()
    scenes = read_labels(run)
    validation_seed = validation_seed_of(settings, scenes.source.has_validation)
    if validation_seed is not None:
        scenes = read_labels(replace(run, data=replace(run.data, validation_seed=validation_seed)))
    return scenes, validation_seed


def opened_labels(settings: Any, scenes: Any, validation_seed: int | None) -> OpenedLabels:
    """What a study knows of the scenes of `read_study_scenes`.

    Raises:
        ValueError: as `available_labels`.
    """
    labels = available_labels(settings, scenes.source, validation_seed)
    return OpenedLabels(scenes.train, scenes.validation, labels, validation_seed, scenes.test_validates)


def draw_of(settings: Any, seed: int, validation_seed: int | None) -> SceneDraw:
    """How the scenes of a judged run are drawn."""
    seeds = settings.all_seeds
    pool = (seeds.index(seed), len(seeds)) if settings.disjoint else None
    return replace(settings.data.draw(), validation_seed=validation_seed, pool=pool)


def available_labels(settings: Any, source: SceneSource, validation_seed: int | None) -> dict[int | str, float]:
    """The numbers of labels that there are for every seed, in ascending order, as of `StudyResult`; prints the others.

    Raises:
        ValueError: when no number is left, or one is too small to have every class, or of too few files to choose rates by.
    """
    seeds = settings.all_seeds
    draws = [draw_of(settings, seed, validation_seed) for seed in seeds]
    most = min(len(source.choose(None, seed, draw).train) for seed, draw in zip(seeds, draws))
    labels = {value: float(most) if value == ALL else value for value in settings.labels}
    for value in [value for value in labels if value != ALL and value > most]:
        print(f"left out   {value} labeled images: there are {most}{' for each seed' * settings.disjoint}")
        del labels[value]
    if not labels:
        raise ValueError(
            f"{min(settings.labels)} labeled images asked for, there are {most} to train on"
            f"{' for each of the seeds, which share none' * settings.disjoint}: give up to {most}, or {ALL}"
        )
    for value, count in labels.items():
        num_parts = count_parts(settings.folds, value, count)
        for seed, draw in zip(seeds, draws):
            fold = (0, num_parts) if seed in settings.divided_seeds and num_parts > 1 else None
            source.choose(None if value == ALL else int(value), seed, replace(draw, fold=fold))
    return dict(sorted(labels.items(), key=lambda item: item[1]))
