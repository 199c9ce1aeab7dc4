"""Accuracy against the number of labels, for several arms: what pre-training gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np

from simmim.checkpoints import read
from simmim.data import LabeledImages, LabeledSource, available_cores, measure_for_encoder, open_labeled_source
from simmim.finetune.classification.defaults import NO_RAND_AUGMENT, resolve_augmentation
from simmim.finetune.freezing import frozen_parts
from simmim.finetune.label_study.arms import Arm, fingerprint_of, scratch_settings
from simmim.finetune.label_study.report import check_libraries, write_report
from simmim.finetune.label_study.results import Rates, StudyResult
from simmim.finetune.label_study.settings import ALL, StudySettings
from simmim.finetune.label_study.trials import Tuning, run_arms, tuning_cost
from simmim.finetune.start import Start, find_reading, find_start
from simmim.messages import notify
from simmim.reading import AUTO
from simmim.training.run_folder import check_run_folder, locked_run_folder
from simmim.training.shared_images import pretraining_images, report_shared
from simmim.training.trainer import device_type


def study(settings: StudySettings) -> StudyResult:
    """Run a study in its folder, or continue it; writes results.csv, tuning.csv, table.md and study.png there.

    Raises:
        ValueError: for settings, labels or encoders that cannot work, before anything is written where that can be known.
    """
    check_libraries()
    check_run_folder(settings.out, settings.resume, settings.overwrite)
    settings, arms, labels, judged_by = prepare_study(settings)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    tuning = Tuning(rate_grid(settings), settings.folds, settings.tuning_seeds)
    with locked_run_folder(settings) as folder:
        print(f"runs       {tuning_cost(tuning, arms, labels, seeds)}", flush=True)
        result = run_arms(arms, labels, seeds, folder, settings.processes, tuning, settings.keep_weights)
        result = replace(result, judged_by=judged_by)
        write_report(result, folder)
    return result


def prepare_study(settings: StudySettings) -> tuple[StudySettings, list[Arm], dict[int | str, float], str]:
    """Settings with the number of processes resolved, the arms, and the numbers of labels and the judging images as of
    `StudyResult`.

    Prints which images judge, and which numbers of labels are left out because there are too few images.

    Raises:
        ValueError: when the labels or an encoder cannot be read, no number of labels is left, or a run cannot start.
    """
    data = settings.data
    source = open_labeled_source(data.path, data.column, data.label_column, find_reading(settings) or AUTO)
    validation_seed = validation_seed_of(settings, source)
    images = source.draw(None, settings.seed, validation_seed)
    labels = available_labels(settings, images)
    part = f"of the {'test' if source.test_validates else 'validation'} part"
    origin = part if validation_seed is None else f"that seed {validation_seed} holds out once"
    judged_by = f"{len(images.validation):,} images {origin}"
    print(f"judged by  {judged_by}: no trial trains or tunes on them")
    checkpoints = {name: read(path) for name, path in settings.arm_names().items()}
    small, device = checkpoints["pre-trained"].config.is_small, device_type()
    processes = settings.processes or (available_cores() if small and device == "cpu" else 1)
    settings = replace(settings, processes=processes)
    # Of the arms alone: as a setting of the study it would stand in its folder as if the user had given it.
    judged_alike = replace(settings, data=replace(data, validation_seed=validation_seed))
    arms = build_arms(judged_alike, {name: fingerprint_of(checkpoint.encoder) for name, checkpoint in checkpoints.items()})
    for arm in arms:  # a run that cannot start is an error now, not in the first trial
        statistics = measure_for_encoder(images.train, find_reading(arm.settings))
        start = find_start(arm.settings, statistics, device)
        frozen_parts(start.encoder, arm.settings.freeze, arm.settings.train_stages)
        tell_what_runs_lack(start)
    report_shared(images.validation, {f"the pre-training images of {settings.init}": pretraining_images(settings.init)})
    return settings, arms, labels, judged_by


def validation_seed_of(settings: StudySettings, source: LabeledSource) -> int | None:
    """The seed of the fifth that is held out once for all trials; None where the source has a validation part."""
    if source.validation is not None:
        return None
    given = settings.data.validation_seed
    return settings.seed if given is None else given


def tell_what_runs_lack(start: Start) -> None:
    """A notice, since the runs of a study print nothing themselves."""
    data, side_px, channels = start.settings.data, min(start.preprocessing.image_size), start.encoder.config.in_channels
    _, reasons = resolve_augmentation(data, side_px, channels, per_class=1.0)  # type: ignore[arg-type]
    if NO_RAND_AUGMENT in reasons:
        notify(f"{NO_RAND_AUGMENT}; none of the study's runs has it")


def available_labels(settings: StudySettings, images: LabeledImages) -> dict[int | str, float]:
    """The numbers of labels for which every class has images, in ascending order, as of `StudyResult`; prints the others.

    Raises:
        ValueError: when no number is left.
    """
    counts = np.bincount(images.train["label"], minlength=len(images.classes))
    smallest, rarest = int(counts.min()), images.classes[int(counts.argmin())]
    labels = {value: float(counts.mean()) if value == ALL else value for value in settings.labels}
    too_many = [value for value in labels if value != ALL and value > smallest]
    for value in too_many:
        print(f"left out   {value} labels per class: class {rarest!r} has {smallest} images")
        del labels[value]
    if not labels:
        raise ValueError(
            f"{too_many[0]} labels per class asked for, class {rarest!r} has {smallest} training images: "
            f"give up to {smallest}, or {ALL}"
        )
    return dict(sorted(labels.items(), key=lambda item: item[1]))


def build_arms(settings: StudySettings, fingerprints: Mapping[str, int]) -> list[Arm]:
    """An arm per encoder, and one from scratch where it is asked for.

    Args:
        fingerprints: of the encoders' weights, by the names of the arms.
    """
    run = settings.run_settings()
    arms = [Arm(name, replace(run, init=path), fingerprints[name]) for name, path in settings.arm_names().items()]
    if settings.scratch:
        # Its architecture is that of the first arm's encoder.
        arms.append(Arm("from scratch", scratch_settings(run), arms[0].fingerprint))
    return arms


def rate_grid(settings: StudySettings) -> tuple[Rates, ...]:
    """The rates among which every arm chooses."""
    # Of a frozen encoder the head alone is trained, which no layer decay reaches.
    decays: tuple[float | str | None, ...] = () if settings.freeze else settings.layer_decays
    decays = tuple(dict.fromkeys(decays)) or (settings.optim.layer_decay,)
    return tuple(Rates(factor, decay) for factor, decay in product(sorted(set(settings.lr_factors)), decays))
