"""Accuracy against the number of labels, arm by arm: what pre-training bought.

Every arm sees the same labels in the same order for the same seed, so that differences are paired.
"""
from __future__ import annotations

import csv
import math
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from finetune.classification_settings import FinetuneSettings
from finetune.settings import EncoderSettings
from simmim.files import whole_file


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: as it stands in the table.
        settings: how it is fine-tuned; data, labels, seed and run folder are the study's.
    """

    name: str
    settings: FinetuneSettings


def pretrained_and_scratch(settings: FinetuneSettings, scratch_lr: float, scratch_layer_decay: float) -> tuple[Arm, Arm]:
    """The encoder of `settings.init` and its from-scratch twin: same architecture, preprocessing, data and length; the
    learning rate and layer decay that suit it, found on the same grid."""
    optim = replace(settings.optim, lr=scratch_lr, layer_decay=scratch_layer_decay)
    encoder = replace(settings.encoder, like=settings.init)
    assert isinstance(encoder, EncoderSettings)
    scratch = replace(settings, init="none", encoder=encoder, optim=optim)
    return Arm("pre-trained", settings), Arm("from scratch", scratch)


@dataclass(frozen=True)
class Trial:
    """One fine-tuning: accuracy at its last step, in [0, 1]; nothing is picked by looking at the test images."""

    arm: str
    labels_per_class: int
    seed: int
    accuracy: float


def study(
    arms: Sequence[Arm], labels_per_class: Sequence[int], seeds: Sequence[int], out: str | Path, processes: int = 1
) -> list[Trial]:
    """Fine-tune every arm at every number of labels with every seed; also writes OUT/results.csv.

    Args:
        processes: trials run at once, each on one core. For small models two single-core trials beat one on two cores.

    Raises:
        ValueError: as `finetune.finetune`, from the first trial that fails.
    """
    out = Path(out)
    jobs = []
    for labels in labels_per_class:
        for seed in seeds:
            for arm in arms:
                run = out / f"{labels}-labels" / f"{arm.name.replace(' ', '-')}-seed-{seed}"
                settings = replace(arm.settings, labels_per_class=labels, seed=seed, out=str(run), validations=1)
                jobs.append((arm.name, settings))
    trials = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=use_one_core) as pool,
        tqdm(total=len(jobs), desc="fine-tuning", unit="trial") as bar,
    ):
        futures = {pool.submit(accuracy_of, settings): (name, settings) for name, settings in jobs}
        try:
            for future in as_completed(futures):
                name, settings = futures[future]
                trials.append(Trial(name, settings.labels_per_class, settings.seed, future.result()))
                bar.set_postfix_str(f"{name}, {settings.labels_per_class} labels: {trials[-1].accuracy:.1%}")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    names = [arm.name for arm in arms]
    trials.sort(key=lambda trial: (trial.labels_per_class, trial.seed, names.index(trial.arm)))
    with whole_file(out / "results.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "labels_per_class", "seed", "accuracy"])
        writer.writerows([trial.arm, trial.labels_per_class, trial.seed, f"{trial.accuracy:.4f}"] for trial in trials)
    return trials


def use_one_core() -> None:
    """Set up a process for trials: one thread, so that processes do not fight for cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def accuracy_of(settings: FinetuneSettings) -> float:
    """Run one trial."""
    from finetune.run import finetune

    return finetune(settings, quiet=True).accuracy


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is not known and given as nan."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def comparison_table(trials: Sequence[Trial], first: str, second: str) -> str:
    """A Markdown table, a row a number of labels: both arms' mean ± standard error and the paired gain, in percent."""
    lines = [
        f"| labels a class | {first} | {second} | paired gain | seeds |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for labels in sorted({trial.labels_per_class for trial in trials}):
        accuracy = {
            (trial.arm, trial.seed): 100 * trial.accuracy for trial in trials if trial.labels_per_class == labels
        }
        seeds = sorted({seed for _, seed in accuracy})
        columns = [[accuracy[arm, seed] for seed in seeds] for arm in (first, second)]
        columns.append([a - b for a, b in zip(*columns)])
        cells = [mean_and_error(values) for values in columns]
        texts = [f"{mean:{'+' if gain else ''}.1f} ± {error:.1f}" for (mean, error), gain in zip(cells, (0, 0, 1))]
        lines.append(f"| {labels} | {' | '.join(texts)} | {len(seeds)} |")
    return "\n".join(lines)
