"""What one arm gains over another, over the same seeds: means, intervals, tests, and the labels that it saves.

Intervals are of 95 %: of means those of Student's t over the seeds, of labels saved those of a bootstrap of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from simmim.evaluate.paired import CONFIDENCE, mean_and_error, p_value
from simmim.finetune.label_study.results import StudyResult

BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 2000, 0


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
    return PairedGain(mean, error, spread(gains)[1], p_value(gains), len(gains), sum(gain > 0 for gain in gains))


def equivalent_labels(trials: Sequence[Scored], arm: str, score: float, labels: Mapping[int | str, float]) -> float:
    """The number of labels per class with which `arm` reaches a score.

    Mean scores are interpolated linearly over the logarithm of the number of labels.

    Args:
        score: in percent.
        labels: as of `StudyResult`.

    Returns:
        0 where fewer than the fewest labels would do, infinity where the arm never reaches the score.
    """
    points = [
        (count, mean_score(trials, arm, value)[0]) for value, count in labels.items() if scores_by_seed(trials, arm, value)
    ]
    return labels_for_score(points, score)


def labels_for_score(points: Sequence[tuple[float, float]], score: float) -> float:
    """As `equivalent_labels`, from (number of labels, mean score), in ascending numbers."""
    if points[0][1] >= score:
        return points[0][0] if points[0][1] == score else 0.0
    for (few, low), (many, high) in pairwise(points):
        if high >= score:
            return math.exp(math.log(few) + (score - low) / (high - low) * math.log(many / few))
    return math.inf


def equivalent_interval(result: StudyResult, labels: int | str, other: str, first: str | None = None) -> tuple[float, float]:
    """The 95 % interval of the labels that `other` needs for the score of another arm, by a bootstrap of the seeds.

    A seed is drawn with all its trials, as they share labels. The same trials give the same interval.

    Args:
        labels: with which the other arm has that score.
        first: the other arm; by default that of the study.

    Returns:
        As of `equivalent_labels`: 0 for fewer than the fewest labels, infinity for more than the most.
    """
    ours = scores_by_seed(result.trials, first or result.arms[0], labels)
    of_other = {value: scores_by_seed(result.trials, other, value) for value in result.labels}
    theirs = [scores for scores in of_other.values() if scores]
    seeds = sorted(set(ours).intersection(*theirs))
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(seeds), size=(BOOTSTRAP_DRAWS, len(seeds)))
    scores = np.array([ours[seed] for seed in seeds])[drawn].mean(axis=1)
    columns = [np.array([column[seed] for seed in seeds])[drawn].mean(axis=1) for column in theirs]
    counts = [result.labels[value] for value, scores in of_other.items() if scores]
    needed = [
        labels_for_score(list(zip(counts, means)), score)
        for score, means in zip(scores.tolist(), np.stack(columns, axis=1).tolist())
    ]
    # Numbers that were found, not means of them, one of which may be infinite.
    low, high = np.quantile(needed, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), method="inverted_cdf")
    return float(low), float(high)
