"""Accuracy against the number of labels, for several arms: what pre-training gains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from simmim.checkpoints import read
from simmim.checkpoints.checkpoint import Checkpoint
from simmim.data import available_cores
from simmim.data.duplicates import report_shared
from simmim.evaluate import facts_of_checkpoint, facts_table
from simmim.finetune.freezing import frozen_parts
from simmim.finetune.label_study.arms import Arm, build_arms, fingerprint_of
from simmim.finetune.label_study.report import check_libraries, write_report
from simmim.finetune.label_study.results import Rates, StudyResult
from simmim.finetune.label_study.settings import PLAIN, PRETRAINED, SEMI, StudyFields
from simmim.finetune.label_study.task_study import OpenedLabels, TaskStudy
from simmim.finetune.label_study.trials import LeftOut, Tuning, run_arms, tuning_cost
from simmim.finetune.registry import study_of
from simmim.finetune.settings import TransferSettings
from simmim.finetune.start import find_start, measure_training_images
from simmim.training.devices import device_type
from simmim.training.run_folder import check_run_folder, locked_run_folder
from simmim.training.shared_images import pretraining_images


def study(settings: StudyFields) -> StudyResult:
    """Run a study in its folder, or continue it; writes results.csv, tuning.csv, table.md and study.png there.

    Raises:
        ValueError: for settings, labels or encoders that cannot work, before anything is written where that can be known.
    """
    check_libraries()
    check_run_folder(settings.out, settings.resume, settings.overwrite)  # type: ignore[attr-defined]
    prepared = prepare_study(settings)
    settings, arms, labels, left_out = prepared.settings, prepared.arms, prepared.labels, prepared.left_out
    tuning = Tuning(rate_grid(settings), settings.folds, settings.tuning_seeds, prepared.tuned)
    with locked_run_folder(settings) as folder:
        print(f"runs       {tuning_cost(tuning, arms, labels, settings.all_seeds, left_out)}", flush=True)
        result = run_arms(
            arms, labels, settings.all_seeds, folder, settings.processes, tuning, settings.keep_weights, left_out=left_out
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

    settings: StudyFields
    arms: Sequence[Arm]
    tuned: Sequence[Arm]
    labels: dict[int | str, float]
    judged_by: str
    left_out: Collection[LeftOut] = ()
    notes: tuple[str, ...] = ()
    facts: str = ""


def prepare_study(settings: StudyFields) -> PreparedStudy:
    """Read labels and encoders, and check that every run can start.

    Prints which images judge, which numbers of labels are left out because there are too few images, and what is left out
    of unlabeled images; notifies of judging images that are elsewhere too.

    Args:
        settings: of the study of any task.

    Raises:
        ValueError: when the labels or an encoder cannot be read, no number of labels is left, or a run cannot start; for a
            task without a study.
    """
    run, task = settings.run_settings(), study_of(settings.run_class.task)  # type: ignore[attr-defined]
    opened = task.open_labels(settings)
    print(f"judged by  {opened.judged_by}: no trial trains or tunes on them")
    checkpoints = {name: read(path) for name, path in settings.start_names().items()}
    small, device = checkpoints[PRETRAINED].config.is_small, device_type()
    processes = settings.processes or (available_cores() if small and device == "cpu" else 1)
    settings = replace(settings, processes=processes)
    # Of the arms alone: as a setting of the study it would stand in its folder as if the user had given it.
    judged_alike = replace(settings, data=replace(run.data, validation_seed=opened.validation_seed))  # type: ignore[call-arg]
    fingerprints = {name: fingerprint_of(checkpoint.encoder) for name, checkpoint in checkpoints.items()}
    arms = build_arms(judged_alike, fingerprints)
    tuned = [arm for arm in arms if not arm.rates_of] or build_arms(judged_alike, fingerprints, (PLAIN,))
    check_starts(arms, opened, task, device)
    seen = {f"the pre-training images of {path}": pretraining_images(path) for path in settings.start_names().values()}
    report_shared(opened.validation, {"the training images": opened.train, **seen})
    left_out = {(arm.name, value) for arm in arms if arm.recipe == SEMI for value in opened.used_up}
    return PreparedStudy(
        settings,
        arms,
        tuned,
        dict(opened.labels),
        opened.judged_by,
        left_out,
        opened.notes,
        encoder_facts(run, checkpoints),
    )


def encoder_facts(settings: TransferSettings, checkpoints: Mapping[str, Checkpoint]) -> str:
    """A table of what each encoder is and costs at the image size of its runs."""
    facts = []
    for checkpoint in checkpoints.values():
        size = checkpoint.preprocessing.image_size if settings.image_size is None else settings.size
        preprocessing = replace(checkpoint.preprocessing, image_size=size)
        facts.append(facts_of_checkpoint(replace(checkpoint, preprocessing=preprocessing)))
    return facts_table([*checkpoints], facts)


def check_starts(arms: Sequence[Arm], opened: OpenedLabels, task: TaskStudy, device: str) -> None:
    """A run that cannot start is an error now, not in the first trial.

    Raises:
        ValueError: as `find_start`, and as the task's `check_start`.
    """
    statistics = {}
    for arm in arms:
        if arm.start not in statistics:
            statistics[arm.start] = measure_training_images(arm.settings, opened.train)
        start = find_start(arm.settings, statistics[arm.start], device)
        frozen_parts(start.encoder, arm.settings.freeze, arm.settings.train_stages)
        task.check_start(arm, start, opened, device)


def rate_grid(settings: StudyFields) -> tuple[Rates, ...]:
    """The rates among which every arm chooses."""
    # Of a frozen encoder the head alone is trained, which no layer decay reaches.
    decays: tuple[float | str | None, ...] = () if settings.freeze else settings.layer_decays  # type: ignore[attr-defined]
    decays = tuple(dict.fromkeys(decays)) or (settings.optim.layer_decay,)  # type: ignore[attr-defined]
    return tuple(Rates(factor, decay) for factor, decay in product(sorted(set(settings.lr_factors)), decays))
