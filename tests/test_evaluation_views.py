"""Evaluation that averages over several crops of an image: which they are, and that every command sees the same."""

import csv
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_files import noise
from PIL import Image
from random_encoders import GRAY, random_encoder
from short_runs import metrics

from simmim.checkpoints import read, read_encoder
from simmim.checkpoints.export import export
from simmim.cli import main
from simmim.data import evaluation_views, open_images
from simmim.data.decode import Picture
from simmim.evaluate import EncoderPass, collect_embeddings, embed_batches, see_crops
from simmim.finetune import ClassificationSettings, LabeledSettings, finetune
from simmim.finetune.registry import task_named

HERE = EncoderPass(workers=0)


def test_places():
    """The middle and the corners of 40 × 60 pixels at half of the largest square, and their mirror images."""
    pixels = noise(40, 60, 3)
    corners = [(10, 20), (0, 0), (0, 40), (20, 0), (20, 40)]
    crops = [pixels[top : top + 20, left : left + 20] for top, left in corners]
    expected = [torch.from_numpy(crop.copy()).permute(2, 0, 1) for crop in crops + [crop[:, ::-1] for crop in crops]]
    for count in (1, 5, 10):
        views = evaluation_views((20, 20), 0.5, count)
        assert len(views) == count
        for view, crop in zip(views, expected):
            assert torch.equal(view(Picture(Image.fromarray(pixels))), crop)
    with pytest.raises(ValueError, match="number of views is 3: give 1 for the central crop, 5 for it and the corners, 10"):
        evaluation_views((20, 20), count=3)


