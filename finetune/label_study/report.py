"""The report of a study: a table, a sentence for each number of labels, a plot, and the trials as CSV files.

Intervals are of 95 %: of means those of Student's t over the seeds, of labels saved those of a bootstrap of the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from simmim.files import atomic_write
from simmim.finetune.label_study.chosen_rates import edge_warning, rates_cells
from simmim.finetune.label_study.results import StudyResult, write_trials
from simmim.finetune.label_study.settings import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNIFICANCE_LEVEL = 0.05  # the usual one; a difference above it is called possible chance
CONFIDENCE = 1 - SIGNIFICANCE_LEVEL
BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 2000, 0


def check_libraries() -> None:
    """Check that a report can be made, before hours are spent on the trials.

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
    """What the comparison of arms needs to know of a trial; `score` is in [0, 1], higher is better."""

    @property
    def arm(self) -> str: ...

    @property
    def labels(self) -> int | str: ...

    @property
    def seed(self) -> int: ...

    @property
    def score(self) -> float: ...


class PairedGain(NamedTuple):
    """The difference between two arms over the same seeds, in percentage points.

    Attributes:
        mean, error: of the difference, and its standard error; the error of a single seed is nan.
        spread: what is shown after ±: the standard error, or half the width of an interval.
        p: of the two-sided paired t-test; nan for a single seed or equal differences.
        num_seeds: number of seeds.
        num_won: number of seeds with a positive difference.
    """

    mean: float
    error: float
    spread: float
    p: float
    num_seeds: int
    num_won: int


# --- Statistics --------------------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is nan for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t, which is nan for a single value."""
    mean, error = mean_and_error(values)
    return mean, error * t_quantile(len(values))


def t_quantile(count: int) -> float:
    """Half the width of the 95 % interval of the mean of `count` values, in standard errors; nan for a single value."""
    if count < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, count - 1))


def scores_by_seed(trials: Sequence[Scored], arm: str, labels: int | str) -> dict[int, float]:
    """Scores of an arm in percent."""
    return {trial.seed: 100 * trial.score for trial in trials if (trial.arm, trial.labels) == (arm, labels)}


def mean_score(trials: Sequence[Scored], arm: str, labels: int | str) -> tuple[float, float]:
    """Mean score of an arm over the seeds, and its standard error, in percent."""
    return mean_and_error(list(scores_by_seed(trials, arm, labels).values()))


def paired_gain(
    trials: Sequence[Scored],
    first: str,
    second: str,
    labels: int | str,
    spread: Callable[[Sequence[float]], tuple[float, float]] = mean_and_error,
) -> PairedGain:
    """What the arm `first` gains over `second`, over the seeds that both have; `spread` as of `comparison_table`."""
    ours, theirs = scores_by_seed(trials, first, labels), scores_by_seed(trials, second, labels)
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean, error = mean_and_error(gains)
    p, num_won = p_value(mean, error, len(gains)), sum(gain > 0 for gain in gains)
    return PairedGain(mean, error, spread(gains)[1], p, len(gains), num_won)


def p_value(mean: float, error: float, count: int) -> float:
    """Two-sided p of Student's t-test that the mean of `count` differences is 0."""
    if count < 2 or not error > 0:
        return math.nan
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / error, count - 1))


def equivalent_labels(trials: Sequence[Scored], arm: str, score: float, labels: Mapping[int | str, float]) -> float:
    """The number of labels per class with which `arm` reaches a score.

    Mean scores are interpolated linearly over the logarithm of the number of labels.

    Args:
        score: in percent.
        labels: as of `StudyResult`.

    Returns:
        0 where fewer than the fewest labels would do, infinity where the arm never reaches the score.
    """
    return labels_for_score([(count, mean_score(trials, arm, value)[0]) for value, count in labels.items()], score)


def labels_for_score(points: Sequence[tuple[float, float]], score: float) -> float:
    """As `equivalent_labels`, from (number of labels, mean score), in ascending numbers."""
    if points[0][1] >= score:
        return points[0][0] if points[0][1] == score else 0.0
    for (few, low), (many, high) in pairwise(points):
        if high >= score:
            return math.exp(math.log(few) + (score - low) / (high - low) * math.log(many / few))
    return math.inf


