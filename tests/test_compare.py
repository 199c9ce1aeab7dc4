"""Every feature of an encoder on labeled images, over draws of labels: `simmim probe` and `simmim knn`, on real digits."""

import csv
import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing, save_encoder
from simmim.cli import main
from simmim.data import CenterView, open_images, open_labeled_source, open_picture, read_labeled_images
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.evaluate import (
    Comparison,
    EncoderPass,
    Pixels,
    StageScore,
    StageScores,
    all_features,
    chosen_features,
    compare,
    draw,
    embeddings,
    knn,
    knn_held_out,
    knn_stages,
    neighbors,
    pooled,
    probe_stages,
    stages_table,
    write_report,
)
from simmim.evaluate.labeled import Rows, subsample

HERE = EncoderPass(workers=0)
GRAY = Preprocessing((32, 32), (0.13,), (0.31,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = SwinV2(SwinV2Config(16, (1, 1), (2, 2), window_size=4, in_channels=1))
    return save_encoder(tmp_path_factory.mktemp("encoder"), encoder, GRAY, {"method": "SimMIM"})


@pytest.fixture(scope="module")
def saved(folder):
    return read_encoder(folder)


@pytest.fixture(scope="module")
def without_split(digits, tmp_path_factory):
    """Class folders alone: what is held out depends on the seed."""
    place = tmp_path_factory.mktemp("classes") / "all"
    shutil.copytree(digits.labeled / "train", place)
    return place


@pytest.fixture(scope="module")
def digit_vectors(saved, digits):
    found = read_labeled_images(digits.labeled, None, seed=0)
    part = embeddings(saved.encoder, GRAY, found.train, all_features(saved.encoder.config, (32, 32)), HERE)
    return part.vectors, np.asarray(found.train["label"])[part.rows]


def paths(data):
    return [row["image"]["path"] for row in data]


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False])
def test_a_draw_is_fine_tunings(digits, without_split, split):
    """The same images and labels, in the same order, for the same seed."""
    path = digits.labeled if split else without_split
    source = open_labeled_source(path)
    for count, seed in ((5, 0), (5, 1), (None, 3)):
        drawn, theirs = draw(source, count, seed), read_labeled_images(path, count, seed)
        tested = source.train if source.validation is None else source.validation
        for part, data, labeled in ((drawn.train, source.train, theirs.train), (drawn.test, tested, theirs.validation)):
            assert paths(data.select(part.rows)) == paths(labeled)
            assert part.labels.tolist() == labeled["label"][:]
    assert not np.array_equal(draw(source, 5, 0).train.rows, draw(source, 5, 1).train.rows)


@pytest.mark.parametrize("split", [True, False])
def test_each_image_is_encoded_once_and_only_if_drawn(saved, digits, without_split, split, monkeypatch):
    encode, seen = SwinV2.encode, []
    monkeypatch.setattr(SwinV2, "encode", lambda model, x, *how: seen.append(len(x)) or encode(model, x, *how))
    path = str(digits.labeled if split else without_split)
    compare(saved, Comparison(path, "knn", 3, seed=4, seeds=4), HERE, quiet=True)
    drawn = [read_labeled_images(path, 3, seed) for seed in range(4, 8)]
    union = {name for found in drawn for part in (found.train, found.validation) for name in paths(part)}
    assert sum(seen) == len(union) < 240 + 60


@pytest.mark.parametrize("method", ["probe", "knn"])
@pytest.mark.parametrize("split", [True, False])
def test_scores_are_those_of_each_draw_by_itself(saved, digits, without_split, split, method):
    """Found from the images again, one draw after the other."""
    path = str(digits.labeled if split else without_split)
    report = compare(saved, Comparison(path, method, 4, seed=1, seeds=2, k=7, stage="1"), HERE, quiet=True)
    pixels = Pixels((32, 32))
    features = (*chosen_features(saved.encoder.config, (32, 32), "1"), pixels)
    assert report.seeds == (1, 2)
    for seed, scores in zip(report.seeds, report.draws):
        found, parts = read_labeled_images(path, 4, seed), []
        for data in (found.train, found.validation):
            vectors = embeddings(saved.encoder, GRAY, data, features, HERE).vectors
            parts += [vectors, np.asarray(data["label"])]
        if method == "probe":
            expected = probe_stages(*parts, k=7, seed=seed, baseline=pixels.name)
        else:
            expected = knn_stages(*parts, k=7, baseline=pixels.name)
        assert [row.name for row in scores.rows] == ["stage 1", "stage 1, 2x2", "pixels, 32×32"]
        for row, other in zip(scores.rows, expected.rows):
            assert row.name == other.name and row.knn == pytest.approx(other.knn, abs=1.1 / 60)
            assert row.accuracy == pytest.approx(other.accuracy, abs=1.1 / 40)
        assert scores.baseline == "pixels, 32×32" and scores.winner.name.startswith("stage 1")
    assert report.counts == (40, 60 if split else 40)


