"""What a study found, for people: the table, the sentence at each number of labels, the plot, the numbers as CSV."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from simmim.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simmim.finetune.label_study.trials import StudyResult, Trial

CERTAIN = 0.05  # the usual level of a test; above it a difference is called uncertain


def check_libraries() -> None:
    """See that a study's report can be made, before its hours of compute.

    Raises:
        ValueError: when SciPy or Matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        missing = f"a study needs {error.name}, which is not installed: pip install 'simmim-toolkit[study]'"
        raise ValueError(missing) from error


class Scored(Protocol):
    """What the comparison of arms asks of a trial; `score` is what they are compared by, in [0, 1]."""

    arm: str
    labels: int | str
    seed: int
    score: float


class Paired(NamedTuple):
    """The difference of two arms over the same seeds, in points of percent.

    Attributes:
        mean, error: of the difference, and its standard error; nan with a single seed.
        p: of the two-sided paired t-test; nan where it says nothing, with one seed or equal differences.
        seeds, won: how many, and at how many of them the difference is positive.
    """

    mean: float
    error: float
    p: float
    seeds: int
    won: int


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is not known and given as nan."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def scores(trials: Sequence[Scored], arm: str, labels: int | str) -> dict[int, float]:
    """Scores in percent by seed."""
    return {trial.seed: 100 * trial.score for trial in trials if (trial.arm, trial.labels) == (arm, labels)}


def paired(trials: Sequence[Scored], first: str, second: str, labels: int | str) -> Paired:
    """What `first` gains over `second`, over the seeds that both have."""
    ours, theirs = scores(trials, first, labels), scores(trials, second, labels)
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean, error = mean_and_error(gains)
    return Paired(mean, error, p_value(mean, error, len(gains)), len(gains), sum(gain > 0 for gain in gains))


def p_value(mean: float, error: float, count: int) -> float:
    """Two-sided, of a mean of `count` differences being 0, by Student's t."""
    if count < 2 or not error > 0:
        return math.nan
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / error, count - 1))


def comparison_table(
    trials: Sequence[Scored],
    arms: Sequence[str],
    labels: Sequence[int | str],
    unit: str = "labels a class",
    won: bool = False,
) -> str:
    """A Markdown table, a row a number of labels: every arm's mean ± standard error in percent, and what the first gains
    over each other one.

    Args:
        unit: of labels, the head of their column.
        won: tell of the seeds not only how many there are, but at how many the first was above the second.
    """
    first, *others = arms
    gains = ["paired gain"] if len(others) == 1 else [f"gain over {other}" for other in others]
    lines = [
        f"| {unit} | {' | '.join([*arms, *gains])} | seeds{' won' * won} |",
        f"|{' ---: |' * (len(arms) + len(gains) + 2)}",
    ]
    for value in labels:
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(list(scores(trials, arm, value).values()))) for arm in arms]
        differences = [paired(trials, first, other, value) for other in others]
        cells += [f"{gain.mean:+.1f} ± {gain.error:.1f}{p_text(gain.p)}" for gain in differences]
        seeds = f"{differences[0].won} of {differences[0].seeds}" if won else differences[0].seeds
        lines.append(f"| {value} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def p_text(p: float) -> str:
    """For a cell of the table; nothing where there is no p."""
    return "" if math.isnan(p) else f" (p {p_number(p)})"


def p_number(p: float) -> str:
    """Two digits of it, and no more zeros than anyone believes."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def equivalent_labels(trials: Sequence[Scored], arm: str, accuracy: float, labels: dict[int | str, float]) -> float:
    """With how many labels a class `arm` reaches `accuracy`, in percent: between the numbers that were tried by the
    logarithm of the number, on the line through its mean accuracies; 0 where fewer than the fewest would do, infinity
    where it never gets there."""
    points = [(count, mean_and_error(list(scores(trials, arm, value).values()))[0]) for value, count in labels.items()]
    if points[0][1] >= accuracy:
        return points[0][0] if points[0][1] == accuracy else 0.0
    for (few, low), (many, high) in pairwise(points):
        if high >= accuracy:
            return math.exp(math.log(few) + (accuracy - low) / (high - low) * math.log(many / few))
    return math.inf


def sentences(result: StudyResult) -> list[str]:
    """At each number of labels, what the first arm gains over each other one, in points and in labels, and how certain
    that is."""
    first, *others = result.arms
    what = "pre-training" if first == "pre-trained" else first
    found = []
    for value, count in result.labels.items():
        for other in others:
            gain = paired(result.trials, first, other, value)
            at = "With all labels" if value == "all" else f"At {value} label{'s' * (value != 1)} a class"
            verb, points = ("gains", gain.mean) if gain.mean >= 0 else ("loses", -gain.mean)
            text = f"{at} {what} {verb} {points:.1f} ± {gain.error:.1f} points over {other}"
            if math.isnan(gain.p):
                text += f" ({gain.seeds} seeds)"
            else:
                text += f" (p {p_number(gain.p)}, paired t-test over {gain.seeds} seeds)"
            if not gain.p < CERTAIN:
                text += ", which may be chance."
            elif gain.mean > 0:
                mean = mean_and_error(list(scores(result.trials, first, value).values()))[0]
                text += worth_in_labels(equivalent_labels(result.trials, other, mean, result.labels), count, other, result)
            else:
                text += "."
            found.append(text)
    return found


def worth_in_labels(equivalent: float, count: float, other: str, result: StudyResult) -> str:
    """The tail of a sentence: how many labels the gain is worth."""
    most = max(result.labels.values())
    if math.isinf(equivalent):
        return f"; {other} does not get there with {most:.0f}." if count < most else "."
    if equivalent - count < 0.5:
        return "."
    saved = round(equivalent - count)
    return f" and saves {saved} label{'s' * (saved != 1)} a class: {other} needs {equivalent:.0f} to get there."


def plot(result: StudyResult, title: str = "") -> Figure:
    """Accuracy over labels a class in a Matplotlib figure, which belongs to no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure.subplots(), result, title)
    return figure


