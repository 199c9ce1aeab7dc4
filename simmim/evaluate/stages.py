"""Every feature's worth by k-NN and linear probe, and which of them to take.

Shape letters: N images, T of them to train on, D values of a vector. Labels are class indices from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simmim.evaluate.neighbors import knn, knn_held_out
from simmim.evaluate.probe import linear_probe


class StageScore(NamedTuple):
    """One feature's worth; accuracies in [0, 1].

    Attributes:
        name: of the feature.
        dim: D.
        knn: accuracy on the test vectors.
        probe: of the linear probe on the test vectors; None where there is k-NN alone.
        c: the probe's; None as that.
        cross_validated: the probe's accuracy on the training vectors, held out in folds, or else that of k-NN, each held
            out in turn; None with a single label in a class.
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
        """On the test vectors, by the method that `cross_validated` is of."""
        return self.knn if self.probe is None else self.probe


@dataclass(frozen=True)
class StageScores:
    """Every feature's worth with one draw of labels.

    Attributes:
        rows: in the features' order.
        winner: the one of the highest cross-validated accuracy, of equals the shortest; None with a single label in a
            class, where nothing but the test labels could choose.
        baseline: name of the row that is there to compare with and cannot win.
    """

    rows: tuple[StageScore, ...]
    winner: StageScore | None
    baseline: str | None = None

    def row(self, name: str) -> StageScore:
        """The row of one feature."""
        return next(row for row in self.rows if row.name == name)


Vectors = Mapping[str, np.ndarray]
Labels = Sequence[int] | np.ndarray


def probe_stages(
    train: Vectors,
    train_labels: Labels,
    test: Vectors,
    test_labels: Labels,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    progress: Callable[[StageScore], object] | None = None,
    baseline: str | None = None,
) -> StageScores:
    """k-NN and linear probe over several features, and which of them to take.

    The winner is chosen by cross-validation on the training vectors and never by test accuracy: the best of many test
    accuracies is too high by what luck adds to it, so only the winner's own may be reported as what to expect.

    Args:
        train, test: by name (T, D) and (N, D), as `Embeddings.vectors` of `all_features`.
        k, temperature: as of `knn_predict`.
        seed: of the folds, which are the same for every feature.
        progress: called with each row when it is there.
        baseline: name of vectors to compare with, which cannot win.

    Raises:
        ValueError: when the two hold different features, and as `knn` and `linear_probe`.
    """

    def score(name: str) -> StageScore:
        """The row of one feature."""
        accuracy = knn(train[name], train_labels, test[name], test_labels, k, temperature)
        probe = linear_probe(train[name], train_labels, test[name], test_labels, seed)
        held, dim = probe.cross_validated, train[name].shape[1]
        return StageScore(name, dim, accuracy, probe.accuracy, probe.c, held, probe.converged)

    return scored(train, test, score, progress, baseline)


def knn_stages(
    train: Vectors,
    train_labels: Labels,
    test: Vectors,
    test_labels: Labels,
    k: int = 20,
    temperature: float = 0.07,
    progress: Callable[[StageScore], object] | None = None,
    baseline: str | None = None,
    device: str = "cpu",
) -> StageScores:
    """As `probe_stages` by k-NN alone, which needs no scikit-learn: the winner is the feature whose training vectors get one
    another right."""

    def score(name: str) -> StageScore:
        """The row of one feature."""
        accuracy = knn(train[name], train_labels, test[name], test_labels, k, temperature, device=device)
        held = knn_held_out(train[name], train_labels, k, temperature, device)
        return StageScore(name, train[name].shape[1], accuracy, None, None, held, True)

    return scored(train, test, score, progress, baseline)


def scored(
    train: Vectors,
    test: Vectors,
    score: Callable[[str], StageScore],
    progress: Callable[[StageScore], object] | None,
    baseline: str | None,
) -> StageScores:
    """A row for each feature, by `score` of its name, and the winner.

    Raises:
        ValueError: when the two hold different features.
    """
    if set(train) != set(test) or not train:
        differing = ", ".join(sorted(set(train) ^ set(test))) or "none given"
        raise ValueError(f"train and test features differ ({differing}): give the same, at least one")
    rows = []
    for name in train:
        rows.append(score(name))
        if progress:
            progress(rows[-1])
    return StageScores(tuple(rows), winner(rows, baseline), baseline)


