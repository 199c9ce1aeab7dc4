"""Loss of a pre-training and accuracy against labels of its study, side by side, from the files that both leave.

python benchmarks/fashion_picture.py --run runs/fashion-mnist --study runs/fashion-study --out docs/fashion-mnist.png
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

from simmim.finetune.label_study.report import draw, read_trials
from simmim.finetune.label_study.trials import StudyResult


def main(arguments: list[str] | None = None) -> int:
    """Draw, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="of simmim pretrain")
    parser.add_argument("--study", type=Path, required=True, help="of simmim study")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    chosen = parser.parse_args(arguments)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, losses = losses_of(chosen.run / "metrics.csv")
    left.plot(steps, losses, linewidth=0.7)
    left.set(xlabel="optimizer step", ylabel="masked L1 loss", title="pre-training")
    left.grid(alpha=0.3)
    draw(right, found_by(chosen.study), title="fine-tuning")
    right.set_ylabel("test accuracy, %")
    figure.savefig(chosen.out, dpi=110)
    return 0


def losses_of(file: Path, points: int = 300) -> tuple[list[int], list[float]]:
    """Steps, and the mean loss around each, at so many places."""
    with file.open(newline="", encoding="utf-8") as text:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(text) if row["loss"]]
    size = max(1, len(rows) // points)
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [group[-1][0] for group in groups], [statistics.fmean(loss for _, loss in group) for group in groups]


def found_by(study: Path) -> StudyResult:
    """What a study of given numbers of labels has written down."""
    trials = read_trials(study / "results.csv")
    arms = tuple(dict.fromkeys(trial.arm for trial in trials))
    return StudyResult(arms, tuple(trials), (), {labels: labels for labels in sorted({trial.labels for trial in trials})})


if __name__ == "__main__":
    sys.exit(main())
