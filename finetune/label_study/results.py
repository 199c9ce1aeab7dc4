"""What a study measures: trials and their scores, in memory and as CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from simmim.files import atomic_write
from simmim.finetune.label_study.settings import DEFAULT, PLAIN, parse_labels


class Rates(NamedTuple):
    """What is tuned.

    Attributes:
        lr_factor: factor of the peak learning rate.
        layer_decay: None for a run's default; in a grid also "default", which `resolved` replaces.
    """

    lr_factor: float
    layer_decay: float | str | None

    def resolved(self, default: float) -> Rates:
        """With `default` in place of "default"."""
        return self._replace(layer_decay=default) if self.layer_decay == DEFAULT else self

    def describe(self) -> str:
        """As a cell of a table."""
        decay = DEFAULT if self.layer_decay is None else f"{self.layer_decay:g}"
        return f"lr × {self.lr_factor:g}, decay {decay}"

    def __str__(self) -> str:
        """As part of a file's name."""
        decay = "" if self.layer_decay is None else f"-decay-{self.layer_decay:g}"
        return f"lr-times-{self.lr_factor:g}{decay}"


@dataclass(frozen=True)
class Trial:
    """One finished fine-tuning run.

    Args:
        arm: name of its arm.
        labels: number, of classification per class, or "all".
        seed: of labels, initial weights and order.
        rates: that it was trained with.
        score: after the last step, in [0, 1]: with a fold, on those labels, to choose rates; else on the study's
            judging images, which are the same for all its trials, and which train and choose nothing.
        loss: mean loss on the same images; nan where the task logs none.
        fold: (part, number of parts) in cross-validation.
    """

    arm: str
    labels: int | str
    seed: int
    rates: Rates
    score: float
    loss: float
    fold: tuple[int, int] | None = None


SCENES = ("labeled images", "labeled image")


class Measure(NamedTuple):
    """What a study measures, and its words for it.

    Attributes:
        score: metric of a run, in [0, 1], higher is better.
        title: its name in the report, capitalized.
        loss: metric that decides between rates of equal scores; empty for none.
        loss_column: of that in the CSV files.
        setting: of a run that takes the number of labels; names their column too.
        unit, singular: of labels.
    """

    score: str = "accuracy"
    title: str = "Accuracy"
    loss: str = "validation_loss"
    loss_column: str = "cross_entropy"
    setting: str = "labels_per_class"
    unit: str = "labels per class"
    singular: str = "label per class"

    def counted(self, number: float) -> str:
        """A number of labels with its unit."""
        return f"{number:.0f} {self.singular if round(number) == 1 else self.unit}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the CSV files."""
        return ("arm", self.setting, "seed", "lr_factor", "layer_decay", "fold", self.score, self.loss_column)


CLASSIFICATION = Measure()


class Side(NamedTuple):
    """What an arm is.

    Attributes:
        start: what it starts from.
        recipe: how it is fine-tuned, plain or semi.
    """

    start: str
    recipe: str


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        arms: names; the first one is compared with the others.
        trials: by labels, seed and arm.
        tuning: trials of the cross-validation.
        labels: mean number of labels, of classification per class, by the number that was asked for; they differ for
            "all", and where some classes have fewer.
        judged_by: which images judge, for the report; empty where that is not known.
        sides: what each arm is; by default each is a start of its own, fine-tuned plainly.
        rates_of: whose rates an arm took, by its name, where it chose none itself.
        notes: what the report says beside the numbers, a sentence each.
        facts: a table of what each encoder is and costs, as Markdown; empty where that is not known.
        measure: what the scores are.
    """

    arms: tuple[str, ...]
    trials: tuple[Trial, ...]
    tuning: tuple[Trial, ...]
    labels: dict[int | str, float]
    judged_by: str = ""
    sides: Mapping[str, Side] = field(default_factory=dict)
    rates_of: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: str = ""
    measure: Measure = CLASSIFICATION

    def side(self, arm: str) -> Side:
        """What an arm is."""
        return self.sides.get(arm, Side(arm, PLAIN))


def write_trials(file: Path, trials: Sequence[Trial], measure: Measure = CLASSIFICATION) -> None:
    """Write a CSV file with a row per trial."""
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(measure.columns)
        for trial in trials:
            fold = "" if trial.fold is None else f"{trial.fold[0] + 1} of {trial.fold[1]}"
            rates = ["" if value is None else f"{value:g}" for value in trial.rates]
            row = [trial.arm, trial.labels, trial.seed, *rates, fold]
            writer.writerow([*row, f"{trial.score:.4f}", "" if math.isnan(trial.loss) else f"{trial.loss:.4f}"])


def read_trials(file: Path, measure: Measure = CLASSIFICATION) -> list[Trial]:
    """Trials from a file of `write_trials`, in its precision."""
    trials = []
    with file.open(newline="", encoding="utf-8") as text:
        for row in csv.DictReader(text):
            decay = float(row["layer_decay"]) if row["layer_decay"] else None
            part, _, num_parts = row["fold"].partition(" of ")
            trials.append(
                Trial(
                    row["arm"],
                    parse_labels(row[measure.setting]),
                    int(row["seed"]),
                    Rates(float(row["lr_factor"]), decay),
                    float(row[measure.score]),
                    float(row[measure.loss_column] or "nan"),
                    (int(part) - 1, int(num_parts)) if part else None,
                )
            )
    return trials
