"""Every feature's accuracy by k-NN and linear probe, and the choice of the best feature.

Shape letters: T images to train on, N to test with, D values of a feature vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from simmim.evaluate.attentive import attentive_probe, mean_token
from simmim.evaluate.labeled import Split
from simmim.evaluate.neighbors import held_out_knn_accuracy, knn_accuracy
from simmim.evaluate.probe import linear_probe
from simmim.evaluate.verdict import LEAST_GAIN, verdict

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
            out in turn; None where a class has a single label, or pages of a single file.
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
        untrained: the same encoder with random weights, by a feature of its own choice; None where it was not asked for.
    """

    rows: tuple[FeatureScore, ...]
    best: FeatureScore | None
    baseline: str | None = None
    untrained: FeatureScore | None = None

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
    attentive: Mapping[str, int] = MappingProxyType({}),
) -> FeatureScores:
    """The accuracies of several features, and the best of them.

    The best feature is chosen by accuracy on held-out training vectors, never by test accuracy: the largest of many test
    accuracies is too high by chance. So only the best feature's test accuracy may be reported as what to expect.

    Args:
        method: probe, the linear probe with k-NN beside it; or knn, k-NN alone, which needs no scikit-learn.
        k, temperature, device: as of `knn_predict`.
        progress: called with each row when it is computed.
        baseline: name of a feature to compare with, which is never the best.
        attentive: channels by name of the features that are `Tokens`: their probe is attentive, and k-NN is by their mean.

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
        channels = attentive.get(name)
        pooled = (train, test) if channels is None else (mean_token(train, channels), mean_token(test, channels))
        knn = knn_accuracy(pooled[0], train_labels, pooled[1], test_labels, k, temperature, device=device)
        if method == "probe":
            if channels is None:
                probe = linear_probe(train, train_labels, test, test_labels, split.seed, split.train_files)
            else:
                probe = attentive_probe(train, train_labels, test, test_labels, channels, split.seed, split.train_files)
            row = FeatureScore(name, train.shape[1], knn, probe.accuracy, probe.c, probe.cross_validated, probe.converged)
        else:
            held_out = held_out_knn_accuracy(pooled[0], train_labels, k, temperature, device, split.train_files)
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


def scores_table(*draws: FeatureScores, num_images: int | None = None) -> str:
    """A Markdown table of accuracies in percent, with standard errors over several draws, and what follows from it.

    The best feature is in bold. Below stands how it was chosen and how it compares with the baseline and the untrained
    encoder, where there are.

    Args:
        num_images: of the pre-training, where known.
    """
    baseline = draws[0].baseline
    rows = mean_scores(draws) if len(draws) > 1 else list(draws[0].rows)
    best = best_score(rows, baseline) if len(draws) > 1 else draws[0].best
    probed = rows[0].probe is not None
    any_attentive = any(row.name.endswith("attentive") for row in rows)
    columns = (
        ["k-NN", "probe" if any_attentive else "linear probe", "C", "cross-validated"] if probed else ["k-NN", "held out"]
    )
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
    lines += untrained_row(draws, probed)
    return "\n".join([*lines, "", *conclusions(rows, best, draws, num_images)])


def untrained_row(draws: Sequence[FeatureScores], probed: bool) -> list[str]:
    """The line of the untrained encoder in the table; none where a draw lacks it."""
    each = [scores.untrained for scores in draws if scores.untrained is not None]
    if len(each) < len(draws):
        return []
    names = sorted({row.name for row in each})
    cells = [estimate([row.knn for row in each]).percent()]
    if probed:
        cells += [estimate([row.accuracy for row in each]).percent(), "–"]
    return [f"| untrained: {' or '.join(names)} | {each[0].dim} | {' | '.join([*cells, '–'])} |"]


def conclusions(
    rows: Sequence[FeatureScore], best: FeatureScore | None, draws: Sequence[FeatureScores], num_images: int | None
) -> list[str]:
    """Sentences: which feature was chosen and how, by how much it differs from baseline and untrained encoder, and whether
    the pre-training was worth it.

    Args:
        rows: of every feature, means over the draws.
    """
    baseline = draws[0].baseline
    if best is None:
        lines = ["None is chosen: a class has a single label, or file, which cross-validation cannot hold out."]
        # The largest of many test accuracies is too high. Where even that is none above pixels, nothing is.
        largest = max((row.accuracy for row in rows if row.name != baseline), default=0.0)
        pixels = next((row.accuracy for row in rows if row.name == baseline), None)
        if pixels is not None and largest - pixels < LEAST_GAIN:
            lines.append(verdict(largest, {"plain pixels": pixels}, num_images))
        return lines
    procedure = "cross-validation" if best.probe is not None else "holding out images in turn"
    lines = [f"Chosen by {procedure} on the training images alone: {best.name}."]
    kind = "attentive" if best.name.endswith("attentive") else "linear"
    classifier = f"{kind} probe" if best.probe is not None else "k-NN"
    others, comparisons = compared_with(best.name, draws), []
    for name, (_, gain) in others.items():
        points = f"{100 * abs(gain.mean):.1f}" + ("" if gain.error is None else f" ± {100 * gain.error:.1f}")
        is_equal = gain.mean == 0 and not gain.error
        place = "as good as" if is_equal else f"{points} points {'above' if gain.mean > 0 else 'below'}"
        comparisons.append(f"{place} {name}")
    if comparisons:
        lines.append(f"By {classifier} it is {', and '.join(comparisons)}.")
        lines.append(verdict(best.accuracy, {name: accuracy for name, (accuracy, _) in others.items()}, num_images))
    return lines


def compared_with(best: str, draws: Sequence[FeatureScores]) -> dict[str, tuple[float, Estimate]]:
    """The mean accuracy of what a feature is compared with, and the feature's gain over it, draw by draw."""
    found: dict[str, list[float]] = {}
    for scores in draws:
        if scores.baseline is not None:
            pixels = f"plain pixels ({scores.baseline.partition(', ')[2]})"
            found.setdefault(pixels, []).append(scores.row(scores.baseline).accuracy)
        if scores.untrained is not None:
            found.setdefault("the same encoder untrained", []).append(scores.untrained.accuracy)
    ours = [scores.row(best).accuracy for scores in draws]
    return {
        name: (float(np.mean(each)), estimate([own - other for own, other in zip(ours, each, strict=True)]))
        for name, each in found.items()
    }