def equivalent_interval(result: StudyResult, labels: int | str, other: str) -> tuple[float, float]:
    """The 95 % interval of the labels that `other` needs for the first arm's score, by a bootstrap of the seeds.

    A seed is drawn with all its trials, as they share labels. The same trials give the same interval.

    Returns:
        As of `equivalent_labels`: 0 for fewer than the fewest labels, infinity for more than the most.
    """
    ours = scores_by_seed(result.trials, result.arms[0], labels)
    theirs = [scores_by_seed(result.trials, other, value) for value in result.labels]
    seeds = sorted(set(ours).intersection(*theirs))
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(seeds), size=(BOOTSTRAP_DRAWS, len(seeds)))
    scores = np.array([ours[seed] for seed in seeds])[drawn].mean(axis=1)
    columns = [np.array([column[seed] for seed in seeds])[drawn].mean(axis=1) for column in theirs]
    counts = list(result.labels.values())
    needed = [
        labels_for_score(list(zip(counts, means)), score)
        for score, means in zip(scores.tolist(), np.stack(columns, axis=1).tolist())
    ]
    # Numbers that were found, not means of them, one of which may be infinite.
    low, high = np.quantile(needed, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), method="inverted_cdf")
    return float(low), float(high)


# --- Text --------------------------------------------------------------------------------------------------------------


def comparison_table(
    trials: Sequence[Scored],
    arms: Sequence[str],
    labels: Sequence[int | str],
    unit: str = "labels per class",
    show_won: bool = False,
    spread: Callable[[Sequence[float]], tuple[float, float]] = mean_and_error,
    rates: Mapping[tuple[str, int | str], str] | None = None,
) -> str:
    """A Markdown table with a row per number of labels: the mean score ± spread of every arm in percent, and what the first
    arm gains over each other one.

    Args:
        unit: of the labels, which heads their column.
        show_won: also tell for how many of the seeds the first arm was above the second.
        spread: mean of values, and the number after ±: by default the standard error, or `t_interval`.
        rates: with what each arm was trained, by arm and labels, for a column per arm.
    """
    first, *others = arms
    gains = ["paired gain"] if len(others) == 1 else [f"gain over {other}" for other in others]
    lines = [
        f"| {unit} | {' | '.join([*arms, *gains])} | seeds{' won' * show_won} |",
        f"|{' ---: |' * (len(arms) + len(gains) + 2)}",
    ]
    if rates:
        lines[0] += "".join(f" rates {arm} |" for arm in arms)
        lines[1] += " --- |" * len(arms)
    for value in labels:
        columns = [list(scores_by_seed(trials, arm, value).values()) for arm in arms]
        cells = ["{:.1f} ± {:.1f}".format(*spread(column)) for column in columns]
        differences = [paired_gain(trials, first, other, value, spread) for other in others]
        cells += [f"{gain.mean:+.1f} ± {gain.spread:.1f}{p_in_brackets(gain.p)}" for gain in differences]
        gain = differences[0]
        seeds = f"{gain.num_won} of {gain.num_seeds}" if show_won else gain.num_seeds
        tuned = "".join(f" {rates[arm, value]} |" for arm in arms) if rates else ""
        lines.append(f"| {value} | {' | '.join(cells)} | {seeds} |{tuned}")
    return "\n".join(lines)


def p_in_brackets(p: float) -> str:
    """For a cell of the table; empty for nan."""
    return "" if math.isnan(p) else f" (p {p_text(p)})"


