"""`simmim probe` and `simmim knn`: every feature of an encoder on labeled digits, over several draws of labels."""

import csv
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.cli import main
from simmim.data import EvaluationView, open_images, open_labeled_source, open_picture, read_labeled_images
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.evaluate import (
    Comparison,
    EncoderPass,
    Feature,
    LabeledRows,
    Pixels,
    Split,
    all_features,
    collect_embeddings,
    compare,
    draw_labels,
    embed_batches,
    pool_draws,
    score_features,
    select_features,
    subsample,
    write_report,
)

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
    """Class folders without a test part, so that the held-out images depend on the seed."""
    folder = tmp_path_factory.mktemp("classes") / "all"
    shutil.copytree(digits.labeled / "train", folder)
    return folder


def embeddings(encoder, source, features):
    return collect_embeddings(embed_batches(encoder, GRAY, source, features, HERE))


def paths(data):
    return [row["image"]["path"] for row in data]


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False])
def test_a_draw_is_that_of_fine_tuning(digits, without_split, split):
    """The same images and labels, in the same order, for the same seed."""
    path = digits.labeled if split else without_split
    source = open_labeled_source(path)
    for count, seed in ((5, 0), (5, 1), (None, 3)):
        draw, images = draw_labels(source, count, seed), read_labeled_images(path, count, seed)
        tested = source.train if source.validation is None else source.validation
        for part, data, labeled in ((draw.train, source.train, images.train), (draw.test, tested, images.validation)):
            assert paths(data.select(part.rows)) == paths(labeled)
            assert part.labels.tolist() == labeled["label"][:]
    assert not np.array_equal(draw_labels(source, 5, 0).train.rows, draw_labels(source, 5, 1).train.rows)


@pytest.mark.parametrize("split", [True, False])
def test_each_image_is_encoded_once_and_only_if_drawn(saved, digits, without_split, split):
    sizes = []
    hook = saved.encoder.register_forward_pre_hook(lambda encoder, arguments: sizes.append(len(arguments[0])))
    path = str(digits.labeled if split else without_split)
    compare(saved, Comparison(path, "knn", 3, seed=4, seeds=4), HERE, quiet=True)
    hook.remove()
    drawn = [read_labeled_images(path, 3, seed) for seed in range(4, 8)]
    union = {name for found in drawn for part in (found.train, found.validation) for name in paths(part)}
    assert sum(sizes) == len(union) < 240 + 60


@pytest.mark.parametrize("method", ["probe", "knn"])
@pytest.mark.parametrize("split", [True, False])
def test_scores_are_those_of_each_draw_by_itself(saved, digits, without_split, split, method):
    """Computed again from the images, one draw after the other."""
    path = str(digits.labeled if split else without_split)
    report = compare(saved, Comparison(path, method, 4, seed=1, seeds=2, k=7, stage="1"), HERE, quiet=True)
    pixels = Pixels((32, 32))
    features = (*select_features(saved.encoder.config, (32, 32), "1"), pixels)
    assert report.seeds == (1, 2)
    for seed, scores in zip(report.seeds, report.draws):
        found, parts = read_labeled_images(path, 4, seed), []
        for data in (found.train, found.validation):
            vectors = embeddings(saved.encoder, data, features).vectors
            parts += [vectors, np.asarray(data["label"])]
        expected = score_features(Split(seed, *parts), method, k=7, baseline=pixels.name)
        assert [row.name for row in scores.rows] == ["stage 1", "stage 1, 2x2", "pixels, 32×32"]
        for row, other in zip(scores.rows, expected.rows):
            assert row.name == other.name and row.knn == pytest.approx(other.knn, abs=1.1 / 60)
            assert row.accuracy == pytest.approx(other.accuracy, abs=1.1 / 40)
        assert scores.baseline == "pixels, 32×32" and scores.best.name.startswith("stage 1")
    assert report.counts == (40, 60 if split else 40)


def test_unreadable_images_are_left_out_with_their_labels(saved, digits, tmp_path):
    """Results are as without these files. With labels shifted by one image, accuracy would fall."""
    shutil.copytree(digits.labeled, tmp_path / "labeled")
    intact = compare(saved, Comparison(str(tmp_path / "labeled"), "knn", k=1), HERE, quiet=True)
    broken = [next((tmp_path / "labeled" / part / label).iterdir()) for part in ("train", "test") for label in "04"]
    for path in broken:
        path.write_bytes(b"no image")
    report = compare(saved, Comparison(str(tmp_path / "labeled"), "knn", k=1), HERE, quiet=True)
    assert sorted(report.unreadable) == sorted(map(str, broken)) and report.counts == (238, 58)
    for path in broken:
        path.unlink()
    without = compare(saved, Comparison(str(tmp_path / "labeled"), "knn", k=1), HERE, quiet=True)
    assert report.draws == without.draws
    for row, before in zip(report.draws[0].rows, intact.draws[0].rows):
        assert abs(row.knn - before.knn) < 0.1


