"""Fine-tuning from a pre-trained encoder against training from scratch with few labeled scenes: mean IoU, paired by seed.

    python benchmarks/scenes.py --out scenes
    simmim pretrain --config configs/pretrain/scenes.yaml --data scenes/unlabeled --out scenes/pretrain
    python benchmarks/segmentation.py --scenes scenes --init scenes/pretrain --out scenes/study

Both arms have the same architecture, labels, views, steps and batches. Each arm's learning rate and layer decay are the best
of the same grid on scenes held out from the training part, with labels drawn by other seeds. The arms are compared at the
last step, not at the best one.

Writes OUT/trials.csv, one row per fine-tuning, and prints the table. A later call does not repeat the trials in that file.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from simmim.finetune.label_study.pool import run_in_pool, trial_pool
from simmim.finetune.label_study.report import check_libraries, comparison_table

TUNING_SEED = 1000  # of the first tuning trial; seeds of the comparison count from 0
ARMS = ("pre-trained", "from scratch")


@dataclass(frozen=True)
class Trial:
    """One fine-tuning.

    Attributes:
        labels: number of labeled scenes.
        lr: learning rate per 512 images.
        tuning: the trial serves only to choose the learning rate and layer decay.
    """

    arm: str
    labels: int
    seed: int
    lr: float
    layer_decay: float
    tuning: bool

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        group = "tuning" if self.tuning else "trials"
        rates = f"lr-{self.lr:g}-decay-{self.layer_decay:g}"
        return out / group / f"{self.arm.replace(' ', '-')}-{self.labels}-labels-seed-{self.seed}-{rates}"


def run_trial(trial: Trial, scenes: Path, init: str, out: Path, config: Path, steps: int) -> dict[str, float]:
    """Fine-tune, and return the validation metrics of the last step."""
    from simmim.cli.train import finetune_settings
    from simmim.finetune.run import finetune

    labeled = scenes / "labeled"
    names = (labeled / "classes.txt").read_text(encoding="utf-8").split("\n")
    words = ["--config", str(config), "--data", str(labeled / "train" if trial.tuning else labeled)]
    words += ["--out", str(trial.folder(out)), "--labels", str(trial.labels), "--seed", str(trial.seed), "--overwrite"]
    words += ["--steps", str(steps), "--validations", "1"]
    words += ["--optim.lr", str(trial.lr), "--optim.layer_decay", str(trial.layer_decay)]
    words += ["--init", init] if trial.arm == ARMS[0] else ["--init", "none", "--encoder.like", init]
    settings = finetune_settings("segmentation", words)
    settings = replace(settings, data=replace(settings.data, classes=tuple(filter(None, names))))
    metrics = finetune(settings, quiet=True).metrics
    return {name: metrics[name] for name in ("mean_iou", "pixel_accuracy")}


def run_all(trials: Sequence[Trial], out: Path, pool: ProcessPoolExecutor, **options) -> dict[Trial, dict[str, float]]:
    """The metrics of each trial. Trials that OUT/trials.csv holds are not repeated.

    Args:
        options: further arguments of `run_trial`.
    """
    done = read_trials(out / "trials.csv")
    missing = [trial for trial in trials if trial not in done]
    with tqdm(total=len(missing), unit="run") as bar:
        for trial, metrics in run_in_pool(pool, partial(run_trial, out=out, **options), missing):
            done[trial] = metrics
            append_trial(out / "trials.csv", trial, metrics)
            bar.set_postfix_str(f"{trial.arm}, {trial.labels} labels: {metrics['mean_iou']:.1%}")
            bar.update()
    return {trial: done[trial] for trial in trials}


def read_trials(file: Path) -> dict[Trial, dict[str, float]]:
    """The metrics that earlier calls have written."""
    metrics = {}
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as text:
            for row in csv.DictReader(text):
                tuning = row["tuning"] == "True"
                rates = float(row["lr"]), float(row["layer_decay"])
                trial = Trial(row["arm"], int(row["labels"]), int(row["seed"]), *rates, tuning)
                metrics[trial] = {name: float(row[name]) for name in ("mean_iou", "pixel_accuracy")}
    return metrics


def append_trial(file: Path, trial: Trial, metrics: dict[str, float]) -> None:
    """Add a row, and the header before the first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, [*(field.name for field in fields(Trial)), *metrics])
        if is_new:
            writer.writeheader()
        writer.writerow({**asdict(trial), **metrics})


