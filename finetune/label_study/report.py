"""The report of a study: tables, a sentence for each number of labels, a plot, and the trials as CSV files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.evaluate.paired import SIGNIFICANCE_LEVEL, mean_and_error, p_text, t_interval
from simmim.files import atomic_write
from simmim.finetune.label_study.chosen_rates import edge_warning, rates_cells
from simmim.finetune.label_study.contrasts import Contrast, contrasts_of
from simmim.finetune.label_study.gains import (
    PairedGain,
    Scored,
    equivalent_interval,
    equivalent_labels,
    mean_score,
    paired_gain,
    scores_by_seed,
)
from simmim.finetune.label_study.results import StudyResult, write_trials
from simmim.finetune.label_study.settings import ALL, PLAIN, SCRATCH
from simmim.messages import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Spread = Callable[[Sequence[float]], tuple[float, float]]
NOT_MEASURED = "–"


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


# --- Tables ------------------------------------------------------------------------------------------------------------


def comparison_table(
    trials: Sequence[Scored],
    arms: Sequence[str],
    labels: Sequence[int | str],
    unit: str = "labels per class",
    show_won: bool = False,
    spread: Spread = mean_and_error,
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
    rows = []
    for value in labels:
        differences = [paired_gain(trials, first, other, value, spread) for other in others]
        gain = differences[0]
        seeds = f"{gain.num_won} of {gain.num_seeds}" if show_won else str(gain.num_seeds)
        cells = [score_cell(trials, arm, value, spread) for arm in arms]
        rows.append([str(value), *cells, *map(gain_cell, differences), seeds])
    return markdown([unit, *arms, *gains, f"seeds{' won' * show_won}"], rows, rates_columns(arms, labels, rates))


def scores_and_gains_tables(result: StudyResult) -> str:
    """Two tables, of the score of each arm with the rates that it took, and of what the arms gain over one another; a row
    per number of labels in both."""
    trials, labels = result.trials, tuple(result.labels)
    scores = [[str(value), *(score_cell(trials, arm, value, t_interval) for arm in result.arms)] for value in labels]
    for row, value in zip(scores, labels):
        row.append(str(max(len(scores_by_seed(trials, arm, value)) for arm in result.arms)))
    contrasts, gains = contrasts_of(result), []
    for value in labels:
        found = [contrast_gain(result, contrast, value) for contrast in contrasts]
        gains.append([str(value), *(gain_cell(gain) if gain else NOT_MEASURED for gain in found)])
    rates = rates_columns(result.arms, labels, rates_cells(result))
    first = markdown([result.measure.unit, *result.arms, "seeds"], scores, rates)
    titles = [f"{contrast.first} over {contrast.second}" for contrast in contrasts]
    return f"{first}\n\n{markdown([result.measure.unit, *titles], gains)}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], more: Mapping[str, Sequence[str]] | None = None) -> str:
    """A Markdown table of columns on the right, and of further ones, title and cells, on the left."""
    more = more or {}
    lines = [f"| {' | '.join([*titles, *more])} |", f"|{' ---: |' * len(titles)}{' --- |' * len(more)}"]
    for number, row in enumerate(rows):
        lines.append(f"| {' | '.join([*row, *(cells[number] for cells in more.values())])} |")
    return "\n".join(lines)


def rates_columns(
    arms: Sequence[str], labels: Sequence[int | str], rates: Mapping[tuple[str, int | str], str] | None
) -> dict[str, list[str]]:
    """A column of rates per arm, by its title; none without rates."""
    if not rates:
        return {}
    return {f"rates {arm}": [rates.get((arm, value), NOT_MEASURED) for value in labels] for arm in arms}


def score_cell(trials: Sequence[Scored], arm: str, labels: int | str, spread: Spread) -> str:
    """Mean ± spread of an arm in percent."""
    scores = list(scores_by_seed(trials, arm, labels).values())
    return "{:.1f} ± {:.1f}".format(*spread(scores)) if scores else NOT_MEASURED


def gain_cell(gain: PairedGain) -> str:
    """Mean ± spread of a gain, and p where it is known."""
    return f"{gain.mean:+.1f} ± {gain.spread:.1f}" + ("" if math.isnan(gain.p) else f" (p {p_text(gain.p)})")


def contrast_gain(result: StudyResult, contrast: Contrast, labels: int | str) -> PairedGain | None:
    """The gain with a number of labels, with its 95 % interval; None where one of the two was not measured."""
    if not all(scores_by_seed(result.trials, arm, labels) for arm in (contrast.first, contrast.second)):
        return None
    return paired_gain(result.trials, contrast.first, contrast.second, labels, t_interval)


# --- Sentences ---------------------------------------------------------------------------------------------------------


def gain_sentences(result: StudyResult) -> list[str]:
    """For each number of labels and each contrast what is gained, in points and in labels; whether that may be chance."""
    contrasts = contrasts_of(result)
    sentences = [gain_sentence(result, value, contrast) for value in result.labels for contrast in contrasts]
    return [sentence for sentence in sentences if sentence]


def gain_sentence(result: StudyResult, labels: int | str, contrast: Contrast) -> str:
    """What the first arm of a contrast gains over the other with a number of labels; empty where one was not measured."""
    gain, other = contrast_gain(result, contrast, labels), contrast.second
    if gain is None:
        return ""
    condition = "With all labels" if labels == ALL else f"With {result.measure.counted(labels)}"  # type: ignore[arg-type]
    verb, points = ("gains", gain.mean) if gain.mean >= 0 else ("loses", -gain.mean)
    test = "" if math.isnan(gain.p) else f"p {p_text(gain.p)}, paired t-test over "
    against = f"training {other}" if other == SCRATCH else other
    text = (
        f"{condition}{contrast.given} {contrast.subject} {verb} {points:.1f} ± {gain.spread:.1f} points against {against} "
        f"({test}{counted(gain.num_seeds, 'seed')})"
    )
    if not gain.p < SIGNIFICANCE_LEVEL:
        return f"{text}, which may be chance."
    if gain.mean <= 0:
        return f"{text}."
    return text + saved_labels(needed_labels(result, labels, contrast), labels, contrast, result)


def needed_labels(result: StudyResult, labels: int | str, contrast: Contrast) -> float:
    """The labels per class that the second arm needs for the first one's score, as of `equivalent_labels`."""
    score, _ = mean_score(result.trials, contrast.first, labels)
    return equivalent_labels(result.trials, contrast.second, score, result.labels)


