"""How features are read out: the attentive probe, scaled vectors, and the choice among them by the training labels alone."""

import numpy as np
import pytest
import torch
from random_encoders import GRAY, random_encoder, random_images
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from simmim.checkpoints.own_files import save_encoder
from simmim.cli import main
from simmim.evaluate import Comparison, Feature, Split, Tokens, attentive_probe, scaled_split, scaling_named, score_features
from simmim.evaluate.attentive import attentive_fits, first_queries, mean_token


def labeled_tokens(seed, images=120, tokens=6, channels=8, classes=3):
    """One token of each image, at a random place and among noise, tells the class. It is marked by its first value."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(images, tokens, channels)).astype(np.float32)
    labels = np.arange(images) % classes
    places = generator.integers(tokens, size=images)
    vectors[np.arange(images), places, 0] += 6.0
    vectors[np.arange(images), places, 1 + labels] += 4.0
    return vectors.reshape(images, -1), labels


def test_one_token_makes_it_logistic_regression():
    """A query has nothing to choose then. M equal copies of the token under one penalty are M times its strength. Classes of
    different sizes make the predictions depend on the penalty."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [220, 50, 30])
    train, test = (generator.normal(size=(300, 8)) + np.eye(8)[labels] for _ in range(2))
    train, test = train.astype(np.float32), test.astype(np.float32)
    ((predict, converged),) = attentive_fits(train, labels, (0.0025,), channels=8)
    scaler, agreement = StandardScaler().fit(train), []
    for strength in (0.005, 0.01, 0.02):
        expected = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(train), labels)
        agreement.append(np.mean(predict(test) == expected.predict(scaler.transform(test))))
    assert converged and agreement[1] > 0.995 > max(agreement[0], agreement[2]) + 0.01


def test_queries_differ_from_the_start():
    """The gradients of equal ones would be equal, too. They are the same in each fit."""
    queries = first_queries(8)
    assert len(queries.unique(dim=0)) == 4 and torch.equal(queries, first_queries(8))


def test_it_finds_the_token_that_the_mean_drowns():
    (train, labels), (test, test_labels) = labeled_tokens(0), labeled_tokens(1)
    found = attentive_probe(train, labels, test, test_labels, channels=8)
    names = {"mean": mean_token(train, 8)}, {"mean": mean_token(test, 8)}
    linear = score_features(Split(0, names[0], labels, names[1], test_labels)).rows[0]
    assert found.accuracy > 0.9 > linear.accuracy + 0.1 and found.folds == 5
    assert found.cross_validated == pytest.approx(found.accuracy, abs=0.1)
    both = Split(0, {**names[0], "tokens": train}, labels, {**names[1], "tokens": test}, test_labels)
    scores = score_features(both, attentive={"tokens": 8})
    assert scores.best.name == "tokens" and scores.best.probe == found.accuracy and scores.best.knn == linear.knn
    shuffled = test_labels[::-1]
    assert attentive_probe(train, labels, test, shuffled, channels=8).c == found.c, "the test labels choose nothing"