class Score(NamedTuple):
    """A trial as `comparison_table` takes it; the score is mean IoU in [0, 1]."""

    arm: str
    labels: int
    seed: int
    score: float


def results_table(done: dict[Trial, dict[str, float]]) -> str:
    """A Markdown table, one row per number of labels: mean IoU ± standard error of both arms and their paired gain, in
    percent."""
    scores = [Score(trial.arm, trial.labels, trial.seed, metrics["mean_iou"]) for trial, metrics in done.items()]
    labels = sorted({score.labels for score in scores})
    return comparison_table(scores, ARMS, labels, unit="labeled scenes", show_won=True)


def main() -> int:
    """Tune both arms, compare them, and print the table."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=Path, required=True, help="folder of benchmarks/scenes.py")
    parser.add_argument("--init", required=True, help="run folder of the pre-training")
    parser.add_argument("--out", type=Path, required=True, help="folder to make or to continue in")
    parser.add_argument("--config", type=Path, default=root / "configs/finetune/scenes-segmentation.yaml")
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.24, 0.48, 0.96], help="grid, per 512 images")
    parser.add_argument("--layer-decays", type=float, nargs="+", default=[0.65, 0.9], help="grid")
    parser.add_argument("--tuning-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    check_libraries()
    shared = {"scenes": options.scenes, "init": options.init, "config": options.config, "steps": options.steps}
    grid = [
        Trial(arm, labels, TUNING_SEED + seed, lr, layer_decay, True)
        for labels in options.labels
        for arm in ARMS
        for lr in options.lrs
        for layer_decay in options.layer_decays
        for seed in range(options.tuning_seeds)
    ]
    with trial_pool(options.processes) as pool:
        run = partial(run_all, out=options.out, pool=pool, **shared)
        tuned = run(grid) if len(options.lrs) * len(options.layer_decays) > 1 else {}
        trials = []
        for labels in options.labels:
            for arm in ARMS:
                only = options.lrs[0], options.layer_decays[0]
                best, means = best_rates(tuned, arm, labels) if tuned else (only, {})
                listed = ", ".join(f"{lr:g} and {decay:g}: {mean:.1%}" for (lr, decay), mean in means.items())
                print(
                    f"{arm}, {labels} labels: learning rate {best[0]:g} per 512 images and layer decay {best[1]:g}, "
                    f"of {listed or 'these alone'}",
                    flush=True,
                )
                trials += [Trial(arm, labels, seed, *best, False) for seed in range(options.seeds)]
        print(f"\nmean IoU in percent, mean ± standard error\n\n{results_table(run(trials))}")
    return 0


def best_rates(
    tuned: dict[Trial, dict[str, float]], arm: str, labels: int
) -> tuple[tuple[float, float], dict[tuple[float, float], float]]:
    """Learning rate and layer decay with the highest mean IoU over the seeds, and the means of all pairs in the order of the
    grid."""
    values: dict[tuple[float, float], list[float]] = {}
    for trial, metrics in tuned.items():
        if (trial.arm, trial.labels) == (arm, labels):
            values.setdefault((trial.lr, trial.layer_decay), []).append(metrics["mean_iou"])
    means = {rates: statistics.fmean(of_rates) for rates, of_rates in values.items()}
    return max(means, key=means.__getitem__), means


if __name__ == "__main__":
    sys.exit(main())