def test_no_image_of_a_draw_is_readable(saved, digits, tmp_path):
    shutil.copytree(digits.labeled, tmp_path / "labeled")
    source = open_labeled_source(tmp_path / "labeled")
    draw = draw_labels(source, 2, 0)
    pools = pool_draws(source, [draw])
    train, test = (embeddings(saved.encoder, part.data, (Feature(),)) for part in pools.parts)
    train = replace(train, rows=train.rows[:0], vectors={"final": train.vectors["final"][:0]})
    with pytest.raises(ValueError, match="none of the 20 training images of seed 0 can be read"):
        pools.split(draw, [train, test])


def test_subsample():
    """Classes keep their shares, the first and the last row stay, and no row is repeated."""
    part = LabeledRows(np.arange(1000) * 3, np.repeat([0, 1, 2], [500, 400, 100]))
    kept = subsample(part, 50)
    assert np.bincount(kept.labels).tolist() == [25, 20, 5]
    assert kept.rows[0] == 0 and kept.rows[-1] == 2997 and len(np.unique(kept.rows)) == 50
    assert all(label == part.labels[row // 3] for row, label in zip(*kept))
    assert subsample(part, 1000) is part and subsample(part, None) is part


# --- features --------------------------------------------------------------------------------------------------------


def test_pixels(saved, digits):
    """The normalized image, and of a larger image the means of blocks of pixels, computed by hand."""
    source = open_images(digits.unlabeled).select(range(3))
    found = embeddings(saved.encoder, source, (Pixels((32, 32)),)).vectors["pixels, 32×32"]
    views = [EvaluationView((32, 32))(open_picture(row["image"], 1)).numpy() for row in source]
    expected = (np.stack(views).reshape(3, -1) / 255 - 0.13) / 0.31
    assert np.allclose(found, expected, atol=1e-5)
    images = torch.randn(2, 3, 128, 16)
    reduced = images.reshape(2, 3, 32, 4, 16).mean(dim=3).flatten(1)
    assert torch.allclose(Pixels((128, 16)).extract(images, None), reduced, atol=1e-6)
    assert Pixels((128, 16)).name == "pixels, 32×16"
    assert Pixels((128, 16)).dim(SwinV2Config(16, (1,), (2,))) == 3 * 32 * 16


def test_select_features():
    config = SwinV2Config(16, (1, 1), (2, 2), window_size=4)
    names = [feature.name for feature in select_features(config, (32, 32), "final")]
    assert names == ["final", "final, 2x2"]
    assert [feature.name for feature in select_features(config, (32, 32), "0", "2x2")] == ["stage 0, 2x2"]
    assert select_features(config, (32, 32)) == all_features(config, (32, 32))
    with pytest.raises(ValueError, match="the map of stage '1' is a single token"):
        select_features(config, (8, 8), "1", "2x2")


# --- files ------------------------------------------------------------------------------------------------


def test_files(saved, digits, tmp_path):
    report = compare(saved, Comparison(str(digits.labeled), "probe", 3, seeds=2, stage="0"), HERE, quiet=True)
    for name in ("r.json", "r.csv", "r.md"):
        assert write_report(report, tmp_path / "new" / name) == tmp_path / "new" / name
        with pytest.raises(ValueError, match=f"{name}' exists"):
            write_report(report, tmp_path / "new" / name)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.csv", "r.json", "r.md"]
    values = json.loads((tmp_path / "new" / "r.json").read_text())
    assert values["labels_per_class"] == 3 and values["classes"] == list("0123456789") and values["train_images"] == 30
    assert values["provenance"] == {"method": "SimMIM"} and values["unreadable"] == {}
    first = values["features"][0]
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
        ("0", "untrained"),
    ]
    assert values["untrained"][1]["probe"] == report.draws[1].untrained.probe == float(rows[7]["probe"])
    assert [float(row["probe"]) for row in rows if row["feature"] == "stage 0"] == each
    assert sum(int(row["chosen"]) for row in rows) == 2
    assert (tmp_path / "new" / "r.md").read_text() == report.table() + "\n"


def test_a_file_is_written_whole_or_not_at_all(saved, digits, tmp_path):
    report = compare(saved, Comparison(str(digits.labeled), "knn", 3, stage="0"), HERE, quiet=True)
    with pytest.raises(TypeError, match="keys must be"):
        write_report(replace(report, provenance={("no", "text"): 1}), tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


# --- the commands ----------------------------------------------------------------------------------------------------


def test_probe_and_knn(folder, digits, tmp_path, capsys, monkeypatch):
    """Table and conclusions on stdout, progress bars and unreadable files on stderr; k-NN without scikit-learn."""
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
    assert f"not read: {torn}: empty file" in err and "1 image unreadable" in out
    assert "| untrained: stage" in out and "the same encoder untrained" in out and "Pre-training has not helped yet" in out
    assert main(["knn", *common, "--untrained", "false"]) == 0
    assert "untrained" not in capsys.readouterr().out
    monkeypatch.setattr(SwinV2, "encode", lambda *given: pytest.fail("images were encoded although scikit-learn is missing"))
    assert main(["probe", *common]) == 2
    assert "needs scikit-learn" in capsys.readouterr().err