def p_text(p: float) -> str:
    """Relation and number, in two digits; very small numbers only as such."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def gain_sentences(result: StudyResult) -> list[str]:
    """For each number of labels, what the first arm gains over each other one, in points and in labels, and whether that may
    be chance."""
    _, *others = result.arms
    return [gain_sentence(result, value, other) for value in result.labels for other in others]


def gain_sentence(result: StudyResult, labels: int | str, other: str) -> str:
    """What the first arm gains over another one with a number of labels."""
    first = result.arms[0]
    gain = paired_gain(result.trials, first, other, labels, t_interval)
    subject = "pre-training" if first == "pre-trained" else first
    condition = "With all labels" if labels == ALL else f"With {labels} label{'s' * (labels != 1)} per class"
    verb, points = ("gains", gain.mean) if gain.mean >= 0 else ("loses", -gain.mean)
    test = "" if math.isnan(gain.p) else f"p {p_text(gain.p)}, paired t-test over "
    text = (
        f"{condition} {subject} {verb} {points:.1f} ± {gain.spread:.1f} points over {other} ({test}{gain.num_seeds} seeds)"
    )
    if not gain.p < SIGNIFICANCE_LEVEL:
        return f"{text}, which may be chance."
    if gain.mean <= 0:
        return f"{text}."
    score, _ = mean_score(result.trials, first, labels)
    return text + saved_labels(equivalent_labels(result.trials, other, score, result.labels), labels, other, result)


def saved_labels(equivalent: float, labels: int | str, other: str, result: StudyResult) -> str:
    """The end of a sentence: how many labels the gain saves.

    Args:
        equivalent: labels per class that the other arm needs for the same score.
    """
    count, most = result.labels[labels], max(result.labels.values())
    if math.isinf(equivalent):
        if count >= most:
            return "."
        reach = f"; {other} does not reach that score with {most:.0f}"
        return f"{reach}: more than {most - count:.0f} labels per class saved {saved_interval(result, labels, other)}."
    if equivalent - count < 0.5:
        return "."
    saved = round(equivalent - count)
    return (
        f" and saves {saved} label{'s' * (saved != 1)} per class {saved_interval(result, labels, other)}: "
        f"{other} needs {equivalent:.0f} for the same score."
    )


def saved_interval(result: StudyResult, labels: int | str, other: str) -> str:
    """The 95 % interval of the labels saved, in parentheses; a limit outside what was measured as over or under its end."""
    count, counts = result.labels[labels], list(result.labels.values())

    def limit(equivalent: float) -> str:
        if equivalent == 0:
            return f"under {min(counts) - count:.0f}"
        return f"over {max(counts) - count:.0f}" if math.isinf(equivalent) else f"{equivalent - count:.0f}"

    low, high = map(limit, equivalent_interval(result, labels, other))
    return f"(95 % interval {low})" if low == high else f"(95 % interval {low} to {high})"


def report(result: StudyResult) -> str:
    """Table, what it shows, and sentences, as Markdown."""
    table = comparison_table(result.trials, result.arms, tuple(result.labels), spread=t_interval, rates=rates_cells(result))
    sentences = [f"- {sentence}" for sentence in gain_sentences(result)]
    return "\n".join([table, "", *explanation(result), "", *sentences])


def explanation(result: StudyResult) -> list[str]:
    """What the numbers of the table are, what they do not contain, and which choices should be looked at, in lines."""
    varied = "draws of labels, initial weights and order"
    if ALL in result.labels:
        varied += " (with all labels: initial weights and order alone)"
    judged_by = f"Judged by {result.judged_by}, the same for all. " if result.judged_by else ""
    lines = [
        f"Accuracy after the last step in percent. {judged_by}± is the 95 % interval of the mean over seeds by Student's "
        f"t: {varied}. Of labels saved it is a bootstrap of seeds. Neither contains the chance of the pre-training or of "
        "the judging images."
    ]
    warning = edge_warning(result)
    return [*lines, *([warning] if warning else [])]


# --- Plot and files ----------------------------------------------------------------------------------------------------


def plot(result: StudyResult, title: str = "") -> Figure:
    """Accuracy over labels per class, in a Matplotlib figure without a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure.subplots(), result, title)
    return figure


def draw(axes: Axes, result: StudyResult, title: str = "") -> None:
    """Draw accuracy over labels per class: for each arm a line of means with 95 % intervals, and a dot per seed."""
    from matplotlib.ticker import FixedLocator, NullLocator

    positions = list(result.labels.values())
    for arm in result.arms:
        columns = [list(scores_by_seed(result.trials, arm, value).values()) for value in result.labels]
        means, errors = zip(*(t_interval(column) for column in columns))
        line = axes.errorbar(positions, means, errors, marker="o", markersize=4, capsize=3, label=arm)
        for position, column in zip(positions, columns):
            axes.plot([position] * len(column), column, ".", color=line[0].get_color(), alpha=0.35, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(positions))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(value) for value in result.labels])
    axes.set(xlabel="labels per class", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="mean, 95 % t interval over seeds", title_fontsize="small")


def write_report(result: StudyResult, folder: Path) -> None:
    """Write results.csv, tuning.csv, table.md and study.png, each whole or not at all."""
    write_trials(folder / "results.csv", result.trials)
    if result.tuning:
        write_trials(folder / "tuning.csv", result.tuning)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(report(result) + "\n", encoding="utf-8")
    with atomic_write(folder / "study.png") as temporary:
        plot(result).savefig(temporary, dpi=150, format="png")
