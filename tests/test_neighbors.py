"""k-NN compared with scikit-learn's, on vectors of real digits."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from simmim.evaluate import held_out_knn_accuracy, knn_accuracy, knn_predict, neighbors


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (100, 0.01), (1000, 0.07)])
def test_same_predictions_as_scikit_learn(digit_vectors, k, temperature):
    _, train, train_labels, test, test_labels, _ = digit_vectors
    for name in ("stage 0, 2x2", "final"):
        reference = KNeighborsClassifier(
            min(k, len(train_labels)),
            metric="cosine",
            algorithm="brute",
            weights=lambda distances: np.exp((1 - distances) / temperature),
        ).fit(train[name].astype(np.float64), train_labels)
        expected = reference.predict(test[name].astype(np.float64))
        found = knn_predict(train[name], train_labels, test[name], k, temperature)
        assert found.dtype == np.int64 and np.array_equal(found, expected)
        accuracy = knn_accuracy(train[name], train_labels, test[name], test_labels, k, temperature)
        assert accuracy == np.mean(expected == test_labels)


@pytest.mark.parametrize("test_rows, train_rows", [(7, 13), (1, 1000), (64, 3), (1000, 1)])
def test_blocks_of_similarities(digit_vectors, monkeypatch, test_rows, train_rows):
    """Results do not depend on the number of similarities in memory. The votes are counted in float64; k exceeds a block."""
    monkeypatch.setattr(neighbors, "TEST_ROWS", test_rows)
    monkeypatch.setattr(neighbors, "TRAIN_ROWS", train_rows)
    _, train, train_labels, test, _, _ = digit_vectors
    for k, temperature in ((1, 0.07), (20, 0.07)):
        votes = np.zeros((len(test["stage 1"]), 10))
        for row, vector in enumerate(test["stage 1"].astype(np.float64)):
            others = train["stage 1"].astype(np.float64)
            similarity = others @ vector / np.linalg.norm(others, axis=1) / np.linalg.norm(vector)
            for neighbor in np.argsort(-similarity)[:k]:
                votes[row, train_labels[neighbor]] += np.exp(similarity[neighbor] / temperature)
        found = knn_predict(train["stage 1"], train_labels, test["stage 1"], k, temperature)
        assert np.array_equal(found, votes.argmax(axis=1))


def test_knn_by_hand():
    """Angles of 0, 40, 50 and 180 degrees from the query, of classes 3, 1, 1, 0. The lengths differ and do not count."""
    angles, lengths = np.radians([0, 40, 50, 180]), np.array([0.1, 5, 1, 9])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]
    labels, query = [3, 1, 1, 0], np.array([[2.0, 0.0]])
    assert knn_predict(train, labels, query, k=1) == 3
    # cos: 1, 0.766, 0.643. At 0.07 e^-3.34 + e^-5.1 = 0.04 are less than 1; at 1 0.79 + 0.70 are more.
    assert knn_predict(train, labels, query, k=3, temperature=0.07) == 3
    assert knn_predict(train, labels, query, k=3, temperature=1.0) == 1
    assert knn_predict(train, labels, query, k=2, temperature=1.0) == 3
    assert knn_predict(train, labels, query, k=50, temperature=1e-5) == 3, "exp(100,000) would overflow"
    assert knn_predict(train, labels, np.zeros((1, 2)), k=50) == 1, "similarity 0 to all, so votes are equal"
    queries = np.repeat(query, 4, axis=0)
    assert knn_accuracy(train, labels, queries, [3, 3, 7, 0], k=1) == 0.5, "class 7 is not among the training labels"


def test_wrong_input():
    vectors, labels = np.eye(4), [0, 1, 0, 1]
    holed = vectors.copy()
    holed[2, 1] = np.nan
    for change, message in (
        ({"k": 0}, "k is 0: give 1 or more"),
        ({"temperature": 0}, "temperature is 0: give a positive"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"train": vectors[0]}, r"train vectors have shape \(4,\): give \(images, values\)"),
        ({"test": vectors[:0], "test_labels": []}, r"test vectors have shape \(0, 4\)"),
        ({"test": vectors[:, :3]}, "train vectors have 4 values, test vectors 3"),
        ({"train": holed}, "train vector 2 is not finite"),
        ({"train_labels": labels[:3]}, r"train labels have shape \(3,\): give one for each of 4"),
        ({"test_labels": [[0, 1, 0, 1]]}, r"test labels have shape \(1, 4\)"),
        ({"train_labels": ["a", "b", "a", "b"]}, "train labels are of type <U1: give class indices"),
        ({"train_labels": [0.0, 1.0, 0.0, 1.0]}, "train labels are of type float64"),
        ({"train_labels": [0, -1, 0, 1]}, "a train label is -1: give class indices from 0"),
        ({"num_classes": 1}, "a train label is 1: with 1 classes, give 0 to 0"),
    ):
        arguments = {
            "train": vectors,
            "train_labels": labels,
            "test": vectors,
            "test_labels": labels,
            "num_classes": 2,
            **change,
        }
        with pytest.raises(ValueError, match=message):
            knn_accuracy(**arguments)


@pytest.mark.parametrize("k, test_rows", [(1, 1024), (5, 7), (300, 50)])
def test_held_out_neighbors(digit_vectors, monkeypatch, k, test_rows):
    """Each vector without itself, compared with one search per vector; also with more duplicates than neighbors."""
    monkeypatch.setattr(neighbors, "TEST_ROWS", test_rows)
    vectors, classes = digit_vectors.train["stage 1, 2x2"], digit_vectors.train_labels
    repeated = np.arange(0, 240, 10).repeat(10)
    for sample, labels in ((vectors, classes), (vectors[repeated], classes[repeated])):
        correct = 0
        for row in range(len(sample)):
            others = np.arange(len(sample)) != row
            correct += knn_accuracy(sample[others], labels[others], sample[row : row + 1], labels[row : row + 1], k)
        assert held_out_knn_accuracy(sample, labels, k) == pytest.approx(correct / len(sample), abs=1e-9)
    assert held_out_knn_accuracy(vectors[:3], [0, 1, 0]) is None, "a class with a single label"
    with pytest.raises(ValueError, match="k is 0"):
        held_out_knn_accuracy(vectors, classes, 0)


def test_some_of_many_vectors_are_held_out(digit_vectors, monkeypatch):
    """As many as the limit, none twice, each with all others as neighbors, and the same ones every time."""
    vectors, labels = digit_vectors.train["stage 1, 2x2"], digit_vectors.train_labels
    asked = []

    def search(queries, *arguments):
        asked.extend(np.flatnonzero((vectors == query).all(axis=1)).item() for query in queries)
        return nearest_vectors(queries, *arguments)

    nearest_vectors = neighbors.nearest_vectors
    monkeypatch.setattr(neighbors, "nearest_vectors", search)
    monkeypatch.setattr(neighbors, "TEST_ROWS", 7)
    monkeypatch.setattr(neighbors, "HELD_OUT_VECTORS", 50)
    accuracy = held_out_knn_accuracy(vectors, labels, 5)
    assert held_out_knn_accuracy(vectors, labels, 5) == accuracy and asked[:50] == asked[50:]
    rows = asked[:50]
    assert len(set(rows)) == 50 and len(set(labels[rows])) > 5
    monkeypatch.undo()
    expected = []
    for row in rows:
        others = np.arange(len(vectors)) != row
        expected.append(knn_accuracy(vectors[others], labels[others], vectors[row : row + 1], labels[row : row + 1], 5))
    assert accuracy == pytest.approx(np.mean(expected), abs=1e-9)


def test_pages_of_its_own_file_are_no_neighbors(digit_vectors):
    """Each vector without all of its file, compared with one search per vector; pages that are equal tell nothing."""
    chosen = np.arange(0, 240, 4)
    vectors, labels = digit_vectors.train["stage 1, 2x2"][chosen].repeat(3, 0), digit_vectors.train_labels[chosen].repeat(3)
    files, correct = np.arange(60).repeat(3), 0
    for row in range(180):
        others = files != files[row]
        correct += knn_accuracy(vectors[others], labels[others], vectors[row : row + 1], labels[row : row + 1], 4)
    assert held_out_knn_accuracy(vectors, labels, 4, files=files) == pytest.approx(correct / 180, abs=1e-9)
    assert held_out_knn_accuracy(vectors, labels, 4) > correct / 180 + 0.1, "by copies of itself"
    assert held_out_knn_accuracy(vectors, labels, 4, files=np.arange(180)) == held_out_knn_accuracy(vectors, labels, 4)
    assert held_out_knn_accuracy(vectors[:9], [0, 0, 0, 1, 1, 1, 1, 1, 1], 4, files=files[:9]) is None, "a class of one file"