def test_unreadable_images_are_left_out_with_their_labels(saved, digits, tmp_path):
    """As if they were not there; with the labels one place off, accuracy would fall."""
    shutil.copytree(digits.labeled, tmp_path / "labeled")
    sound = compare(saved, Comparison(str(tmp_path / "labeled"), "knn", k=1), HERE, quiet=True)
    broken = [next((tmp_path / "labeled" / part / label).iterdir()) for part in ("train", "test") for label in "04"]
    for path in broken:
        path.write_bytes(b"no image")
    report = compare(saved, Comparison(str(tmp_path / "labeled"), "knn", k=1), HERE, quiet=True)
    assert sorted(report.unreadable) == sorted(map(str, broken)) and report.counts == (238, 58)
    for path in broken:
        path.unlink()
    without = compare(saved, Comparison(str(tmp_path / "labeled"), "knn", k=1), HERE, quiet=True)
    assert report.draws == without.draws
    for row, before in zip(report.draws[0].rows, sound.draws[0].rows):
        assert abs(row.knn - before.knn) < 0.1


def test_nothing_readable_of_a_draw(saved, digits, tmp_path):
    shutil.copytree(digits.labeled, tmp_path / "labeled")
    source = open_labeled_source(tmp_path / "labeled")
    drawn = draw(source, 2, 0)
    pools = pooled(source, [drawn])
    (train, test) = (embeddings(saved.encoder, GRAY, part.data, how=HERE) for part in pools.parts)
    train = replace(train, rows=train.rows[:0], vectors={"final": train.vectors["final"][:0]})
    with pytest.raises(ValueError, match="none of the 20 training images of seed 0 can be read"):
        pools.split(drawn, [train, test])


