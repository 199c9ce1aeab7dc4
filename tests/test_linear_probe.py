"""The linear probe compared with scikit-learn's grid search, on vectors of real digits."""

import sys
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from simmim.evaluate import DEFAULT_STRENGTH, STRENGTHS, linear_probe, probe


def grid_search(vectors, labels, folds, seed):
    """scikit-learn's grid search over the same strengths, with an independent fit for each."""
    return GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": STRENGTHS},
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    ).fit(vectors.astype(np.float64), labels)


@pytest.mark.parametrize("name, seed", [("stage 0", 0), ("final", 3)])
def test_same_choice_as_a_grid_search(digit_vectors, name, seed):
    """The same table, choice and predictions. Outliers in the features make a wrong standardization visible."""
    _, train, train_labels, test, test_labels, _ = digit_vectors
    vectors, others = np.copy(train[name]), test[name]
    vectors[np.arange(0, 240, 31), np.arange(8)] *= 100
    found = linear_probe(vectors, train_labels, others, test_labels, seed)
    reference = grid_search(vectors, train_labels, 5, seed)
    assert found.folds == 5 and [row.c for row in found.cross_validation] == list(STRENGTHS)
    means, stds = reference.cv_results_["mean_test_score"], reference.cv_results_["std_test_score"]
    # The probe starts each fit from the solution before it, so an image between two classes may be classified differently.
    two_images = 2 / 240 + 1e-9
    assert np.abs(means - [row.mean for row in found.cross_validation]).max() <= two_images
    assert np.abs(stds - [row.std for row in found.cross_validation]).max() <= 0.01
    assert found.cross_validated == max(row.mean for row in found.cross_validation)
    assert found.c == next(row.c for row in found.cross_validation if row.mean == found.cross_validated)
    assert means[STRENGTHS.index(found.c)] >= means.max() - two_images
    fit = make_pipeline(StandardScaler(), LogisticRegression(C=found.c, max_iter=1000))
    expected = fit.fit(vectors.astype(np.float64), train_labels).predict(others.astype(np.float64))
    assert np.array_equal(found.predictions, expected) and found.accuracy == np.mean(expected == test_labels)
    assert found.converged and found.accuracy > 0.5


def test_more_values_than_vectors_give_the_same_classifier():
    """The rotation into the span of the vectors leaves the optimum where it is."""
    generator = np.random.default_rng(0)
    labels = np.arange(30) % 3
    vectors = generator.normal(size=(30, 200)) + generator.normal(size=(3, 200))[labels] * np.logspace(-2, 0, 200)
    others = generator.normal(size=(400, 200))
    ((predict, converged),) = probe.logistic_fits(vectors, labels, (0.1,))
    direct = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, tol=1e-8)).fit(vectors, labels)
    assert converged and np.mean(predict(others) == direct.predict(others)) > 0.99
    assert len(np.unique(predict(others))) == 3


def test_scale_and_test_labels_do_not_matter(digit_vectors):
    _, train, train_labels, test, test_labels, _ = digit_vectors
    vectors, others = train["final"], test["final"]
    found = linear_probe(vectors, train_labels, others, test_labels)
    scale, offset = np.logspace(-3, 3, 32), np.linspace(-5, 5, 32)
    again = linear_probe(vectors * scale + offset, train_labels, others * scale + offset, test_labels[::-1])
    assert (again.c, again.cross_validation[:4]) == (found.c, found.cross_validation[:4])
    assert np.mean(again.predictions == found.predictions) > 0.98 and again.accuracy != found.accuracy