def test_vectors_are_the_mean_over_the_views(tmp_path):
    encoder, preprocessing = random_encoder(), replace(GRAY, crop=0.75, views=10)
    pixels = noise(64, 48)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    found = collect_embeddings(embed_batches(encoder, preprocessing, open_images(tmp_path), options=HERE)).vectors["final"]
    (tmp_path / "crops").mkdir()
    for number, (top, left) in enumerate([(14, 6), (0, 0), (0, 12), (28, 0), (28, 12)]):
        crop = pixels[top : top + 36, left : left + 36]
        Image.fromarray(crop).save(tmp_path / "crops" / f"{number}.png")
        Image.fromarray(np.ascontiguousarray(crop[:, ::-1])).save(tmp_path / "crops" / f"{number} mirrored.png")
    crops = collect_embeddings(embed_batches(encoder, GRAY, open_images(tmp_path / "crops"), options=HERE)).vectors["final"]
    assert len(crops) == 10 and np.ptp(crops, axis=0).max() > 0.01, "the crops differ"
    assert np.allclose(found[0], crops.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def run(digits, encoder_folder, tmp_path_factory):
    """A classifier that is judged by five crops."""
    out = tmp_path_factory.mktemp("views") / "run"
    data = LabeledSettings(str(digits.labeled), evaluation_crop=0.75, evaluation_views=5)
    common = {"steps": 12, "batch_size": 40, "validations": 1, "workers": 0, "labels_per_class": 12}
    finetune(ClassificationSettings(data=data, out=str(out), init=str(encoder_folder), **common))
    return out


def test_predict_scores_as_validation_did(run, digits, tmp_path):
    accuracy = float(metrics(run)["accuracy"][-1])
    images = digits.labeled / "test"
    scores = {}
    for name, views in (("five", 5), ("one", 1)):
        saved = read_encoder(run)
        assert saved.preprocessing.views == 5 and saved.preprocessing.crop == 0.75
        out = tmp_path / f"{name}.csv"
        assert main(["predict", "--run", str(run), "--images", str(images), "--out", str(out), "--views", str(views)]) == 0
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        scores[name] = [float(row["probability 0"]) for row in rows]
        if views == 5:
            assert np.mean([row["class"] in row["path"].split("/")[-2] for row in rows]) == pytest.approx(accuracy)
    assert np.abs(np.subtract(scores["five"], scores["one"])).max() > 1e-3, "one crop is another question"


def test_embed_and_knn_see_the_same_crops(run, digits, tmp_path, capsys):
    saved = replace(read_encoder(run), preprocessing=replace(read_encoder(run).preprocessing, views=1, crop=1.0))
    assert see_crops(saved, 10, None).preprocessing.crop == 0.75, "several crops of a whole image would be one"
    assert see_crops(saved, None, 0.5).preprocessing == replace(saved.preprocessing, crop=0.5)
    five = see_crops(saved, 5, 0.9)
    expected = collect_embeddings(
        embed_batches(five.encoder, five.preprocessing, open_images(digits.labeled / "test"), options=HERE)
    )
    words = ["--run", str(run), "--views", "5", "--crop", "0.9", "--workers", "0"]
    images = ["--images", str(digits.labeled / "test"), "--out", str(tmp_path / "e.parquet")]
    assert main(["embed", *words, *images]) == 0
    vectors = np.stack(pq.read_table(tmp_path / "e.parquet")["vector"].to_pylist())
    assert np.allclose(vectors, expected.vectors["final"], rtol=1e-5, atol=1e-6)
    tables = []
    for crops in (words[:2], words):
        capsys.readouterr()
        assert main(["knn", *crops, "--data", str(digits.labeled), "--untrained", "false", "--pooling", "mean"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] != tables[1]


def test_a_tile_is_seen_once_and_whole(run, tmp_path):
    """By the encoder of a classifier that is judged by five crops, too."""
    pixels = noise(32, 64)
    Image.fromarray(pixels).save(tmp_path / "two.png")
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        Image.fromarray(pixels[:, 32 * number :][:, :32]).save(tmp_path / str(number) / "one.png")
    words = ["--run", str(run), "--workers", "0"]
    tiles = ["--tile", "32", "--overlap", "0", "--max-background", "1"]
    out = tmp_path / "tiles.parquet"
    assert main(["embed", *words, *tiles, "--images", str(tmp_path / "two.png"), "--out", str(out)]) == 0
    found = np.stack(pq.read_table(out)["vector"].to_pylist())
    whole = see_crops(read_encoder(run), 1, 1.0)
    halves = [open_images(tmp_path / str(number)) for number in range(2)]
    expected = [
        collect_embeddings(embed_batches(whole.encoder, whole.preprocessing, half, options=HERE)).vectors["final"][0]
        for half in halves
    ]
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_wrong_crops_are_refused(run, digits, tmp_path, capsys):
    images = ["--run", str(run), "--images", str(digits.labeled / "test"), "--out", str(tmp_path / "out.csv")]
    for command, words, told in (
        ("predict", ["--views", "3"], "views is 3: give 1 for the central crop"),
        ("predict", ["--crop", "1.5"], "crop is 1.5: give a share of the sides above 0, at most 1"),
        ("predict", ["--views", "5", "--tile", "64"], "views and crop are of whole images, tile reads parts of them"),
        ("embed", ["--views", "5", "--tile", "64"], "views and crop are of whole images, tile reads parts of them"),
    ):
        assert main([command, *images, *words]) == 2
        error = capsys.readouterr().err.strip()
        assert told in error and "\n" not in error
    assert not list(tmp_path.iterdir()), "nothing is written"
    with pytest.raises(ValueError, match="finds places in images, and sees them whole: leave out views and crop"):
        task_named("segmentation").predict_views("run", "images", None, 1, None, 5, None)


def test_exports_say_what_they_lack(run, tmp_path):
    checkpoint = read(run)
    export(checkpoint, "safetensors", tmp_path / "own")
    assert read(tmp_path / "own").preprocessing.views == 5
    exported = export(checkpoint, "timm", tmp_path / "timm", "classifier")
    assert any("by the mean over 5 crops of an image" in note for note in exported.notes)
    assert "5 crops" in (tmp_path / "timm" / "README.md").read_text()
