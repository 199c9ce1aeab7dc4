"""Classification in a study: accuracy by labels per class, with and without unlabeled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from simmim.data import LabeledImages, open_labeled_source
from simmim.data.held_out import number_files
from simmim.data.labels import class_indices, describe_shortage
from simmim.finetune.classification.defaults import NO_RAND_AUGMENT, default_layer_decay, resolve_augmentation
from simmim.finetune.classification.folds import fewest_files
from simmim.finetune.classification.self_training.defaults import resolve_self_training
from simmim.finetune.label_study.arms import Arm
from simmim.finetune.label_study.results import Measure
from simmim.finetune.label_study.settings import ALL, SEMI, StudySettings, count_parts
from simmim.finetune.label_study.task_study import OpenedLabels, TaskStudy, validation_seed_of
from simmim.finetune.label_study.unlabeled import find_unlabeled
from simmim.finetune.self_training.unlabeled import check_channels
from simmim.finetune.start import Start, find_reading, measure_training_images
from simmim.messages import counted, notify
from simmim.reading import AUTO

Draw = Callable[[int | str, int], LabeledImages]


def open_labels(settings: StudySettings) -> OpenedLabels:
    """The labels and the unlabeled images.

    Raises:
        ValueError: when they cannot be read, or no number of labels is left.
    """
    data = settings.data
    source = open_labeled_source(data.path, data.column, data.label_column, find_reading(settings) or AUTO)
    validation_seed = validation_seed_of(settings, source.validation is not None)
    images = source.draw(None, settings.seed, validation_seed)
    counts = np.bincount(class_indices(images.train), minlength=len(images.classes))
    labels = available_labels(settings, counts)

    def draw(value: int | str, seed: int) -> LabeledImages:
        return source.draw(None if value == ALL else int(value), seed, validation_seed)

    has_pages = number_files(images.train) is not None
    notes = (*shortage_notes(labels, counts), *(few_files_notes(settings, labels, draw) if has_pages else ()))
    opened = OpenedLabels(images.train, images.validation, labels, validation_seed, source.test_validates, notes=notes)
    if data.unlabeled is None:
        return opened
    reading = measure_training_images(settings, images.train).reading
    found = find_unlabeled(settings, labels, draw, reading, MEASURE.unit)
    return replace(opened, used_up=found.used_up, notes=(*notes, *found.notes(settings)), own=found.unlabeled)


def available_labels(settings: StudySettings, counts: np.ndarray) -> dict[int | str, float]:
    """The numbers of labels that some class has, in ascending order, as of `StudyResult`; prints the others, and those for
    which classes have fewer.

    Args:
        counts: (classes,) training images of each class.

    Raises:
        ValueError: when no number is left.
    """
    most = int(counts.max())
    labels: dict[int | str, float] = {}
    asked: tuple[Any, ...] = settings.labels  # type: ignore[assignment]
    for value in asked:
        if value == ALL:
            labels[value] = float(counts.mean())
        elif value > most:
            print(f"left out   {counted(value, 'label')} per class: no class has more than {counted(most, 'image')}")
        elif value > counts.min():
            labels[value] = float(np.minimum(counts, value).mean())
            print(f"at most    {describe_shortage(counts, value)}")
        else:
            labels[value] = value
    if not labels:
        raise ValueError(
            f"{counted(asked[0], 'label')} per class asked for, no class has more than {counted(most, 'training image')}: "
            f"give up to {most}, or {ALL}"
        )
    return dict(sorted(labels.items(), key=lambda item: item[1]))


def shortage_notes(labels: Mapping[int | str, float], counts: np.ndarray) -> tuple[str, ...]:
    """What the report says of numbers of labels that not every class has.

    Args:
        labels: as of `available_labels`.
        counts: (classes,) training images of each class.
    """
    notes = [f"With {describe_shortage(counts, int(value))}." for value in labels if value != ALL and value > counts.min()]
    if counts.min() == 1:
        notes.append("A class with a single label is never held out to choose rates.")
    return tuple(notes)


def few_files_notes(settings: StudySettings, labels: Mapping[int | str, float], draw: Draw) -> tuple[str, ...]:
    """What the report says of classes whose labels are pages of fewer files than the parts that choose rates.

    Args:
        labels: as of `available_labels`.
        draw: what a run with a number of labels, or "all", and a seed learns from.

    Raises:
        ValueError: as `assign_folds`, before anything is run.
    """
    few = []
    for value, per_class in labels.items():
        num_parts = count_parts(settings.folds, value, per_class)
        drawn = [draw(value, seed) for seed in settings.divided_seeds] if num_parts > 1 else []
        counts = [fewest_files(images, num_parts, seed) for images, seed in zip(drawn, settings.divided_seeds)]
        if any(count is not None and count < num_parts for count in counts):
            few.append(str(value))
    if not few:
        return ()
    return (
        f"Pages of one file are held out together to choose rates. With {', '.join(few)} labels per class some classes are "
        "pages of fewer files than there are parts, and missing in some of them; a class of one file is never held out.",
    )


def check_start(arm: Arm, start: Start, opened: OpenedLabels, device: str) -> None:
    """Tell what runs lack, and refuse unlabeled images that cannot be learned from.

    Raises:
        ValueError: as `check_channels` and `resolve_self_training`.
    """
    tell_what_runs_lack(start)
    if arm.recipe == SEMI:
        config, unlabeled = start.encoder.config, opened.own
        check_channels(unlabeled, config.in_channels)
        resolve_self_training(start.settings, len(opened.train), len(unlabeled.images), config, device)  # type: ignore[arg-type]


def tell_what_runs_lack(start: Start) -> None:
    """A notice, since the runs of a study print nothing themselves."""
    data, side_px, channels = start.settings.data, min(start.preprocessing.image_size), start.encoder.config.in_channels
    _, reasons = resolve_augmentation(data, side_px, channels, per_class=1.0)  # type: ignore[arg-type]
    if NO_RAND_AUGMENT in reasons:
        notify(f"{NO_RAND_AUGMENT}; none of the study's runs has it")


MEASURE = Measure()
STUDY = TaskStudy(StudySettings, MEASURE, default_layer_decay, open_labels, check_start)