def draw(axes: Axes, result: StudyResult, title: str = "") -> None:
    """Accuracy over labels a class, an arm a line: mean, standard error, and every seed as a dot."""
    from matplotlib.ticker import FixedLocator, NullLocator

    places = list(result.labels.values())
    for arm in result.arms:
        columns = [list(scores(result.trials, arm, value).values()) for value in result.labels]
        means, errors = zip(*(mean_and_error(column) for column in columns))
        line = axes.errorbar(places, means, errors, marker="o", markersize=4, capsize=3, label=arm)
        for place, column in zip(places, columns):
            axes.plot([place] * len(column), column, ".", color=line[0].get_color(), alpha=0.35, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(value) for value in result.labels])
    axes.set(xlabel="labels a class", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()


def report(result: StudyResult) -> str:
    """Table and sentences, as Markdown."""
    table = comparison_table(result.trials, result.arms, tuple(result.labels))
    return "\n".join([table, "", *(f"- {sentence}" for sentence in sentences(result))])


def write_report(result: StudyResult, folder: Path) -> None:
    """results.csv, tuning.csv, table.md and study.png, each whole or not at all."""
    write_trials(folder / "results.csv", result.trials)
    if result.tuning:
        write_trials(folder / "tuning.csv", result.tuning)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(report(result) + "\n", encoding="utf-8")
    with atomic_write(folder / "study.png") as temporary:
        plot(result).savefig(temporary, dpi=150, format="png")


def write_trials(file: Path, trials: Sequence[Trial]) -> None:
    """A row a trial."""
    columns = ["arm", "labels_per_class", "seed", "lr_factor", "layer_decay", "fold", "accuracy", "cross_entropy"]
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(columns)
        for trial in trials:
            fold = "" if trial.fold is None else f"{trial.fold[0] + 1} of {trial.fold[1]}"
            rates = ["" if value is None else f"{value:g}" for value in trial.rates]
            row = [trial.arm, trial.labels, trial.seed, *rates, fold]
            writer.writerow([*row, f"{trial.accuracy:.4f}", f"{trial.loss:.4f}"])


def read_trials(file: Path) -> list[Trial]:
    """What `write_trials` has written, to the digits that it gives."""
    from simmim.finetune.label_study.settings import labels_of
    from simmim.finetune.label_study.trials import Rates, Trial

    trials = []
    with file.open(newline="", encoding="utf-8") as text:
        for row in csv.DictReader(text):
            decay = float(row["layer_decay"]) if row["layer_decay"] else None
            part, _, parts = row["fold"].partition(" of ")
            trials.append(
                Trial(
                    row["arm"],
                    labels_of(row["labels_per_class"]),
                    int(row["seed"]),
                    Rates(float(row["lr_factor"]), decay),
                    float(row["accuracy"]),
                    float(row["cross_entropy"]),
                    (int(part) - 1, int(parts)) if part else None,
                )
            )
    return trials
