"""Accuracy against the number of labels, for several arms: what pre-training gains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from simmim.checkpoints import read
from simmim.checkpoints.checkpoint import Checkpoint
from simmim.data import LabeledImages, LabeledSource, available_cores, measure_for_encoder, open_labeled_source
from simmim.evaluate import facts_of_checkpoint, facts_table
from simmim.finetune.classification.defaults import NO_RAND_AUGMENT, resolve_augmentation
from simmim.finetune.classification.self_training.defaults import resolve_self_training
from simmim.finetune.classification.self_training.prepare import check_channels
from simmim.finetune.classification.self_training.unlabeled import UnlabeledImages
from simmim.finetune.freezing import frozen_parts
from simmim.finetune.label_study.arms import Arm, build_arms, fingerprint_of
from simmim.finetune.label_study.report import check_libraries, write_report
from simmim.finetune.label_study.results import Rates, StudyResult
from simmim.finetune.label_study.settings import ALL, PLAIN, PRETRAINED, SEMI, StudySettings
from simmim.finetune.label_study.trials import LeftOut, Tuning, run_arms, tuning_cost
from simmim.finetune.label_study.unlabeled import find_unlabeled
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
    prepared = prepare_study(settings)
    settings, arms, labels, left_out = prepared.settings, prepared.arms, prepared.labels, prepared.left_out
    tuning = Tuning(rate_grid(settings), settings.folds, settings.tuning_seeds, prepared.tuned)
    with locked_run_folder(settings) as folder:
        print(f"runs       {tuning_cost(tuning, arms, labels, seeds_of(settings), left_out)}", flush=True)
        result = run_arms(
            arms, labels, seeds_of(settings), folder, settings.processes, tuning, settings.keep_weights, left_out=left_out
        )
        result = replace(result, judged_by=prepared.judged_by, notes=prepared.notes, facts=prepared.facts)
        write_report(result, folder)
    return result


@dataclass(frozen=True)
class PreparedStudy:
    """What a study needs beside its folder.

    Attributes:
        settings: with the number of processes resolved.
        arms: that are judged.
        tuned: arms that choose rates, for themselves and for those that take theirs.
        labels, judged_by, notes, facts: as of `StudyResult`.
        left_out: as of `run_arms`.
    """

    settings: StudySettings
    arms: Sequence[Arm]
    tuned: Sequence[Arm]
    labels: dict[int | str, float]
    judged_by: str
    left_out: Collection[LeftOut] = ()
    notes: tuple[str, ...] = ()
    facts: str = ""


def seeds_of(settings: StudySettings) -> range:
    """The seeds of the judged runs."""
    return range(settings.seed, settings.seed + settings.seeds)


def prepare_study(settings: StudySettings) -> PreparedStudy:
    """Read labels, encoders and unlabeled images, and check that every run can start.

    Prints which images judge, which numbers of labels are left out because there are too few images, and what is left out
    of the unlabeled images.

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
    checkpoints = {name: read(path) for name, path in settings.start_names().items()}
    small, device = checkpoints[PRETRAINED].config.is_small, device_type()
    processes = settings.processes or (available_cores() if small and device == "cpu" else 1)
    settings = replace(settings, processes=processes)
    # Of the arms alone: as a setting of the study it would stand in its folder as if the user had given it.
    judged_alike = replace(settings, data=replace(data, validation_seed=validation_seed))
    fingerprints = {name: fingerprint_of(checkpoint.encoder) for name, checkpoint in checkpoints.items()}
    arms = build_arms(judged_alike, fingerprints)
    tuned = [arm for arm in arms if not arm.rates_of] or build_arms(judged_alike, fingerprints, (PLAIN,))
    found = None
    if data.unlabeled is not None:
        reading = measure_for_encoder(images.train, find_reading(settings)).reading
        found = find_unlabeled(settings, source, labels, validation_seed, reading)
    check_starts(arms, images, found.unlabeled if found else None, device)
    report_shared(images.validation, {f"the pre-training images of {settings.init}": pretraining_images(settings.init)})
    facts = encoder_facts(settings, checkpoints)
    if not found:
        return PreparedStudy(settings, arms, tuned, labels, judged_by, facts=facts)
    left_out = {(arm.name, value) for arm in arms if arm.recipe == SEMI for value in found.used_up}
    return PreparedStudy(settings, arms, tuned, labels, judged_by, left_out, found.notes(settings), facts)


def encoder_facts(settings: StudySettings, checkpoints: Mapping[str, Checkpoint]) -> str:
    """A table of what each encoder is and costs at the image size of its runs."""
    facts = []
    for checkpoint in checkpoints.values():
        size = checkpoint.preprocessing.image_size if settings.image_size is None else settings.size
        preprocessing = replace(checkpoint.preprocessing, image_size=size)
        facts.append(facts_of_checkpoint(replace(checkpoint, preprocessing=preprocessing)))
    return facts_table([*checkpoints], facts)


def check_starts(arms: Sequence[Arm], images: LabeledImages, unlabeled: UnlabeledImages | None, device: str) -> None:
    """A run that cannot start is an error now, not in the first trial.

    Raises:
        ValueError: as `find_start`, `check_channels` and `resolve_self_training`.
    """
    statistics = {}
    for arm in arms:
        if arm.start not in statistics:
            statistics[arm.start] = measure_for_encoder(images.train, find_reading(arm.settings))
        start = find_start(arm.settings, statistics[arm.start], device)
        frozen_parts(start.encoder, arm.settings.freeze, arm.settings.train_stages)
        tell_what_runs_lack(start)
        if arm.recipe == SEMI and unlabeled is not None:
            config, count = start.encoder.config, len(unlabeled.images)
            check_channels(unlabeled, config.in_channels)
            resolve_self_training(start.settings, len(images.train), count, config, device)  # type: ignore[arg-type]


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


def rate_grid(settings: StudySettings) -> tuple[Rates, ...]:
    """The rates among which every arm chooses."""
    # Of a frozen encoder the head alone is trained, which no layer decay reaches.
    decays: tuple[float | str | None, ...] = () if settings.freeze else settings.layer_decays
    decays = tuple(dict.fromkeys(decays)) or (settings.optim.layer_decay,)
    return tuple(Rates(factor, decay) for factor, decay in product(sorted(set(settings.lr_factors)), decays))
