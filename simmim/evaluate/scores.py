"""Every feature's accuracy by k-NN and linear probe, and the choice of the best feature.

Shape letters: T images to train on, N to test with, D values of a feature vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from simmim.evaluate.labeled import Split
from simmim.evaluate.neighbors import held_out_knn_accuracy, knn_accuracy
from simmim.evaluate.probe import linear_probe

METHODS = ("probe", "knn")


class FeatureScore(NamedTuple):
    """The accuracies of one feature, in [0, 1].

    Attributes:
        name: of the feature.
        dim: D.
        knn: of k-NN on the test vectors.
        probe: of the linear probe on the test vectors; None where only k-NN was asked for.
        c: inverse strength of the probe's penalty; None where there is no probe.
        cross_validated: on the training vectors: of the probe by folds, or where there is no probe of k-NN, each vector held
            out in turn; None where a class has a single label.
        converged: as of `ProbeResult`.
    """

    name: str
    dim: int
    knn: float
    probe: float | None
    c: float | None
    cross_validated: float | None
    converged: bool

    @property
    def accuracy(self) -> float:
        """On the test vectors, by the method of `cross_validated`."""
        return self.knn if self.probe is None else self.probe


@dataclass(frozen=True)
class FeatureScores:
    """The accuracies of every feature with one draw of labels.

    Attributes:
        rows: one per feature, in their order.
        best: the row that `best_score` chooses.
        baseline: name of the row to compare with, which is never the best.
    """

    rows: tuple[FeatureScore, ...]
    best: FeatureScore | None
    baseline: str | None = None

    def row(self, name: str) -> FeatureScore:
        """The row of one feature."""
        return next(row for row in self.rows if row.name == name)


def score_features(
    split: Split,
    method: str = "probe",
    k: int = 20,
    temperature: float = 0.07,
    progress: Callable[[FeatureScore], object] | None = None,
    baseline: str | None = None,
    device: str | torch.device = "cpu",
) -> FeatureScores:
    """The accuracies of several features, and the best of them.

    The best feature is chosen by accuracy on held-out training vectors, never by test accuracy: the largest of many test
    accuracies is too high by chance. So only the best feature's test accuracy may be reported as what to expect.

    Args:
        method: probe, the linear probe with k-NN beside it; or knn, k-NN alone, which needs no scikit-learn.
        k, temperature, device: as of `knn_predict`.
        progress: called with each row when it is computed.
        baseline: name of a feature to compare with, which is never the best.

    Raises:
        ValueError: when training and test vectors are of different features, for an unknown method, and as `knn_predict`
            and `linear_probe`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: give {' or '.join(METHODS)}")
    if set(split.train) != set(split.test) or not split.train:
        differing = ", ".join(sorted(set(split.train) ^ set(split.test))) or "none given"
        raise ValueError(f"train and test features differ ({differing}): give the same, at least one")
    rows = []
    for name in split.train:
        train, train_labels = split.train[name], split.train_labels
        test, test_labels = split.test[name], split.test_labels
        knn = knn_accuracy(train, train_labels, test, test_labels, k, temperature, device=device)
        if method == "probe":
            probe = linear_probe(train, train_labels, test, test_labels, split.seed)
            row = FeatureScore(name, train.shape[1], knn, probe.accuracy, probe.c, probe.cross_validated, probe.converged)
        else:
            held_out = held_out_knn_accuracy(train, train_labels, k, temperature, device)
            row = FeatureScore(name, train.shape[1], knn, None, None, held_out, True)
        rows.append(row)
        if progress:
            progress(row)
    return FeatureScores(tuple(rows), best_score(rows, baseline), baseline)


def best_score(rows: Sequence[FeatureScore], baseline: str | None) -> FeatureScore | None:
    """The row of the highest cross-validated accuracy, of equals the one with the fewest values.

    None where a class has a single label: then only the test labels could tell.
    """
    candidates = [row for row in rows if row.cross_validated is not None and row.name != baseline]
    return max(candidates, key=lambda row: (row.cross_validated, -row.dim), default=None)


# --- over several draws of labels --------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over draws and its standard error, which is None for a single draw."""

    mean: float
    error: float | None

    def percent(self) -> str:
        """In percent, as "83.1 ± 0.4"."""
        return f"{100 * self.mean:.1f}" + ("" if self.error is None else f" ± {100 * self.error:.1f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of values, one per draw."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), error)


def mean_scores(draws: Sequence[FeatureScores]) -> list[FeatureScore]:
    """One row per feature with the means over the draws; of C the geometric mean."""
    means = []
    for name in [row.name for row in draws[0].rows]:
        rows = [scores.row(name) for scores in draws]
        strengths = [row.c for row in rows if row.c is not None]
        means.append(
            FeatureScore(
                name,
                rows[0].dim,
                float(np.mean([row.knn for row in rows])),
                mean_or_none([row.probe for row in rows]),
                float(np.exp(np.mean(np.log(strengths)))) if strengths else None,
                mean_or_none([row.cross_validated for row in rows]),
                all(row.converged for row in rows),
            )
        )
    return means


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is None."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if len(present) == len(values) else None


def scores_table(*draws: FeatureScores) -> str:
    """A Markdown table of accuracies in percent, with standard errors over several draws, and what follows from it.

    The best feature is in bold. Below stands how it was chosen and how it compares with the baseline, if there is one.
    """
    baseline = draws[0].baseline
    rows = mean_scores(draws) if len(draws) > 1 else list(draws[0].rows)
    best = best_score(rows, baseline) if len(draws) > 1 else draws[0].best
    probed = rows[0].probe is not None
    columns = ["k-NN", "linear probe", "C", "cross-validated"] if probed else ["k-NN", "held out"]
    lines = [f"| {' | '.join(['feature', 'values', *columns])} |", "| :--- | ---: |" + " ---: |" * len(columns)]

    def percent(row: FeatureScore, field: str) -> str:
        """One field over all draws."""
        values = [getattr(scores.row(row.name), field) for scores in draws]
        return "–" if None in values else estimate(values).percent()

    for row in rows:
        name = f"**{row.name}**" if best is not None and row.name == best.name else row.name
        cells = [percent(row, "knn")]
        if probed:
            mark = "" if row.converged else " (not converged)"
            cells += [percent(row, "probe") + mark, f"{row.c:.3g}" if len(draws) > 1 else f"{row.c:g}"]
        lines.append(f"| {' | '.join([name, str(row.dim), *cells, percent(row, 'cross_validated')])} |")
    return "\n".join([*lines, "", *conclusions(best, baseline, draws)])


def conclusions(best: FeatureScore | None, baseline: str | None, draws: Sequence[FeatureScores]) -> list[str]:
    """Sentences: which feature was chosen and how, and by how much it differs from the baseline."""
    if best is None:
        return ["None is chosen: a class has a single label, which cross-validation cannot hold out."]
    procedure = "cross-validation" if best.probe is not None else "holding out each in turn"
    lines = [f"Chosen by {procedure} on the training images alone: {best.name}."]
    if baseline is not None:
        gain = estimate([scores.row(best.name).accuracy - scores.row(baseline).accuracy for scores in draws])
        classifier = "linear probe" if best.probe is not None else "k-NN"
        points = f"{100 * abs(gain.mean):.1f}" + ("" if gain.error is None else f" ± {100 * gain.error:.1f}")
        direction = "above" if gain.mean > 0 else "below"
        size = baseline.partition(", ")[2]
        lines.append(f"By {classifier} it is {points} points {direction} plain pixels ({size}).")
    return lines
