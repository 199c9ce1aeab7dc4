"""Accuracy against the number of labels, arm by arm: what pre-training bought.

Every arm sees the same labels in the same order for the same seed, so that differences are paired. Every arm's learning
rate is chosen from the same grid by cross-validation on the labels that it may train on; the validation images of the final
trials choose nothing. A trial's result is a file of its own, and a study that is started again does what is missing.
"""

from __future__ import annotations

import json
import shutil
import statistics
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from simmim.files import atomic_write
from simmim.finetune.classification.settings import ClassificationSettings
from simmim.finetune.label_study.pool import results, trial_pool
from simmim.finetune.label_study.settings import ALL, StudySettings
from simmim.training.run_folder import CHECKPOINTS, MAY_CHANGE_ON_RESUME, plain

TRIALS, RUNS, TUNING_RUNS = "trials", "runs", "tuning-runs"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: as it stands in the table.
        settings: how it is fine-tuned; data, labels, seed and run folder are the study's.
        fingerprint: of the weights it starts from; results of other weights under the same path are not taken up.
    """

    name: str
    settings: ClassificationSettings
    fingerprint: int = 0


class Rates(NamedTuple):
    """What is tuned: a factor to the peak learning rate, and layer decay; None is what a run would choose."""

    lr_factor: float
    layer_decay: float | None

    def __str__(self) -> str:
        """For a file's name; what is not given is a run's own default."""
        decay = "" if self.layer_decay is None else f"-decay-{self.layer_decay:g}"
        return f"lr-times-{self.lr_factor:g}{decay}"


@dataclass(frozen=True)
class Trial:
    """One fine-tuning.

    Args:
        labels: a class, or "all".
        accuracy: at its last step, in [0, 1]: of the validation images, or of the held-out fold. Nothing is picked by
            looking at the validation images.
        loss: mean cross-entropy of the same.
        fold: (part, parts) in cross-validation.
    """

    arm: str
    labels: int | str
    seed: int
    rates: Rates
    accuracy: float
    loss: float
    fold: tuple[int, int] | None = None

    @property
    def score(self) -> float:
        """What arms are compared by."""
        return self.accuracy


class Job(NamedTuple):
    """A trial to be: where its result goes, and how it is run."""

    arm: Arm
    name: str
    settings: ClassificationSettings

    @property
    def identity(self) -> dict:
        """What its result depends on."""
        settings = {name: value for name, value in plain(self.settings).items() if name not in MAY_CHANGE_ON_RESUME}
        return {"settings": settings, "encoder": self.arm.fingerprint}

    def trial(self, metrics: dict[str, float]) -> Trial:
        """Its result."""
        settings = self.settings
        labels = ALL if settings.labels_per_class is None else settings.labels_per_class
        rates = Rates(settings.optim.lr_factor, settings.optim.layer_decay)
        fold = settings.data.fold
        return Trial(self.arm.name, labels, settings.seed, rates, metrics["accuracy"], metrics["validation_loss"], fold)


@dataclass(frozen=True)
class StudyResult:
    """All trials, by labels, seed and arm; those of the cross-validation; and how each number of labels is drawn on an axis.

    Attributes:
        arms: their names, the one that is compared with the others first.
        labels: mean number of labels a class by what was asked for; it differs for "all".
    """

    arms: tuple[str, ...]
    trials: tuple[Trial, ...]
    tuning: tuple[Trial, ...]
    labels: dict[int | str, float]


def study(settings: StudySettings) -> StudyResult:
    """Run a study in its folder, or go on with it; writes results.csv, tuning.csv, table.md and study.png there.

    Raises:
        ValueError: for settings, labels or encoders that cannot work, before anything is written where it can be known.
    """
    from simmim.finetune.label_study.report import check_libraries, write_report
    from simmim.training.run_folder import check_run_folder, locked_run_folder

    check_libraries()
    check_run_folder(settings.out, settings.resume, settings.overwrite)
    settings, arms, labels = prepared(settings)
    with locked_run_folder(settings) as run:
        result = run_arms(
            arms,
            labels,
            range(settings.seed, settings.seed + settings.seeds),
            run,
            settings.processes,
            grid_of(settings),
            settings.folds,
            settings.tuning_seeds,
            settings.keep_weights,
        )
        write_report(result, run)
    return result


def prepared(settings: StudySettings) -> tuple[StudySettings, list[Arm], dict[int | str, float]]:
    """Settings with the number of processes filled in, the arms, and the numbers of labels that there are images
    for; those that there are not are said.

    Raises:
        ValueError: when the labels or an encoder cannot be read, no number of labels is left, or no run can start so.
    """
    from simmim.checkpoints import read
    from simmim.data import available_cores, measure_images, read_labeled_images
    from simmim.finetune.freezing import frozen_parts
    from simmim.finetune.start import find_start
    from simmim.training.trainer import device_type

    data = settings.data
    read_labels = read_labeled_images(data.path, None, settings.seed, data.column, data.label_column)
    counts = np.bincount(read_labels.train["label"], minlength=len(read_labels.classes))
    smallest, rarest = int(counts.min()), read_labels.classes[int(counts.argmin())]
    labels = {value: float(counts.mean()) if value == ALL else value for value in settings.labels}
    too_many = [value for value in labels if value != ALL and value > smallest]
    for value in too_many:
        print(f"left out   {value} labels a class: class {rarest!r} has {smallest} images")
        del labels[value]
    if not labels:
        raise ValueError(
            f"{too_many[0]} labels a class asked for, class {rarest!r} has {smallest} training images: "
            f"give up to {smallest}, or {ALL}"
        )
    checkpoints = {name: read(path) for name, path in settings.arm_names().items()}
    small = checkpoints["pre-trained"].config.is_small
    processes = settings.processes or (available_cores() if small and device_type() == "cpu" else 1)
    settings = replace(settings, processes=processes)
    one = settings.run_settings()
    arms = [
        Arm(name, replace(one, init=path), fingerprint_of(checkpoints[name].encoder))
        for name, path in settings.arm_names().items()
    ]
    if settings.scratch:
        arms.append(Arm("from scratch", from_scratch(one), arms[0].fingerprint))
    images = measure_images(read_labels.train)
    for arm in arms:  # what cannot start says so now, and not from the first trial
        encoder = find_start(arm.settings, images, device_type(), None).encoder
        frozen_parts(encoder, arm.settings.freeze, arm.settings.train_stages)
    return settings, arms, dict(sorted(labels.items(), key=lambda item: item[1]))


def from_scratch(settings: ClassificationSettings) -> ClassificationSettings:
    """The twin of a run that starts from an encoder: same architecture, preprocessing, data and length."""
    return replace(settings, init="none", encoder=replace(settings.encoder, like=settings.init))


def fingerprint_of(tensors: dict) -> int:
    """A checksum over the bytes of all weights, in the order of their names."""
    import torch

    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(), checksum)
    return checksum


def grid_of(settings: StudySettings) -> list[Rates]:
    """The rates that every arm tries."""
    decays = settings.layer_decays or (settings.optim.layer_decay,)
    return [Rates(factor, decay) for factor, decay in product(sorted(settings.lr_factors), decays)]


def run_arms(
    arms: Sequence[Arm],
    labels: dict[int | str, float],
    seeds: Sequence[int],
    out: Path,
    processes: int = 1,
    grid: Sequence[Rates] = (),
    folds: int = 3,
    tuning_seeds: int = 1,
    keep_weights: bool = False,
) -> StudyResult:
    """Tune every arm at every number of labels, then run every seed; what `out` has results of is not run again.

    Args:
        labels: as of `StudyResult`.
        processes: trials run at once, each on one core. For small models two single-core trials beat one on two cores.
        grid: rates to choose from; a single one serves all, and with none an arm's own settings stand.
        folds, tuning_seeds: as of `StudySettings`.

    Raises:
        ValueError: as `simmim.finetune.finetune`, from the first trial that fails.
    """
    tuned = {value: min(folds, int(count)) for value, count in labels.items() if count >= 2} if len(grid) > 1 else {}
    draws = list(seeds)[:tuning_seeds]
    tuning = {
        (arm.name, value): [
            job_of(arm, value, seed, rates, (part, parts)) for rates in grid for seed in draws for part in range(parts)
        ]
        for value, parts in tuned.items()
        for arm in arms
    }
    count = sum(map(len, tuning.values())) + len(arms) * len(labels) * len(seeds)
    with tqdm(total=count, desc="fine-tuning", unit="trial") as bar, trial_pool(processes) as pool:
        tried = run_jobs([job for jobs in tuning.values() for job in jobs], out, pool, bar, keep_weights)
        chosen = {key: best_rates([tried[job.name] for job in jobs]) for key, jobs in tuning.items()}
        jobs = []
        for value, seed, arm in product(labels, seeds, arms):
            # A single label cannot be held out: the nearest larger number's rate serves, for every arm alike.
            of_arm = (chosen[arm.name, other] for other in labels if labels[other] >= labels[value] and other in tuned)
            own = grid[0] if len(grid) == 1 else Rates(arm.settings.optim.lr_factor, arm.settings.optim.layer_decay)
            jobs.append(job_of(arm, value, seed, next(of_arm, own)))
        done = run_jobs(jobs, out, pool, bar, keep_weights)
    return StudyResult(
        tuple(arm.name for arm in arms), tuple(done[job.name] for job in jobs), tuple(tried.values()), dict(labels)
    )


def job_of(arm: Arm, labels: int | str, seed: int, rates: Rates, fold: tuple[int, int] | None = None) -> Job:
    """A trial of an arm, by a name that no other trial of the study has."""
    settings = replace(
        arm.settings,
        labels_per_class=None if labels == ALL else labels,
        seed=seed,
        data=replace(arm.settings.data, fold=fold),
        optim=replace(arm.settings.optim, lr_factor=rates.lr_factor, layer_decay=rates.layer_decay),
        validations=1,
        resume=False,
        overwrite=True,  # what a trial that was interrupted has left
    )
    name = f"{labels}-labels/{arm.name.replace(' ', '-')}-seed-{seed}"
    if fold is not None:
        name += f"-fold-{fold[0] + 1}-of-{fold[1]}-{rates}"
    return Job(arm, name, settings)


def best_rates(trials: Sequence[Trial]) -> Rates:
    """The rates of the highest mean accuracy over folds and draws; of equals, of the lowest mean loss."""
    of_rates: dict[Rates, list[Trial]] = {}
    for trial in trials:
        of_rates.setdefault(trial.rates, []).append(trial)

    def worth(rates: Rates) -> tuple[float, float]:
        """Mean accuracy, rounded so that the order of a sum decides nothing, and the mean loss below zero."""
        accuracy = statistics.fmean(trial.accuracy for trial in of_rates[rates])
        return round(accuracy, 9), -statistics.fmean(trial.loss for trial in of_rates[rates])

    return max(of_rates, key=worth)


def run_jobs(jobs: Sequence[Job], out: Path, pool: ProcessPoolExecutor, bar: tqdm, keep_weights: bool) -> dict[str, Trial]:
    """Every job's trial by the job's name, in the jobs' order: read where it is there, else run."""
    trials, missing = {job.name: None for job in jobs}, []
    for job in jobs:
        metrics = known_result(job, out)
        if metrics is None:
            missing.append(job)
        else:
            trials[job.name] = job.trial(metrics)
            bar.update()
    for job, metrics in results(pool, partial(run_trial, out=out, keep_weights=keep_weights), missing):
        trial = trials[job.name] = job.trial(metrics)
        bar.set_postfix_str(f"{trial.arm}, {trial.labels} labels: {trial.accuracy:.1%}{' held out' if trial.fold else ''}")
        bar.update()
    return trials


