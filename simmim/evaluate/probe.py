"""The linear probe: logistic regression over frozen features, its penalty chosen by cross-validation.

Shape letters: N images, T of them to train on, D values of a vector. Labels are class indices from 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simmim.evaluate.validation import check_alike, checked

# Inverse strengths of the probe's L2 penalty on standardized features. Where no cross-validation is possible, one that was
# the best or within a point of it at 1, 2 and 5 labels a class of real digits, for three features.
STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))
DEFAULT_STRENGTH = 0.1
MAX_FOLDS, MAX_ITERATIONS = 5, 1000


class CrossValidated(NamedTuple):
    """Accuracy over the folds, in [0, 1], with one strength of the penalty."""

    c: float
    mean: float
    std: float


@dataclass(frozen=True)
class ProbeResult:
    """A linear classifier over frozen features.

    Attributes:
        accuracy: on the test vectors, in [0, 1].
        c: inverse strength of the L2 penalty, scikit-learn's C.
        predictions: (N,) int64, the test vectors' classes.
        cross_validation: on the training vectors, for each of `STRENGTHS`; empty where it was not possible.
        folds: of the cross-validation; 0 where it was not possible.
        converged: whether the final fit has, within `MAX_ITERATIONS`.
    """

    accuracy: float
    c: float
    predictions: np.ndarray
    cross_validation: tuple[CrossValidated, ...]
    folds: int
    converged: bool

    @property
    def cross_validated(self) -> float | None:
        """The chosen strength's accuracy on the training vectors, held out in turn; None where that was not possible."""
        return max((row.mean for row in self.cross_validation), default=None)


def linear_probe(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    seed: int = 0,
) -> ProbeResult:
    """Logistic regression over standardized features, its penalty chosen by cross-validation on `train` alone.

    Folds are stratified, as many as the smallest class has labels, at most 5; in each, features are standardized by what
    is fitted. Of strengths with equal accuracy the strongest penalty wins. With a single label in a class there is
    nothing to hold out: C is then `DEFAULT_STRENGTH`. Computed in float64, 8 · T · D bytes and some copies: for T up to
    some ten thousand.

    Args:
        train, test: (T, D) and (N, D).
        train_labels, test_labels: (T,) and (N,) class indices; test labels without training vectors count as missed.
        seed: of the division into folds.

    Raises:
        ValueError: for vectors that are no finite matrix, of different D, or that do not match their labels; fewer than
            two classes; scikit-learn not installed.
    """
    check_installed()
    from sklearn.model_selection import StratifiedKFold

    train, train_labels = checked(train, train_labels, "train", np.float64)
    test, test_labels = checked(test, test_labels, "test", np.float64)
    check_alike(train, test)
    found, counts = np.unique(train_labels, return_counts=True)
    if len(found) < 2:
        raise ValueError(f"all train labels are {found[0]}: give vectors of at least two classes")
    folds = min(MAX_FOLDS, int(counts.min()))
    folds = folds if folds > 1 else 0
    c, table = DEFAULT_STRENGTH, ()
    if folds:
        accuracies = []
        for fitted, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(train, train_labels):
            fits = logistic_fits(train[fitted], train_labels[fitted], STRENGTHS)
            accuracies.append([np.mean(predict(train[held_out]) == train_labels[held_out]) for predict, _ in fits])
        means, stds = np.mean(accuracies, axis=0), np.std(accuracies, axis=0)
        table = tuple(CrossValidated(*map(float, row)) for row in zip(STRENGTHS, means, stds))
        c = max(table, key=lambda row: row.mean).c  # of equals the first
    ((predict, converged),) = logistic_fits(train, train_labels, (c,))
    predictions = predict(test)
    return ProbeResult(float(np.mean(predictions == test_labels)), c, predictions, table, folds, converged)


def check_installed() -> None:
    """See that scikit-learn is there, before minutes are spent on features for it.

    Raises:
        ValueError: saying how to install it.
    """
    try:
        import sklearn.model_selection  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the linear probe needs scikit-learn, which is not installed: pip install 'simmim-toolkit[probe]'"
        ) from error


def logistic_fits(
    vectors: np.ndarray, labels: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[Callable[[np.ndarray], np.ndarray], bool]]:
    """For one C after another, ascending, how to classify vectors and whether the fit has converged. Use each before the
    next: they are one model, which starts from its last solution."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    scaled = scaler.transform(vectors)
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)

    def predict(others: np.ndarray) -> np.ndarray:
        """Classes by the model as it is fitted now."""
        return model.predict(scaler.transform(others))

    for c in strengths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.set_params(C=c).fit(scaled, labels)
        yield predict, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