def measured_counts(result: StudyResult, arm: str) -> list[float]:
    """The numbers of labels per class that an arm was measured with."""
    return [count for value, count in result.labels.items() if scores_by_seed(result.trials, arm, value)]


def saved_labels(equivalent: float, labels: int | str, contrast: Contrast, result: StudyResult) -> str:
    """The end of a sentence: how many labels the gain saves.

    Args:
        equivalent: labels per class that the other arm needs for the same score.
    """
    count, other = result.labels[labels], contrast.second
    most = max(measured_counts(result, other))
    if math.isinf(equivalent):
        if count >= most:
            return "."
        reach = f"; {other} does not reach that score with {most:.0f}"
        return (
            f"{reach}: more than {result.measure.counted(most - count)} saved ({interval(result, labels, contrast, count)})."
        )
    if equivalent - count < 0.5:
        return "."
    return (
        f" and saves {result.measure.counted(equivalent - count)} ({interval(result, labels, contrast, count)}): "
        f"{other} needs {equivalent:.0f} for the same score."
    )


def interval(result: StudyResult, labels: int | str, contrast: Contrast, less: float = 0.0) -> str:
    """The 95 % interval of the labels that the second arm needs; a limit outside what was measured as over or under its end.

    Args:
        less: taken away from the limits, for labels saved.
    """
    counts = measured_counts(result, contrast.second)

    def limit(equivalent: float) -> str:
        if equivalent == 0:
            return f"under {min(counts) - less:.0f}"
        return f"over {max(counts) - less:.0f}" if math.isinf(equivalent) else f"{equivalent - less:.0f}"

    low, high = map(limit, equivalent_interval(result, labels, contrast.second, contrast.first))
    return f"95 % interval {low}" if low == high else f"95 % interval {low} to {high}"


def worth_sentences(result: StudyResult) -> list[str]:
    """What the labels are worth without pre-training, without unlabeled images, and without either, where that is measured
    with more labels than one number."""
    sentences = []
    for contrast in contrasts_of(result):
        if contrast.without and len(measured_counts(result, contrast.second)) > 1:
            sentences.append(worth_sentence(result, contrast))
    return sentences