def known_result(job: Job, out: Path) -> dict[str, float] | None:
    """The metrics of a trial that is done, of the same settings and weights."""
    file = out / TRIALS / f"{job.name}.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["metrics"] if found["identity"] == json.loads(json.dumps(job.identity)) else None


def run_trial(job: Job, out: Path, keep_weights: bool) -> dict[str, float]:
    """Fine-tune, and write the result down; a trial of the cross-validation leaves nothing else."""
    from simmim.finetune.run import finetune

    run = out / (RUNS if job.settings.data.fold is None else TUNING_RUNS) / job.name
    if run.exists():
        shutil.rmtree(run)
    metrics = finetune(replace(job.settings, out=str(run)), quiet=True).metrics
    if job.settings.data.fold is not None:
        shutil.rmtree(run)
    elif not keep_weights:
        for folder in (CHECKPOINTS, "encoder"):
            shutil.rmtree(run / folder, ignore_errors=True)
    file = out / TRIALS / f"{job.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"identity": job.identity, "metrics": metrics}, indent=1), encoding="utf-8")
    return metrics


def pretrained_and_scratch(
    settings: ClassificationSettings, scratch_lr: float, scratch_layer_decay: float
) -> tuple[Arm, Arm]:
    """The encoder of `settings.init` and its from-scratch twin, at rates that are known to suit it."""
    scratch = from_scratch(settings)
    optim = replace(scratch.optim, lr=scratch_lr, layer_decay=scratch_layer_decay)
    return Arm("pre-trained", settings), Arm("from scratch", replace(scratch, optim=optim))
