"""The trials of a study: which there are, which are done, and how one is run.

For one seed all arms have the same labels in the same order, so that differences are paired. Each arm's learning rate
and layer decay are chosen from the same grid by cross-validation on the labels that it may train on; those of the first
seeds tune for all. The judging images, the source's validation part or a fifth that is held out once for the whole
study, tune and train in no trial, and each judged run looks at them once, after its last step. The result of a trial is
a file of its own, so that a study that is started again runs only what is missing.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from simmim.files import atomic_write
from simmim.finetune.label_study.arms import Arm
from simmim.finetune.label_study.pool import run_in_pool, trial_pool
from simmim.finetune.label_study.results import Measure, Rates, StudyResult, Trial
from simmim.finetune.label_study.settings import ALL, count_parts
from simmim.finetune.registry import study_of
from simmim.finetune.settings import TransferSettings
from simmim.messages import counted
from simmim.renamed_settings import with_current_names
from simmim.training.run_folder import CHECKPOINTS, MAY_CHANGE_ON_RESUME, plain, with_defaults

TRIALS, RUNS, TUNING_RUNS = "trials", "runs", "tuning-runs"
Metrics = dict[str, float]
LeftOut = tuple[str, int | str]  # name of an arm, and labels


class Job(NamedTuple):
    """A trial to run.

    Attributes:
        arm: its arm.
        name: unique in the study; names its files.
        settings: of its run.
    """

    arm: Arm
    name: str
    settings: Any  # of the task's class

    @property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        settings = {name: value for name, value in plain(self.settings).items() if name not in MAY_CHANGE_ON_RESUME}
        return {"settings": settings, "encoder": self.arm.fingerprint}

    def trial(self, metrics: Metrics) -> Trial:
        """The trial with the metrics of its run."""
        settings, measure = self.settings, measure_of(self.settings)
        labels = getattr(settings, measure.setting) or ALL
        rates = Rates(settings.optim.lr_factor, settings.optim.layer_decay)
        loss = metrics[measure.loss] if measure.loss else math.nan
        return Trial(self.arm.name, labels, settings.seed, rates, metrics[measure.score], loss, settings.data.fold)


@dataclass(frozen=True)
class Tuning:
    """How rates are chosen.

    Args:
        grid: rates to choose from. A single one serves all arms, and without any each arm keeps its own settings. A layer
            decay of "default" is that of the arm's settings, or of a run with as many labels.
        num_folds: of the cross-validation; fewer where there are fewer labels per class.
        num_seeds: choices of labels that are cross-validated; the best rates over all serve every seed.
        arms: that choose, though they need not be judged; by default those that are judged.
    """

    grid: tuple[Rates, ...] = ()
    num_folds: int = 3
    num_seeds: int = 1
    arms: Sequence[Arm] = ()

    def grid_of(self, arm: Arm, per_class: float) -> tuple[Rates, ...]:
        """The rates that an arm chooses from with `per_class` labels per class, each once."""
        own = arm.settings.optim.layer_decay
        default = study_of(arm.settings.task).default_layer_decay(per_class) if own is None else own
        return tuple(dict.fromkeys(rates.resolved(default) for rates in self.grid))

    def jobs(self, arms: Sequence[Arm], labels: Mapping[int | str, float], seeds: Sequence[int]) -> TuningJobs:
        """The cross-validation of every arm at every number of labels that is tuned: not at a single label per class, which
        cannot be held out, and not where there is nothing to choose."""
        jobs: TuningJobs = {}
        for (value, per_class), arm in product(labels.items(), self.arms or arms):
            if arm.rates_of:
                continue
            grid, num_parts = self.grid_of(arm, per_class), count_parts(self.num_folds, value, per_class)
            if len(grid) > 1 and num_parts > 1:
                cases = product(grid, list(seeds)[: self.num_seeds], range(num_parts))
                jobs[arm.name, value] = [
                    build_job(arm, value, seed, rates, (part, num_parts)) for rates, seed, part in cases
                ]
        return jobs


TuningJobs = dict[tuple[str, int | str], list[Job]]  # by name of the arm and labels


def tuning_cost(
    tuning: Tuning,
    arms: Sequence[Arm],
    labels: Mapping[int | str, float],
    seeds: Sequence[int],
    left_out: Collection[LeftOut] = (),
) -> str:
    """How many runs tune and how many are judged; `left_out` as of `run_arms`."""
    num_tuning = sum(len(jobs) for key, jobs in tuning.jobs(arms, labels, seeds).items() if key not in left_out)
    num_judged = len(arms) * len(labels) * len(seeds) - len(left_out) * len(seeds)
    rates = counted(len(tuning.grid), "rate")
    return (
        f"{num_tuning:,} to tune ({rates}, up to {tuning.num_folds} parts of the labels held out in turn, "
        f"{len([arm for arm in tuning.arms or arms if not arm.rates_of])} arms), {num_judged:,} to judge"
    )


def run_arms(
    arms: Sequence[Arm],
    labels: Mapping[int | str, float],
    seeds: Sequence[int],
    out: Path,
    processes: int = 1,
    tuning: Tuning | None = None,
    keep_weights: bool = False,
    run: Callable[[Job], Metrics] | None = None,
    left_out: Collection[LeftOut] = (),
) -> StudyResult:
    """Tune every arm at every number of labels, then run every seed. Trials with a stored result are not run again.

    Args:
        labels: as of `StudyResult`.
        out: folder of runs and results.
        processes: trials at a time, each on one core; 0 for this process. Of small models, two trials on a core each are
            faster than one after the other on two cores.
        tuning: how rates are chosen; by default each arm keeps its own settings.
        keep_weights: keep checkpoints and encoder of each trial.
        run: returns the metrics of a job; by default `run_trial`.
        left_out: arms, by name, and numbers of labels that are neither tuned nor judged together.

    Raises:
        ValueError: as `simmim.finetune.finetune`, from the first trial that fails.
    """
    tuning = tuning or Tuning()
    run = run or partial(run_trial, out=out, keep_weights=keep_weights)
    tuning_jobs = {key: jobs for key, jobs in tuning.jobs(arms, labels, seeds).items() if key not in left_out}
    judged = [case for case in product(labels, seeds, arms) if (case[2].name, case[0]) not in left_out]
    num_trials = sum(map(len, tuning_jobs.values())) + len(judged)
    with tqdm(total=num_trials, desc="fine-tuning", unit="trial") as bar, trial_pool(processes) as pool:
        held_out = run_jobs([job for jobs in tuning_jobs.values() for job in jobs], out, pool, bar, run)
        best = {key: best_rates([held_out[job.name] for job in jobs]) for key, jobs in tuning_jobs.items()}

        def rates_of(arm: Arm, value: int | str) -> Rates:
            """The best rates at this number of labels, or at the nearest larger one that was tuned, for every arm alike."""
            grid = tuning.grid_of(arm, labels[value])
            own = grid[0] if len(grid) == 1 else Rates(arm.settings.optim.lr_factor, arm.settings.optim.layer_decay)
            chooser = arm.rates_of or arm.name
            larger = (
                best[chooser, other] for other in labels if labels[other] >= labels[value] and (chooser, other) in best
            )
            return next(larger, own)

        final = run_jobs(
            [build_job(arm, value, seed, rates_of(arm, value)) for value, seed, arm in judged], out, pool, bar, run
        )
    return StudyResult(
        tuple(arm.name for arm in arms),
        tuple(final.values()),
        tuple(held_out.values()),
        dict(labels),
        sides={arm.name: arm.side for arm in arms},
        rates_of={arm.name: arm.rates_of for arm in arms if arm.rates_of},
        measure=measure_of(arms[0].settings),
    )


def build_job(arm: Arm, labels: int | str, seed: int, rates: Rates, fold: tuple[int, int] | None = None) -> Job:
    """A trial of an arm.

    Args:
        labels: number per class, or "all".
        fold: (part, number of parts) in cross-validation.
    """
    data: Any = replace(arm.settings.data, fold=fold)  # type: ignore[call-arg]
    if arm.pools:
        data = replace(data, pool=(arm.pools.index(seed), len(arm.pools)))
    settings = replace(
        arm.settings,
        **{measure_of(arm.settings).setting: None if labels == ALL else labels},
        seed=seed,
        data=data,
        optim=replace(arm.settings.optim, lr_factor=rates.lr_factor, layer_decay=rates.layer_decay),  # type: ignore[arg-type]  # resolved
        validations=1,  # judging images choose nothing: a second look could pick the better one
        resume=False,
        overwrite=True,  # what an interrupted trial has left
    )
    name = f"{labels}-labels/{as_file_name(arm.name)}-seed-{seed}"
    if fold is not None:
        name += f"-fold-{fold[0] + 1}-of-{fold[1]}-{rates}"
    return Job(arm, name, settings)


def as_file_name(arm: str) -> str:
    """The name of an arm in those of files: without spaces, another one for every other arm."""
    return arm.replace("%", "%25").replace("+", "%2B").replace(" ", "+")


def measure_of(settings: TransferSettings) -> Measure:
    """What a study of the settings' task measures."""
    study = study_of(settings.task)
    return study.measure_of(settings) if study.measure_of else study.measure