def worth_sentence(result: StudyResult, contrast: Contrast) -> str:
    """With which number of labels the second arm is as good as the first, for each number at which there is a gain that is
    hardly chance."""
    worth, most = [], max(measured_counts(result, contrast.second))
    for value, count in result.labels.items():
        gain = contrast_gain(result, contrast, value)
        if gain is None or gain.mean <= 0 or not gain.p < SIGNIFICANCE_LEVEL:
            continue
        needed = needed_labels(result, value, contrast)
        if math.isinf(needed) and count >= most:
            continue  # no larger number was measured
        text = f"more than {most:.0f}" if math.isinf(needed) else f"{needed:.0f}"
        verb = "is" if round(count) == 1 else "are"
        worth.append(f"{result.measure.counted(count)} {verb} worth {text} ({interval(result, value, contrast)})")
    having = f"With{contrast.given.removeprefix(' and')}, your" if contrast.given else "Your"
    if not worth:
        return f"{having} labels are not shown to be worth more than without {contrast.without}: no gain is beyond chance."
    return f"{having} {'; '.join(worth)} without {contrast.without}."


def report(result: StudyResult) -> str:
    """Tables, what they show, and sentences, as Markdown."""
    if any(result.side(arm).recipe != PLAIN for arm in result.arms):
        table = scores_and_gains_tables(result)
    else:
        labels, rates = tuple(result.labels), rates_cells(result)
        table = comparison_table(result.trials, result.arms, labels, result.measure.unit, spread=t_interval, rates=rates)
    sentences = [f"- {sentence}" for sentence in gain_sentences(result)]
    worth = worth_sentences(result)
    facts = ["", result.facts] if result.facts else []
    return "\n".join([table, "", *explanation(result), "", *sentences, *([""] if worth else []), *worth, *facts])


def explanation(result: StudyResult) -> list[str]:
    """What the numbers of the table are, what they do not contain, and which choices should be looked at, in lines."""
    varied = "draws of labels, initial weights and order"
    if ALL in result.labels:
        varied += " (with all labels: initial weights and order alone)"
    judged_by = f"Judged by {result.judged_by}, the same for all. " if result.judged_by else ""
    lines = [
        f"{result.measure.title} after the last step in percent. {judged_by}± is the 95 % interval of the mean over seeds "
        f"by Student's t: {varied}. Of labels saved it is a bootstrap of seeds. Neither contains the chance of the "
        "pre-training or of the judging images.",
        *([" ".join(result.notes)] if result.notes else []),
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
    """Draw accuracy over labels per class: for each arm a line of means with 95 % intervals, and a dot per seed. A start has
    one color; its line with unlabeled images is dashed."""
    from matplotlib.ticker import FixedLocator, NullLocator

    positions = list(result.labels.values())
    starts = list(dict.fromkeys(result.side(arm).start for arm in result.arms))
    for arm in result.arms:
        start, recipe = result.side(arm)
        style = {"color": f"C{starts.index(start)}", "linestyle": "-" if recipe == PLAIN else "--"}
        columns = [list(scores_by_seed(result.trials, arm, value).values()) for value in result.labels]
        found = [(position, *t_interval(column)) for position, column in zip(positions, columns) if column]
        places, means, errors = zip(*found)
        axes.errorbar(places, means, errors, marker="o", markersize=4, capsize=3, label=arm, **style)  # type: ignore[arg-type]
        for position, column in zip(positions, columns):
            axes.plot([position] * len(column), column, ".", color=style["color"], alpha=0.35, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(positions))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(value) for value in result.labels])
    axes.set(xlabel=result.measure.unit, ylabel=f"{result.measure.title}, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="mean, 95 % t interval over seeds", title_fontsize="small")


def write_report(result: StudyResult, folder: Path) -> None:
    """Write results.csv, tuning.csv, table.md and study.png, each whole or not at all."""
    write_trials(folder / "results.csv", result.trials, result.measure)
    if result.tuning:
        write_trials(folder / "tuning.csv", result.tuning, result.measure)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(report(result) + "\n", encoding="utf-8")
    with atomic_write(folder / "study.png") as temporary:
        plot(result).savefig(temporary, dpi=150, format="png")