@torch.no_grad()
def test_tokens_are_those_of_the_map():
    """Of a map of more than eight tokens per side the means of blocks; token by token, channels last."""
    encoder, images = random_encoder(), random_images(2, 1, 64, 24)
    output = encoder(images, return_stages=True)
    tokens = Tokens((64, 24), 0)
    found = tokens.extract(images, output)
    assert found.shape == (2, tokens.dim(encoder.config)) == (2, 8 * 6 * 16)
    expected = output.stages[0].reshape(2, 16, 8, 2, 6).mean(dim=3).permute(0, 2, 3, 1).reshape(2, -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    last = Tokens((64, 24))
    assert last.extract(images, output).shape == (2, last.dim(encoder.config)) and last.name == "final, attentive"
    mean = torch.from_numpy(mean_token(found.numpy(), 16))
    torch.testing.assert_close(mean, Feature(0).extract(images, output), rtol=1e-4, atol=1e-5)


def test_scaling():
    """By hand in float64: unit variances; after whitening no correlations, and variances below one by the floor."""
    generator = np.random.default_rng(0)
    train = generator.normal(size=(400, 3)) @ np.array([[3.0, 1, 0], [0, 0.1, 0.1], [0, 0, 2]])
    train = np.hstack([train, np.full((400, 1), 7.0)]).astype(np.float32)  # a value that does not vary
    assert scaling_named("none", train)(train) is train
    standardized = scaling_named("standardized", train)(train)
    assert np.allclose(standardized[:, :3].std(axis=0), 1, atol=1e-5) and np.allclose(standardized[:, 3], 0)
    whitened = scaling_named("whitened", train)(train).astype(np.float64)
    variances = np.linalg.eigvalsh(np.corrcoef(train[:, :3].T.astype(np.float64)))
    covariance = whitened.T @ whitened / 400
    expected = np.sort(np.append(variances / (variances + 0.1), 0.0))
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    assert np.allclose(np.sort(np.diag(covariance)), expected, atol=1e-4)
    split = scaled_split(
        Split(0, {"a": train, "b": train}, [], {"a": train[:5], "b": train[:5]}, []), ("none", "whitened"), "b"
    )
    assert list(split.train) == list(split.test) == ["a", "a, whitened", "b"]
    assert np.allclose(split.test["a, whitened"], whitened[:5], atol=1e-5)


def test_scaling_brings_back_what_large_values_drown():
    generator, labels = np.random.default_rng(0), np.arange(90) % 3
    vectors = np.hstack([generator.normal(size=(90, 4)) * 100, np.eye(3)[labels] + generator.normal(size=(90, 3)) * 0.05])
    whole = Split(0, {"a": vectors[:60]}, labels[:60], {"a": vectors[60:]}, labels[60:])
    scores = score_features(scaled_split(whole, ("none", "standardized", "whitened")), "knn", k=5)
    assert scores.rows[0].knn < 0.5 and scores.best.name in ("a, standardized", "a, whitened") and scores.best.knn > 0.9


def test_the_commands(digits, tmp_path, capsys):
    folder = save_encoder(tmp_path / "encoder", random_encoder(), GRAY, {})
    words = ["--run", str(folder), "--data", str(digits.labeled), "--labels-per-class", "2", "--workers", "0"]
    assert main(["probe", *words, "--stage", "1", "--head", "auto"]) == 0
    table = capsys.readouterr().out
    for name in ("stage 1 |", "stage 1, 2x2", "stage 1, attentive", "pixels", "untrained: stage 1"):
        assert name in table.replace("**", ""), name
    assert main(["probe", *words, "--stage", "final", "--head", "attentive"]) == 0
    table = capsys.readouterr().out
    assert "By attentive probe it is" in table and "| k-NN | probe | C |" in table
    assert "final, attentive" in table and "2x2" not in table and "untrained: final, attentive" in table
    assert main(["knn", *words, "--scaling", "auto", "--stage", "0"]) == 0
    table = capsys.readouterr().out
    for name in ("stage 0, standardized", "stage 0, whitened", "stage 0, 2x2, whitened"):
        assert name in table, name
    assert "pixels, 32×32, " not in table


def test_wrong_input(digits, tmp_path, capsys):
    folder = save_encoder(tmp_path / "encoder", random_encoder(), GRAY, {})
    words = ["--run", str(folder), "--data", str(digits.labeled)]
    assert main(["probe", *words, "--head", "atentive"]) == 2
    assert "unknown head 'atentive'; did you mean 'attentive'" in capsys.readouterr().err
    assert main(["knn", *words, "--scaling", "white"]) == 2
    assert "unknown scaling 'white'" in capsys.readouterr().err
    assert main(["knn", *words, "--head", "auto"]) == 2
    with pytest.raises(ValueError, match="head is auto: k-NN fits nothing"):
        Comparison("x", "knn", head="auto")
