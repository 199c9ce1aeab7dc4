"""RUN/pseudo-labels.csv: which pseudo-labels the student has learned from."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from simmim.files import atomic_write
from simmim.finetune.self_training.module import SelfTrainingSteps

PSEUDO_LABELS = "pseudo-labels.csv"
NUM_REPORTS = 20


class ReportPseudoLabels(pl.Callback):
    """Writes a row every `every_steps` steps and after the last one: steps taken; since the row before, the totals that the
    task counts; and the share of each class among the confident pseudo-labels.

    The callback must stand before the one that saves, as it empties the counts of `SelfTrainingSteps`.
    """

    def __init__(self, run: Path, classes: Sequence[str], num_steps: int) -> None:
        self.path, self.classes = run / PSEUDO_LABELS, tuple(classes)
        self.every_steps = max(math.ceil(num_steps / NUM_REPORTS), 1)
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        """Remove the rows after the checkpoint: a resumed run takes those steps again."""
        self.step = trainer.global_step
        if trainer.is_global_zero and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            self.write([header, *(row for row in rows if int(row[0]) <= self.step)])

    def on_train_batch_end(self, trainer: pl.Trainer, module: SelfTrainingSteps, *_) -> None:  # type: ignore[override]
        """Once per optimizer step, not once per accumulated batch."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if self.step % self.every_steps and self.step != trainer.max_steps:
            return
        counts = module.counts.tolist()
        module.counts.zero_()
        if trainer.is_global_zero and counts[0]:
            totals, by_class = counts[: len(module.TOTALS)], counts[len(module.TOTALS) :]
            shares = [f"{count / max(totals[1], 1):.4f}" for count in by_class]
            row = [str(self.step), *(str(total) for total in totals), *shares]
            header = [] if self.path.is_file() else [["step", *module.TOTALS, *self.classes]]
            self.write([*header, row], append=not header)

    def write(self, rows: list[list[str]], append: bool = False) -> None:
        """Write the file again, or add rows to it."""
        if append:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            return
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
