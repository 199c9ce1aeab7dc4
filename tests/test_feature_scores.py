"""Scores of every feature, and the choice of the best: by training vectors alone."""

import math

import numpy as np
import pytest

from simmim.evaluate import FeatureScore, FeatureScores, Split, knn_accuracy, linear_probe, score_features, scores_table


def test_scores_of_real_digits(digit_vectors):
    _, train, train_labels, test, test_labels = digit_vectors
    reported = []
    scores = score_features(digit_vectors._replace(seed=1), k=5, progress=reported.append)
    assert [row.name for row in scores.rows] == list(train) and reported == list(scores.rows)
    for row in scores.rows:
        probe = linear_probe(train[row.name], train_labels, test[row.name], test_labels, seed=1)
        assert row == (
            row.name,
            train[row.name].shape[1],
            knn_accuracy(train[row.name], train_labels, test[row.name], test_labels, k=5),
            probe.accuracy,
            probe.c,
            probe.cross_validated,
            probe.converged,
        )
        assert row.probe > 0.4 and row.knn > 0.3
    assert scores.best.cross_validated == max(row.cross_validated for row in scores.rows)


def test_the_best_feature_is_not_chosen_by_test_accuracy():
    """`leaked` separates the test images, not the training images. Of equal features the one with fewer values wins."""
    generator, labels = np.random.default_rng(0), np.arange(60) % 3
    separated = np.eye(3)[labels]
    train = {
        "leaked": generator.normal(size=(60, 3)),
        "long": np.hstack([separated, np.zeros((60, 2))]),
        "short": separated,
    }
    test = {"leaked": train["leaked"], "long": generator.normal(size=(60, 5)), "short": generator.normal(size=(60, 3))}
    leaked = linear_probe(train["leaked"], labels, test["leaked"], labels)
    test_labels = leaked.predictions
    scores = score_features(Split(0, train, labels, test, test_labels))
    assert scores.rows[0].probe == 1.0 and scores.rows[0].cross_validated < 0.6
    assert scores.rows[1].cross_validated == scores.rows[2].cross_validated == 1.0
    assert scores.best == scores.rows[2] and scores.best.name == "short" and scores.best.probe < 0.6


def test_no_feature_is_chosen_with_a_single_label_per_class(digit_vectors):
    _, train, train_labels, test, test_labels = digit_vectors
    chosen = [int(np.flatnonzero(train_labels == label)[0]) for label in range(10)]
    few = {name: vectors[chosen] for name, vectors in train.items()}
    scores = score_features(Split(0, few, train_labels[chosen], test, test_labels))
    assert scores.best is None and all(row.cross_validated is None for row in scores.rows)
    last = "None is chosen: a class has a single label, which cross-validation cannot hold out."
    assert scores_table(scores).splitlines()[-2:] == ["", last]


def test_features_that_differ():
    vectors = np.eye(3)
    for train, test, named in (({"a": vectors}, {"b": vectors}, "a, b"), ({}, {}, "none given"), ({}, {"c": vectors}, "c")):
        with pytest.raises(ValueError, match=rf"train and test features differ \({named}\): give the same, at least one"):
            score_features(Split(0, train, [0, 1, 2], test, [0, 1, 2]))


def test_table_of_one_draw():
    rows = (
        FeatureScore("stage 0", 48, 0.5, 0.625, 0.001, 0.75, False),
        FeatureScore("stage 1, 2x2", 384, 1.0, 0.98765, 100.0, 0.87654, True),
        FeatureScore("final", 96, 0.1, 0.2, 0.1, None, True),
    )
    assert scores_table(FeatureScores(rows, rows[1])).splitlines() == [
        "| feature | values | k-NN | linear probe | C | cross-validated |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
        "| stage 0 | 48 | 50.0 | 62.5 (not converged) | 0.001 | 75.0 |",
        "| **stage 1, 2x2** | 384 | 100.0 | 98.8 | 100 | 87.7 |",
        "| final | 96 | 10.0 | 20.0 | 0.1 | – |",
        "",
        "Chosen by cross-validation on the training images alone: stage 1, 2x2.",
    ]


def test_table_of_several_draws():
    """Means and standard errors by hand. The best feature has the highest mean cross-validated accuracy over the draws, not
    in one draw or in test accuracy, and is never the baseline."""
    # k-NN, probe, C, cross-validated.
    figures = (
        {"a": (0.1, 0.3, 1.0, 0.8), "b": (0.2, 0.9, 1.0, 0.7), "pixels, 4×4": (1.0, 1.0, 1.0, 1.0)},
        {"a": (0.5, 0.6, 0.1, 0.7), "b": (0.3, 0.3, 0.1, 0.75), "pixels, 4×4": (1.0, 1.0, 1.0, 1.0)},
    )
    draws = [
        FeatureScores(tuple(FeatureScore(name, 4, *values, True) for name, values in each.items()), None, "pixels, 4×4")
        for each in figures
    ]
    lines = scores_table(*draws).splitlines()
    error = math.sqrt(((0.3 - 0.45) ** 2 + (0.6 - 0.45) ** 2) / 1 / 2)
    assert lines[2] == f"| **a** | 4 | 30.0 ± 20.0 | 45.0 ± {100 * error:.1f} | 0.316 | 75.0 ± 5.0 |"
    assert lines[3].startswith("| b | 4 | 25.0 ± 5.0 | 60.0 ± 30.0 |") and "72.5 ± 2.5" in lines[3]
    assert lines[-2:] == [
        "Chosen by cross-validation on the training images alone: a.",
        "By linear probe it is 55.0 ± 15.0 points below plain pixels (4×4).",
    ]