def winner(rows: Sequence[StageScore], baseline: str | None) -> StageScore | None:
    """The row of the highest cross-validated accuracy, of equals the shortest; None where there is none."""
    held = [row for row in rows if row.cross_validated is not None and row.name != baseline]
    return max(held, key=lambda row: (row.cross_validated, -row.dim), default=None)


# --- Over several draws of labels --------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over draws and its standard error; that is None for a single draw."""

    mean: float
    error: float | None

    def percent(self) -> str:
        """As "83.1 ± 0.4"."""
        return f"{100 * self.mean:.1f}" + ("" if self.error is None else f" ± {100 * self.error:.1f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of a figure that each draw gave once."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), error)


def mean_rows(draws: Sequence[StageScores]) -> list[StageScore]:
    """Of each feature the means over the draws; of C the geometric mean."""
    rows = []
    for name in [row.name for row in draws[0].rows]:
        of = [scores.row(name) for scores in draws]
        knn_accuracy, probe, c, held = (
            None if any(row[field] is None for row in of) else [row[field] for row in of] for field in (2, 3, 4, 5)
        )
        rows.append(
            StageScore(
                name,
                of[0].dim,
                float(np.mean(knn_accuracy)),
                None if probe is None else float(np.mean(probe)),
                None if c is None else float(np.exp(np.mean(np.log(c)))),
                None if held is None else float(np.mean(held)),
                all(row.converged for row in of),
            )
        )
    return rows


def stages_table(*draws: StageScores) -> str:
    """As Markdown, accuracies in percent, of several draws with standard errors; the winner in bold, below how it was chosen
    and, where there is a baseline, how it compares."""
    baseline = draws[0].baseline
    rows = mean_rows(draws) if len(draws) > 1 else list(draws[0].rows)
    best = winner(rows, baseline) if len(draws) > 1 else draws[0].winner
    probed = rows[0].probe is not None
    heads = ["k-NN", "linear probe", "C", "cross-validated"] if probed else ["k-NN", "held out"]
    lines = [f"| {' | '.join(['feature', 'values', *heads])} |", "| :--- | ---: |" + " ---: |" * len(heads)]

    def figure(row: StageScore, field: str) -> str:
        """One field over all draws."""
        values = [getattr(scores.row(row.name), field) for scores in draws]
        return "–" if None in values else estimate(values).percent()

    for row in rows:
        name = f"**{row.name}**" if best is not None and row.name == best.name else row.name
        cells = [figure(row, "knn")]
        if probed:
            mark = "" if row.converged else " (not converged)"
            cells += [figure(row, "probe") + mark, f"{row.c:.3g}" if len(draws) > 1 else f"{row.c:g}"]
        lines.append(f"| {' | '.join([name, str(row.dim), *cells, figure(row, 'cross_validated')])} |")
    return "\n".join([*lines, "", *verdict(best, baseline, draws)])


def verdict(best: StageScore | None, baseline: str | None, draws: Sequence[StageScores]) -> list[str]:
    """Sentences: what was chosen and how, and whether it beats the baseline."""
    if best is None:
        return ["None is chosen: a class has a single label, which cross-validation cannot hold out."]
    way = "cross-validation" if best.probe is not None else "holding out each in turn"
    lines = [f"Chosen by {way} on the training images alone: {best.name}."]
    if baseline is not None:
        gains = estimate([scores.row(best.name).accuracy - scores.row(baseline).accuracy for scores in draws])
        by = "linear probe" if best.probe is not None else "k-NN"
        points = f"{100 * abs(gains.mean):.1f}" + ("" if gains.error is None else f" ± {100 * gains.error:.1f}")
        more = "above" if gains.mean > 0 else "below"
        lines.append(f"By {by} it is {points} points {more} plain pixels ({baseline.partition(', ')[2]}).")
    return lines