def best_rates(trials: Sequence[Trial]) -> Rates:
    """The rates of the highest mean score over folds and seeds; of equal ones, those of the lowest mean loss."""
    by_rates: dict[Rates, list[Trial]] = {}
    for trial in trials:
        by_rates.setdefault(trial.rates, []).append(trial)

    def quality(rates: Rates) -> tuple[float, float]:
        """Mean score, rounded so that the order of a sum decides nothing, and the negative mean loss."""
        scores = [trial.score for trial in by_rates[rates] if not math.isnan(trial.score)]  # nan where nothing is to find
        losses = [trial.loss for trial in by_rates[rates] if not math.isnan(trial.loss)]
        return round(statistics.fmean(scores or [0.0]), 9), -statistics.fmean(losses or [0.0])

    return max(by_rates, key=quality)


def run_jobs(
    jobs: Sequence[Job], out: Path, pool: Executor | None, bar: tqdm, run: Callable[[Job], Metrics]
) -> dict[str, Trial]:
    """The trial of every job by the job's name, in the jobs' order: from a stored result, or by running it.

    Args:
        out: folder of stored results.
        pool: processes that run jobs; None for this process.
        bar: advances with each trial.
        run: returns the metrics of a job.
    """
    stored = {job.name: read_metrics(job, out) for job in jobs}
    missing = [job for job in jobs if stored[job.name] is None]
    num_other = sum(result_file(out, job).is_file() for job in missing)
    if num_other:
        bar.write(f"run again  {counted(num_other, 'trial')} stored with other settings, weights or judging images")
    bar.update(len(jobs) - len(missing))
    metrics_of = {name: metrics for name, metrics in stored.items() if metrics is not None}
    for job, metrics in run_in_pool(pool, run, missing):
        metrics_of[job.name] = metrics
        trial = job.trial(metrics)
        fold = " held out" if trial.fold else ""
        labels = f"{trial.labels} labels" if isinstance(trial.labels, str) else counted(trial.labels, "label")
        bar.set_postfix_str(f"{trial.arm}, {labels}: {trial.score:.1%}{fold}")
        bar.update()
    return {job.name: job.trial(metrics_of[job.name]) for job in jobs}


