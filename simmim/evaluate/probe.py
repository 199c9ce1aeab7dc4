"""The linear probe: logistic regression on frozen features, its penalty chosen by cross-validation.

Shape letters: N images, T of them to train on, D values of a feature vector. Labels are class indices from 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simmim.evaluate.validation import check_same_dim, size_of_smallest_class, validate_labeled_vectors

# Inverse strengths of the L2 penalty on standardized features. The default is for where cross-validation is not possible: at
# 1, 2 and 5 labels per class of real digits it was the best or within a point of the best, for three features.
STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))
DEFAULT_STRENGTH = 0.1
MAX_FOLDS, MAX_ITERATIONS = 5, 1000


class CrossValidated(NamedTuple):
    """Mean and standard deviation over the folds of the accuracy, in [0, 1], with one inverse strength of the penalty."""

    c: float
    mean: float
    std: float


@dataclass(frozen=True)
class ProbeResult:
    """The result of a linear classifier on frozen features.

    Attributes:
        accuracy: on the test vectors, in [0, 1].
        c: inverse strength of the L2 penalty, scikit-learn's C.
        predictions: (N,) int64, the class of each test vector.
        cross_validation: on the training vectors, for each of `STRENGTHS`; empty where it was not possible.
        folds: number of folds of the cross-validation; 0 where it was not possible.
        converged: whether the final fit converged within `MAX_ITERATIONS`.
    """

    accuracy: float
    c: float
    predictions: np.ndarray
    cross_validation: tuple[CrossValidated, ...]
    folds: int
    converged: bool

    @property
    def cross_validated(self) -> float | None:
        """Cross-validated accuracy of the chosen strength; None where it was not possible."""
        return max((row.mean for row in self.cross_validation), default=None)


def linear_probe(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    seed: int = 0,
    files: np.ndarray | None = None,
) -> ProbeResult:
    """Logistic regression on standardized features, its penalty chosen by cross-validation on `train` alone.

    Folds are stratified. There are as many as the smallest class has labels, or files, at most 5. In each fold, features are
    standardized by the vectors that are fitted. Of strengths with equal accuracy the strongest penalty wins. Where a class
    has a single label, or file, no fold can be held out and C is `DEFAULT_STRENGTH`. Everything is computed in float64,
    which takes 8 · T · D bytes and some copies: suitable for T up to some ten thousand.

    Args:
        train, test: (T, D) and (N, D).
        train_labels, test_labels: (T,) and (N,) class indices; a test label without training vectors counts as wrong.
        seed: of the division into folds.
        files: (T,), the file that each training image is a page of, whose pages are held out together: they resemble one
            another. None where each is a file of its own.

    Raises:
        ValueError: for vectors that are no finite matrix, of different D, or that do not match their labels; fewer than
            two classes; scikit-learn not installed.
    """
    return fit_and_test(train, train_labels, test, test_labels, seed, files, logistic_fits, STRENGTHS, np.float64)


Fits = Callable[[np.ndarray, np.ndarray, Sequence[float]], Iterator[tuple[Callable[[np.ndarray], np.ndarray], bool]]]


def fit_and_test(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    seed: int,
    files: np.ndarray | None,
    fits: Fits,
    strengths: Sequence[float],
    dtype: type,
) -> ProbeResult:
    """A classifier of the strength that cross-validation on `train` chooses, as `linear_probe` describes.

    Args:
        fits: from vectors, labels and strengths in ascending order to classifiers, as `logistic_fits`.
        dtype: of the vectors that it takes.

    Raises:
        ValueError: as `linear_probe`.
    """
    check_scikit_learn()
    train, train_labels = validate_labeled_vectors(train, train_labels, "train", dtype)
    test, test_labels = validate_labeled_vectors(test, test_labels, "test", dtype)
    check_same_dim(train, test)
    if (train_labels == train_labels[0]).all():
        raise ValueError(f"all train labels are {train_labels[0]}: give vectors of at least two classes")
    folds = min(MAX_FOLDS, size_of_smallest_class(train_labels, files))
    folds = folds if folds > 1 else 0
    c = DEFAULT_STRENGTH
    table: tuple[CrossValidated, ...] = ()
    if folds:
        accuracies = []
        for fitted, held_out in divide(train_labels, folds, seed, files):
            found = fits(train[fitted], train_labels[fitted], strengths)
            accuracies.append([np.mean(predict(train[held_out]) == train_labels[held_out]) for predict, _ in found])
        means, stds = np.mean(accuracies, axis=0), np.std(accuracies, axis=0)
        table = tuple(CrossValidated(*map(float, row)) for row in zip(strengths, means, stds))
        c = max(table, key=lambda row: row.mean).c  # the first of equals
    ((predict, converged),) = fits(train, train_labels, (c,))
    predictions = predict(test)
    return ProbeResult(float(np.mean(predictions == test_labels)), c, predictions, table, folds, converged)


def divide(
    labels: np.ndarray, folds: int, seed: int, files: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit and rows to hold out, of each of the folds: of each class as many labels in each, or files.

    Args:
        labels: (T,) class indices.
        files: (T,) numbers, as of `linear_probe`.
    """
    from sklearn.model_selection import StratifiedKFold

    kind = StratifiedKFold(folds, shuffle=True, random_state=seed)
    if files is None:
        yield from kind.split(labels, labels)
        return
    (classes, _), file_of = np.unique(np.stack([labels, files]), axis=1, return_inverse=True)
    for _, held_out in kind.split(classes, classes):
        is_held_out = np.isin(file_of.reshape(-1), held_out)
        yield np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def check_scikit_learn() -> None:
    """Check that scikit-learn is installed, before minutes are spent on computing features.

    Raises:
        ValueError: when it is not, naming the extra.
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
    """Fit one inverse strength after another.

    Where there are fewer vectors than values, the vectors are rotated to as many coordinates as there are vectors. That
    changes neither penalty nor logits, for the weights of the optimum lie in the span of the vectors, and fits are faster.

    All fits share one model, and each starts from the solution before it. So a classifier must be used before the next fit.

    Args:
        strengths: in ascending order.

    Yields:
        A function from vectors to classes, and whether the fit converged.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    scaled = scaler.transform(vectors)
    axes: np.ndarray | None = None  # (D, T), orthonormal, whose span holds the scaled vectors
    if scaled.shape[0] < scaled.shape[1]:
        axes, triangle = np.linalg.qr(scaled.T)
        scaled = triangle.T
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)

    def predict(others: np.ndarray) -> np.ndarray:
        """Classes by the current fit."""
        scaled = scaler.transform(others)
        return model.predict(scaled if axes is None else scaled @ axes)

    for c in strengths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.set_params(C=c).fit(scaled, labels)
        yield predict, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
