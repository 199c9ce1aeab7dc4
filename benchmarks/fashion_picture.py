"""A picture of a pre-training's loss beside its study's accuracy by labels, from the files of both.

python benchmarks/fashion_picture.py --run runs/fashion-mnist --study runs/fashion-study --out docs/fashion-mnist.png
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

from simmim.finetune.label_study.report import draw
from simmim.finetune.label_study.results import StudyResult, read_trials


def main(arguments: list[str] | None = None) -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder of simmim pretrain")
    parser.add_argument("--study", type=Path, required=True, help="folder of simmim study")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    options = parser.parse_args(arguments)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, losses = mean_losses(options.run / "metrics.csv")
    left.plot(steps, losses, linewidth=0.7)
    left.set(xlabel="optimizer step", ylabel="masked L1 loss", title="pre-training")
    left.grid(alpha=0.3)
    draw(right, read_study(options.study), title="fine-tuning")
    right.set_ylabel("test accuracy, %")
    figure.savefig(options.out, dpi=110)
    return 0


def mean_losses(file: Path, points: int = 300) -> tuple[list[int], list[float]]:
    """About `points` steps, and the mean loss up to each since the one before."""
    with file.open(newline="", encoding="utf-8") as text:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(text) if row["loss"]]
    size = max(1, len(rows) // points)
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [group[-1][0] for group in groups], [statistics.fmean(loss for _, loss in group) for group in groups]


def read_study(study: Path) -> StudyResult:
    """The result of a study, from its folder. Its numbers of labels must be numbers, not "all"."""
    trials = read_trials(study / "results.csv")
    arms = tuple(dict.fromkeys(trial.arm for trial in trials))
    return StudyResult(arms, tuple(trials), (), {labels: labels for labels in sorted({trial.labels for trial in trials})})


if __name__ == "__main__":
    sys.exit(main())