def test_thinned_evenly():
    """Classes keep their shares, the first and the last stay, none comes twice."""
    part = Rows(np.arange(1000) * 3, np.repeat([0, 1, 2], [500, 400, 100]))
    kept = subsample(part, 50)
    assert np.bincount(kept.labels).tolist() == [25, 20, 5]
    assert kept.rows[0] == 0 and kept.rows[-1] == 2997 and len(np.unique(kept.rows)) == 50
    assert all(label == part.labels[row // 3] for row, label in zip(*kept))
    assert subsample(part, 1000) is part and subsample(part, None) is part


# --- features --------------------------------------------------------------------------------------------------------


def test_pixels(saved, digits):
    """By hand: the normalized image; of a larger one means of its squares."""
    source = open_images(digits.unlabeled).select(range(3))
    found = embeddings(saved.encoder, GRAY, source, (Pixels((32, 32)),), HERE).vectors["pixels, 32×32"]
    views = [CenterView((32, 32))(open_picture(row["image"], 1)).numpy() for row in source]
    expected = (np.stack(views).reshape(3, -1) / 255 - 0.13) / 0.31
    assert np.allclose(found, expected, atol=1e-5)
    images = torch.randn(2, 3, 128, 16)
    reduced = images.reshape(2, 3, 32, 4, 16).mean(dim=3).flatten(1)
    assert torch.allclose(Pixels((128, 16)).of(images, None), reduced, atol=1e-6)
    assert Pixels((128, 16)).name == "pixels, 32×16"
    assert Pixels((128, 16)).dim(SwinV2Config(16, (1,), (2,))) == 3 * 32 * 16


def test_chosen_features():
    config = SwinV2Config(16, (1, 1), (2, 2), window_size=4)
    names = [feature.name for feature in chosen_features(config, (32, 32), "final")]
    assert names == ["final", "final, 2x2"]
    assert [feature.name for feature in chosen_features(config, (32, 32), "0", "2x2")] == ["stage 0, 2x2"]
    assert chosen_features(config, (32, 32)) == all_features(config, (32, 32))
    with pytest.raises(ValueError, match="the map of stage '1' is a single token"):
        chosen_features(config, (8, 8), "1", "2x2")


@pytest.mark.parametrize("k, test_rows", [(1, 1024), (5, 7), (300, 50)])
def test_held_out_neighbors(digit_vectors, monkeypatch, k, test_rows):
    """Each without itself, by as many searches; also where vectors come more often than there are neighbors."""
    monkeypatch.setattr(neighbors, "TEST_ROWS", test_rows)
    vectors, classes = digit_vectors[0]["stage 1, 2x2"], digit_vectors[1]
    often = np.arange(0, 240, 10).repeat(10)
    for given, labels in ((vectors, classes), (vectors[often], classes[often])):
        right = 0
        for row in range(len(given)):
            others = np.arange(len(given)) != row
            right += knn(given[others], labels[others], given[row : row + 1], labels[row : row + 1], k)
        assert knn_held_out(given, labels, k) == pytest.approx(right / len(given), abs=1e-9)
    assert knn_held_out(vectors[:3], [0, 1, 0]) is None, "a class of one"
    with pytest.raises(ValueError, match="k is 0"):
        knn_held_out(vectors, classes, 0)


# --- tables and files ------------------------------------------------------------------------------------------------


def test_a_table_of_several_draws():
    """Means and standard errors by hand; the winner by the mean of what is cross-validated, not by a single draw's or by
    test accuracy, and never the baseline."""
    # k-NN, probe, C, cross-validated.
    figures = (
        {"a": (0.1, 0.3, 1.0, 0.8), "b": (0.2, 0.9, 1.0, 0.7), "pixels, 4×4": (1.0, 1.0, 1.0, 1.0)},
        {"a": (0.5, 0.6, 0.1, 0.7), "b": (0.3, 0.3, 0.1, 0.75), "pixels, 4×4": (1.0, 1.0, 1.0, 1.0)},
    )
    draws = [
        StageScores(tuple(StageScore(name, 4, *values, True) for name, values in each.items()), None, "pixels, 4×4")
        for each in figures
    ]
    lines = stages_table(*draws).splitlines()
    error = math.sqrt(((0.3 - 0.45) ** 2 + (0.6 - 0.45) ** 2) / 1 / 2)
    assert lines[2] == f"| **a** | 4 | 30.0 ± 20.0 | 45.0 ± {100 * error:.1f} | 0.316 | 75.0 ± 5.0 |"
    assert lines[3].startswith("| b | 4 | 25.0 ± 5.0 | 60.0 ± 30.0 |") and "72.5 ± 2.5" in lines[3]
    assert lines[-2:] == [
        "Chosen by cross-validation on the training images alone: a.",
        "By linear probe it is 55.0 ± 15.0 points below plain pixels (4×4).",
    ]


def test_files(saved, digits, tmp_path):
    report = compare(saved, Comparison(str(digits.labeled), "probe", 3, seeds=2, stage="0"), HERE, quiet=True)
    for name in ("r.json", "r.csv", "r.md"):
        assert write_report(report, tmp_path / "new" / name) == tmp_path / "new" / name
        with pytest.raises(ValueError, match=f"{name}' exists"):
            write_report(report, tmp_path / "new" / name)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.csv", "r.json", "r.md"]
    told = json.loads((tmp_path / "new" / "r.json").read_text())
    assert told["labels_per_class"] == 3 and told["classes"] == list("0123456789") and told["train_images"] == 30
    assert told["provenance"] == {"method": "SimMIM"} and told["unreadable"] == {}
    first = told["features"][0]
    each = [scores.rows[0].probe for scores in report.draws]
    assert first["feature"] == "stage 0" and first["probe"]["each"] == each
    assert first["probe"]["mean"] == pytest.approx(np.mean(each))
    assert first["probe"]["error"] == pytest.approx(abs(each[0] - each[1]) / 2)
    with (tmp_path / "new" / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["feature"]) for row in rows[:4]] == [
        ("0", "stage 0"),
        ("0", "stage 0, 2x2"),
        ("0", "pixels, 32×32"),
        ("1", "stage 0"),
    ]
    assert [float(row["probe"]) for row in rows if row["feature"] == "stage 0"] == each
    assert sum(int(row["chosen"]) for row in rows) == 2
    assert (tmp_path / "new" / "r.md").read_text() == report.table() + "\n"


def test_a_file_is_whole_or_absent(saved, digits, tmp_path, monkeypatch):
    report = compare(saved, Comparison(str(digits.labeled), "knn", 3, stage="0"), HERE, quiet=True)
    monkeypatch.setattr(json, "dumps", lambda *given, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(report, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


# --- the commands ----------------------------------------------------------------------------------------------------


def test_probe_and_knn(folder, digits, tmp_path, capsys, monkeypatch):
    """Table and verdict on stdout, bars and unreadable files on stderr; k-NN without scikit-learn."""
    shutil.copytree(digits.labeled, tmp_path / "labeled")
    torn = next((tmp_path / "labeled" / "train" / "3").iterdir())
    torn.write_bytes(b"")
    common = ["--run", str(folder), "--data", str(tmp_path / "labeled"), "--workers", "0"]
    few = ["--labels-per-class", "5", "--seeds", "2", "--stage", "1", "--out", str(tmp_path / "r.csv")]
    assert main(["probe", *common, *few]) == 0
    out, err = capsys.readouterr()
    assert "mean ± standard error over 2 draws" in out and "| pixels, 32×32 | 1024 |" in out and "Chosen by cross-val" in out
    assert f"results: {tmp_path / 'r.csv'}" in out and (tmp_path / "r.csv").is_file()
    assert "embedding" in err and "probe" in err
    for name in ("sklearn", "sklearn.model_selection", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["knn", *common]) == 0
    out, err = capsys.readouterr()
    assert "linear probe" not in out and "| feature | values | k-NN | held out |" in out
    assert f"not read: {torn}: empty file" in err and "1 images unreadable" in out
    monkeypatch.setattr(SwinV2, "encode", lambda *given: pytest.fail("nothing is encoded for what cannot be judged"))
    assert main(["probe", *common]) == 2
    assert "needs scikit-learn" in capsys.readouterr().err