def test_as_many_folds_as_labels_of_the_smallest_class(digit_vectors):
    _, train, train_labels, test, test_labels, _ = digit_vectors
    for smallest, folds in ((1, 0), (2, 2), (4, 4), (5, 5), (9, 5)):
        chosen = np.concatenate(
            [np.flatnonzero(train_labels == label)[: smallest if label == 3 else 10] for label in range(10)]
        )
        found = linear_probe(train["stage 0"][chosen], train_labels[chosen], test["stage 0"], test_labels)
        assert found.folds == folds and len(found.cross_validation) == (len(STRENGTHS) if folds else 0)
        if not folds:
            assert found.c == DEFAULT_STRENGTH and found.cross_validated is None
            reference = make_pipeline(StandardScaler(), LogisticRegression(C=DEFAULT_STRENGTH))
            reference.fit(train["stage 0"][chosen].astype(np.float64), train_labels[chosen])
            assert np.array_equal(found.predictions, reference.predict(test["stage 0"].astype(np.float64)))


def test_some_of_the_classes(digit_vectors):
    """Two classes of ten keep their numbers. A test label that is not among the training labels counts as wrong."""
    _, train, train_labels, test, test_labels, _ = digit_vectors
    chosen = np.isin(train_labels, (4, 9))
    found = linear_probe(train["stage 0"][chosen], train_labels[chosen], test["stage 0"], test_labels)
    assert set(found.predictions) == {4, 9}
    assert found.accuracy == np.mean(found.predictions == test_labels) <= np.isin(test_labels, (4, 9)).mean()


def test_equal_strengths_give_the_strongest_penalty():
    """Two distant clusters are separated at any strength."""
    labels = np.arange(40) % 2
    vectors = np.random.default_rng(0).normal(size=(40, 3)) + 20 * labels[:, None]
    found = linear_probe(vectors, labels, vectors, labels)
    assert (
        {row.mean for row in found.cross_validation} == {1.0} and found.c == STRENGTHS[0] == 1e-4 and found.accuracy == 1.0
    )


def test_fits_that_do_not_converge(digit_vectors, monkeypatch):
    _, train, train_labels, test, test_labels, _ = digit_vectors
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not linear_probe(train["final"], train_labels, test["final"], test_labels).converged


def test_wrong_input(monkeypatch):
    vectors, labels = np.eye(4), [0, 1, 0, 1]
    for change, message in (
        ({"train_labels": [5] * 4}, "all train labels are 5: give vectors of at least two classes"),
        ({"test": vectors[:, :3]}, "train vectors have 4 values, test vectors 3"),
        ({"test": np.full_like(vectors, np.inf)}, "test vector 0 is not finite"),
        ({"test_labels": [0]}, r"test labels have shape \(1,\)"),
    ):
        arguments = {"train": vectors, "train_labels": labels, "test": vectors, "test_labels": labels, **change}
        with pytest.raises(ValueError, match=message):
            linear_probe(**arguments)
    for name in ("sklearn", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"needs scikit-learn.+: pip install 'simmim-toolkit\[probe\]'"):
        linear_probe(vectors, labels, vectors, labels)


def test_pages_of_a_file_are_held_out_together(digit_vectors):
    """Also of a file whose pages are of two classes; files of one page each are divided as labels are."""
    labels, files = np.repeat([0, 1], [12, 10]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7])
    parts = list(probe.divide(labels, 4, 0, files))
    assert len(parts) == 4 and sorted(np.concatenate([held_out for _, held_out in parts])) == list(range(22))
    for fitted, held_out in parts:
        for label in (0, 1):
            sides = [set(files[rows[labels[rows] == label]]) for rows in (fitted, held_out)]
            assert not sides[0] & sides[1] and len(sides[0]) >= 3 and len(sides[1]) >= 1
    for one, other in zip(probe.divide(labels, 5, 3, np.arange(22)), probe.divide(labels, 5, 3)):
        assert all(map(np.array_equal, one, other))
    _, train, train_labels, test, test_labels, _ = digit_vectors
    vectors = train["stage 0"].repeat(2, 0)
    arguments = (vectors, train_labels.repeat(2), test["stage 0"], test_labels)
    together = linear_probe(*arguments, files=np.arange(240).repeat(2))
    assert together.folds == 5 and together.cross_validated < linear_probe(*arguments).cross_validated - 0.05, "by copies"
    assert linear_probe(*arguments, files=np.where(train_labels.repeat(2) == 3, 0, np.arange(480))).folds == 0
