"""Pre-trained against scratch at few labeled scenes, paired by seed: mean IoU over held-out scenes.

    python benchmarks/scenes.py --out scenes
    simmim pretrain --config configs/pretrain/scenes.yaml --data scenes/unlabeled --out scenes/pretrain
    python benchmarks/segmentation.py --scenes scenes --init scenes/pretrain --out scenes/study

Both arms have the same architecture, labels, views, steps and batches. Each arm's learning rate and layer decay are the
best of the same grid on scenes held out from the training part, with labels drawn by other seeds, and what is compared is
the last step, not the best one.

Writes OUT/trials.csv, a row a fine-tuning, which a later call goes on from, and prints the table.
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

from simmim.finetune.label_study.pool import results, trial_pool
from simmim.finetune.label_study.report import check_libraries, comparison_table

TUNING_SEED = 1000  # the first; the comparison's count from 0
ARMS = ("pre-trained", "from scratch")


@dataclass(frozen=True)
class Trial:
    """One fine-tuning. `lr` is per 512 images; `tuning` tells those that only choose it and the layer decay."""

    arm: str
    labels: int
    seed: int
    lr: float
    layer_decay: float
    tuning: bool

    def folder(self, out: Path) -> Path:
        """Where its run lies."""
        kind = "tuning" if self.tuning else "trials"
        rates = f"lr-{self.lr:g}-decay-{self.layer_decay:g}"
        return out / kind / f"{self.arm.replace(' ', '-')}-{self.labels}-labels-seed-{self.seed}-{rates}"


def measured(trial: Trial, scenes: Path, init: str, out: Path, config: Path, steps: int) -> dict[str, float]:
    """Fine-tune and return the validation metrics of the last step."""
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


def run_all(trials: Sequence[Trial], out: Path, pool: ProcessPoolExecutor, **how) -> dict[Trial, dict[str, float]]:
    """Every trial's metrics; those that are in OUT/trials.csv already are not repeated."""
    done = read_trials(out / "trials.csv")
    missing = [trial for trial in trials if trial not in done]
    with tqdm(total=len(missing), unit="run") as bar:
        for trial, metrics in results(pool, partial(measured, out=out, **how), missing):
            done[trial] = metrics
            append_trial(out / "trials.csv", trial, metrics)
            bar.set_postfix_str(f"{trial.arm}, {trial.labels} labels: {metrics['mean_iou']:.1%}")
            bar.update()
    return {trial: done[trial] for trial in trials}


def read_trials(file: Path) -> dict[Trial, dict[str, float]]:
    """What earlier calls measured."""
    found = {}
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as text:
            for row in csv.DictReader(text):
                tuning = row["tuning"] == "True"
                rates = float(row["lr"]), float(row["layer_decay"])
                trial = Trial(row["arm"], int(row["labels"]), int(row["seed"]), *rates, tuning)
                found[trial] = {name: float(row[name]) for name in ("mean_iou", "pixel_accuracy")}
    return found


def append_trial(file: Path, trial: Trial, metrics: dict[str, float]) -> None:
    """One more row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, [*(field.name for field in fields(Trial)), *metrics])
        if fresh:
            writer.writeheader()
        writer.writerow({**asdict(trial), **metrics})


class Score(NamedTuple):
    """A trial as the comparison asks for it: mean IoU in [0, 1]."""

    arm: str
    labels: int
    seed: int
    score: float


def table(done: dict[Trial, dict[str, float]]) -> str:
    """A Markdown table, a row a number of labels: both arms' mean IoU ± standard error and the paired gain, in percent."""
    scores = [Score(trial.arm, trial.labels, trial.seed, metrics["mean_iou"]) for trial, metrics in done.items()]
    labels = sorted({score.labels for score in scores})
    return comparison_table(scores, ARMS, labels, unit="labeled scenes", won=True)


def main() -> int:
    """Tune, compare, print."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=Path, required=True, help="what benchmarks/scenes.py wrote")
    parser.add_argument("--init", required=True, help="pre-training run")
    parser.add_argument("--out", type=Path, required=True, help="folder to make or go on in")
    parser.add_argument("--config", type=Path, default=root / "configs/finetune/scenes-segmentation.yaml")
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.24, 0.48, 0.96], help="grid, per 512 images")
    parser.add_argument("--layer-decays", type=float, nargs="+", default=[0.65, 0.9], help="grid")
    parser.add_argument("--tuning-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    check_libraries()
    how = {"scenes": chosen.scenes, "init": chosen.init, "config": chosen.config, "steps": chosen.steps}
    grid = [
        Trial(arm, labels, TUNING_SEED + seed, lr, layer_decay, True)
        for labels in chosen.labels
        for arm in ARMS
        for lr in chosen.lrs
        for layer_decay in chosen.layer_decays
        for seed in range(chosen.tuning_seeds)
    ]
    with trial_pool(chosen.processes) as pool:
        run = partial(run_all, out=chosen.out, pool=pool, **how)
        tuned = run(grid) if len(chosen.lrs) * len(chosen.layer_decays) > 1 else {}
        trials = []
        for labels in chosen.labels:
            for arm in ARMS:
                only = chosen.lrs[0], chosen.layer_decays[0]
                best, means = best_rates(tuned, arm, labels) if tuned else (only, {})
                listed = ", ".join(f"{lr:g} and {decay:g}: {mean:.1%}" for (lr, decay), mean in means.items())
                print(
                    f"{arm}, {labels} labels: learning rate {best[0]:g} per 512 images and layer decay {best[1]:g}, "
                    f"of {listed or 'these alone'}",
                    flush=True,
                )
                trials += [Trial(arm, labels, seed, *best, False) for seed in range(chosen.seeds)]
        print(f"\nmean IoU in percent, mean ± standard error\n\n{table(run(trials))}")
    return 0


def best_rates(
    tuned: dict[Trial, dict[str, float]], arm: str, labels: int
) -> tuple[tuple[float, float], dict[tuple[float, float], float]]:
    """Learning rate and layer decay of the highest mean IoU over the draws of labels, and the means of all, in the grid's
    order."""
    values: dict[tuple[float, float], list[float]] = {}
    for trial, metrics in tuned.items():
        if (trial.arm, trial.labels) == (arm, labels):
            values.setdefault((trial.lr, trial.layer_decay), []).append(metrics["mean_iou"])
    means = {rates: statistics.fmean(of_rates) for rates, of_rates in values.items()}
    return max(means, key=means.__getitem__), means


if __name__ == "__main__":
    sys.exit(main())
