"""Scores of every feature, and the choice of the best: by training vectors alone."""

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from simmim.encoders.swinv2 import SwinV2Config
from simmim.evaluate import (
    FeatureScore,
    FeatureScores,
    Split,
    knn_accuracy,
    linear_probe,
    score_features,
    score_untrained,
    scores_table,
    untrained_encoder,
    verdict,
)
from simmim.pretrain import DataSettings, PretrainSettings, SimMIMSettings
from simmim.pretrain.model import build_method


def test_scores_of_real_digits(digit_vectors):
    _, train, train_labels, test, test_labels, _ = digit_vectors
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
    _, train, train_labels, test, test_labels, _ = digit_vectors
    chosen = [int(np.flatnonzero(train_labels == label)[0]) for label in range(10)]
    few = {name: vectors[chosen] for name, vectors in train.items()}
    scores = score_features(Split(0, few, train_labels[chosen], test, test_labels))
    assert scores.best is None and all(row.cross_validated is None for row in scores.rows)
    last = "None is chosen: a class has a single label, or file, which cross-validation cannot hold out."
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
    assert lines[-3:-1] == [
        "Chosen by cross-validation on the training images alone: a.",
        "By linear probe it is 55.0 ± 15.0 points below plain pixels (4×4).",
    ]
    assert lines[-1].startswith(
        "Pre-training has not helped yet: the features are not a point better than plain pixels (4×4)."
    )


def test_table_with_an_untrained_encoder():
    """Its row stands last, of whatever feature it chose in each draw. Gains are of the chosen feature, draw by draw."""
    draws = [
        FeatureScores(
            (FeatureScore("a", 4, 0.5, None, None, ours, True), FeatureScore("pixels, 4×4", 4, 0.3, None, None, 0.9, True)),
            None,
            "pixels, 4×4",
            FeatureScore(name, 4, untrained, None, None, 0.1, True),
        )
        for ours, name, untrained in ((0.6, "stage 0", 0.40), (0.7, "final", 0.44))
    ]
    lines = scores_table(*draws).splitlines()
    assert lines[4] == "| untrained: final or stage 0 | 4 | 42.0 ± 2.0 | – |"
    assert lines[-2:] == [
        "By k-NN it is 20.0 ± 0.0 points above plain pixels (4×4), and 8.0 ± 2.0 points above the same encoder untrained.",
        "Pre-training has helped: the features are better than plain pixels (4×4) and the same encoder untrained.",
    ]


def test_a_single_label_says_when_nothing_beats_pixels():
    """Nothing is chosen then; where the largest of all test accuracies is below pixels, no choice would be better."""
    rows = [FeatureScore(name, 4, knn, None, None, None, True) for name, knn in (("a", 0.31), ("b", 0.2), ("pixels", 0.3))]
    assert "has not helped yet" not in scores_table(FeatureScores(tuple(rows), None, "pixels"))
    rows[0] = rows[0]._replace(knn=0.309)
    assert "has not helped yet" in scores_table(FeatureScores(tuple(rows), None, "pixels"))


@pytest.mark.parametrize(
    "others, num_images, says",
    [
        ({"pixels": 0.48, "untrained": 0.3}, None, ["has helped: the features are better than pixels and untrained."]),
        ({"pixels": 0.495, "untrained": 0.3}, 20_000, ["not a point better than pixels. Try", "Beginning from weights"]),
        (
            {"pixels": 0.6, "untrained": 0.5},
            2640,
            ["better than pixels and untrained. Try", "2,640 images are few: beginning"],
        ),
    ],
)
def test_verdict(others, num_images, says):
    assert all(part in verdict(0.5, others, num_images) for part in says)


def test_a_verdict_where_nothing_could_be_better():
    """More epochs would not help where plain pixels make no mistake."""
    says = verdict(1.0, {"plain pixels": 1.0, "the same encoder untrained": 0.995}, 19)
    assert "accuracy is 99.5% already by plain pixels and the same encoder untrained. Compare on harder ones" in says
    assert "has not helped" not in says and "has not helped" in verdict(0.98, {"plain pixels": 0.98})
    assert "has not helped" in verdict(0.98, {"plain pixels": 1.0}), "worse is told by any images"
    assert "100.0% already by plain pixels." in verdict(1.0, {"plain pixels": 1.0, "untrained": 0.9})
    rows = [FeatureScore(name, 4, 1.0, None, None, 1.0, True) for name in ("a", "pixels")]
    draw = FeatureScores(tuple(rows), None, "pixels")
    assert "By k-NN it is as good as plain pixels" in scores_table(draw, draw)


def test_the_untrained_encoder_is_that_of_the_first_step():
    """A pre-training of the same seed begins with it; and drawing it leaves the generators as they are."""
    config = SwinV2Config(16, (1, 1), (1, 2), window_size=4, in_channels=1)
    pl.seed_everything(3, verbose=False)
    model = {"mask_unit": 8, "encoder": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}}
    data = DataSettings("x", channels=1)
    resolved = PretrainSettings(data=data, out="x", preset="nano", image_size=32, model=SimMIMSettings(**model))
    first = build_method(resolved).encoder
    state = torch.get_rng_state()
    untrained = untrained_encoder(config, 3)
    assert torch.equal(state, torch.get_rng_state()) and first.config.channels == untrained.config.channels
    weights, others = untrained.state_dict(), untrained_encoder(config, 4).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    assert not all(torch.equal(value, weights[name]) for name, value in others.items())


def test_the_untrained_encoder_chooses_by_training_vectors(digit_vectors):
    """As k-NN does for a trained one; logistic regression is fitted to that feature alone."""
    scores = score_features(digit_vectors, "knn", k=5)
    for method in ("knn", "probe"):
        untrained = score_untrained(digit_vectors, method, k=5)
        assert (untrained.name, untrained.knn) == (scores.best.name, scores.best.knn)
    _, train, train_labels, test, test_labels, _ = digit_vectors
    probe = linear_probe(train[untrained.name], train_labels, test[untrained.name], test_labels)
    assert untrained.accuracy == probe.accuracy
    chosen = [int(np.flatnonzero(train_labels == label)[0]) for label in range(10)]
    few = {name: vectors[chosen] for name, vectors in train.items()}
    assert score_untrained(Split(0, few, train_labels[chosen], test, test_labels), "knn") is None