def read_metrics(job: Job, out: Path) -> Metrics | None:
    """The stored metrics of a job; None where there are none, or they are of other settings or weights."""
    file = next((file for file in (result_file(out, job), older_result_file(out, job)) if file.is_file()), None)
    if file is None:
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    settings, _ = with_current_names(stored["identity"]["settings"])
    settings = with_defaults(settings, job.settings)
    for name in MAY_CHANGE_ON_RESUME:
        settings.pop(name, None)
    same = {**stored["identity"], "settings": settings} == json.loads(json.dumps(job.identity))
    return stored["metrics"] if same else None


def run_trial(job: Job, out: Path, keep_weights: bool) -> Metrics:
    """Fine-tune and store the metrics of the last step. Of a trial of the cross-validation nothing else is kept.

    Args:
        out: folder of runs and results.
        keep_weights: keep checkpoints and encoder.
    """
    from simmim.finetune.run import finetune

    folder = out / (RUNS if job.settings.data.fold is None else TUNING_RUNS) / job.name
    if folder.exists():
        shutil.rmtree(folder)
    metrics = finetune(replace(job.settings, out=str(folder)), quiet=True).metrics
    if job.settings.data.fold is not None:
        shutil.rmtree(folder)
    elif not keep_weights:
        for name in (CHECKPOINTS, "encoder"):
            shutil.rmtree(folder / name, ignore_errors=True)
    file = result_file(out, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"identity": job.identity, "metrics": metrics}, indent=1), encoding="utf-8")
    return metrics


def result_file(out: Path, job: Job) -> Path:
    """Where the metrics of a job are stored."""
    return out / TRIALS / f"{job.name}.json"


def older_result_file(out: Path, job: Job) -> Path:
    """Where earlier versions stored them: with hyphens for spaces, so that two arms may share the file. Whose it is, its
    identity tells."""
    folder, _, name = job.name.partition("/")
    return out / TRIALS / folder / f"{job.arm.name.replace(' ', '-')}{name.removeprefix(as_file_name(job.arm.name))}.json"
