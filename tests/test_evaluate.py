"""Embeddings against the encoder one image at a time; k-NN and linear probe against scikit-learn's, on real digits."""

import io
import itertools
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing, save_encoder
from simmim.data import open_images, read_labeled_images
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.evaluate import (
    DEFAULT_STRENGTH,
    STRENGTHS,
    CrossValidated,
    EncoderPass,
    Feature,
    StageScore,
    StageScores,
    all_features,
    embed,
    embedded_batches,
    embeddings,
    knn,
    knn_predict,
    linear_probe,
    neighbors,
    parquet,
    probe_stages,
    stages_table,
    vectors,
)
from simmim.evaluate import probe as probe_module

CONFIG = SwinV2Config(16, (1, 2), (2, 2), window_size=4, in_channels=1, drop_path_rate=0.5)
GRAY = Preprocessing((32, 32), (0.13,), (0.31,))
HERE = EncoderPass(workers=0)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@torch.no_grad()
def random_encoder(config=CONFIG, seed=0):
    """Every parameter random, norm gains included, so that each block counts."""
    generator = torch.Generator().manual_seed(seed)
    encoder = SwinV2(config)
    for name, parameter in encoder.named_parameters():
        parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2, generator=generator)
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    return random_encoder()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, encoder):
    return read_encoder(save_encoder(tmp_path_factory.mktemp("encoder"), encoder, GRAY, {"method": "SimMIM", "steps": 7}))


@pytest.fixture(scope="module")
def some_digits(digits):
    """24 images, evenly spread."""
    return sorted(map(str, digits.unlabeled.iterdir()))[::10]


@pytest.fixture(scope="module")
def digit_vectors(digits, encoder):
    """Training and test embeddings of all digits by every feature, and their labels."""
    found = read_labeled_images(digits.labeled, None, seed=0)
    features, parts = all_features(encoder.config, GRAY.image_size), []
    for source in (found.train, found.validation):
        part = embeddings(encoder, GRAY, source, features, how=HERE)
        parts += [part.vectors, np.asarray(source["label"])[part.rows]]
    return parts


@pytest.fixture
def damaged(tmp_path, some_digits):
    """24 images, of which four are not; and a photo cut in half, whose header is sound."""
    for number, path in enumerate(some_digits):
        (tmp_path / f"{number:02d}.png").write_bytes(Path(path).read_bytes())
    (tmp_path / "00.png").write_text("no image")
    (tmp_path / "07.png").write_bytes(b"")
    (tmp_path / "08.png").write_bytes((tmp_path / "08.png").read_bytes()[:60])
    (tmp_path / "23.png").write_text("<html>")
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(file, "JPEG")
    (tmp_path / "24.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    return tmp_path


UNREADABLE = (0, 7, 8, 23, 24)


def by_hand(encoder, preprocessing, path):
    """One image's output, its pixels by Pillow alone."""
    height, width = preprocessing.image_size
    filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[preprocessing.interpolation]
    with Image.open(path) as image:
        mode = "L" if encoder.config.in_channels == 1 else "RGB"
        pixels = np.asarray(image.convert(mode).resize((width, height), filter), dtype=np.float32) / 255
    pixels = (np.atleast_3d(pixels) - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None], return_stages=True)


def quarters(features):
    """(1, C, H, W) with even sides: the means of its quarters, channel by channel."""
    _, channels, height, width = features.shape
    split = features.reshape(channels, 2, height // 2, 2, width // 2)
    return split.mean(dim=(2, 4)).flatten().numpy()


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_are_the_encoders_features(encoder, digits):
    """Every stage, both poolings and the final features, one image at a time."""
    features = all_features(encoder.config, (32, 32))
    found = embeddings(encoder, GRAY, open_images(digits.unlabeled), features)
    assert [feature.name for feature in features] == list(found.vectors)
    assert list(found.vectors) == ["stage 0", "stage 0, 2x2", "stage 1", "stage 1, 2x2", "final", "final, 2x2"]
    assert {name: vectors.shape[1] for name, vectors in found.vectors.items()} == {
        feature.name: feature.dim(encoder.config) for feature in features
    }
    for row in range(0, 240, 40):
        output = by_hand(encoder, GRAY, found.paths[row])
        maps = {"stage 0": output.stages[0], "stage 1": output.stages[1], "final": output.features}
        for name, features in maps.items():
            assert np.allclose(found.vectors[name][row], features.mean(dim=(0, 2, 3)).numpy(), **CLOSE)
            assert np.allclose(found.vectors[f"{name}, 2x2"][row], quarters(features), **CLOSE)
        assert np.allclose(found.vectors["final"][row], output.pooled[0].numpy(), **CLOSE)
    assert found.vectors["final"].dtype == np.float32 and found.vectors["final"].std(axis=0).min() > 0.01
    assert found.rows.tolist() == list(range(240)) and not found.unreadable


def test_final_features_are_the_default(encoder, digits):
    source = open_images(digits.unlabeled).select(range(5))
    vectors = embeddings(encoder, GRAY, source, how=HERE).vectors
    assert list(vectors) == ["final"] and vectors["final"].shape == (5, 32)


@pytest.mark.parametrize("workers, batch_size", [(0, 1), (0, 24), (1, 7), (3, 4), (2, 500)])
def test_workers_and_batches_change_nothing(encoder, damaged, workers, batch_size):
    """Unreadable images among them, at either end of a batch, filling one, and in the last."""
    source, features = open_images(damaged), (Feature(), Feature(0, "2x2"))
    found = embeddings(encoder, GRAY, source, features, EncoderPass(batch_size, workers))
    expected = embeddings(encoder, GRAY, source, features, EncoderPass(5, 0))
    readable = [row for row in range(25) if row not in UNREADABLE]
    assert found.rows.tolist() == readable and found.rows.dtype == np.int64
    assert found.paths == tuple(str(damaged / f"{row:02d}.png") for row in readable)
    assert list(found.unreadable.items()) == list(expected.unreadable.items())
    for name in ("final", "stage 0, 2x2"):
        assert found.vectors[name].shape[0] == 20
        assert np.allclose(found.vectors[name], expected.vectors[name], **CLOSE)


def test_reading_processes_by_default(encoder, digits, monkeypatch):
    """As many as the machine has for it, and no more than there are batches."""
    source, started, load = open_images(digits.unlabeled), [], vectors.DataLoader

    def noted(*given, **how):
        started.append(how["num_workers"])
        return load(*given, **how)

    monkeypatch.setattr(vectors, "default_num_workers", lambda device: {"cpu": 3}[device])
    monkeypatch.setattr(vectors, "DataLoader", noted)
    for batch_size, workers in ((64, None), (100, 2), (120, None), (240, 5), (64, 0)):
        embedded_batches(encoder, GRAY, source, how=EncoderPass(batch_size, workers))
    assert started == [3, 2, 2, 1, 0]


def test_batches_without_an_image_are_not_encoded(encoder, damaged, monkeypatch):
    """Not every device computes with nothing."""
    encode, sizes = SwinV2.encode, []
    monkeypatch.setattr(SwinV2, "encode", lambda model, x, *how: sizes.append(len(x)) or encode(model, x, *how))
    batches = list(embedded_batches(encoder, GRAY, open_images(damaged), (Feature(0, "2x2"),), how=EncoderPass(1, 0)))
    assert sizes == [1] * 20 and len(batches) == 25
    assert batches[0].vectors["stage 0, 2x2"].shape == (0, 64) and batches[0].vectors["stage 0, 2x2"].dtype == np.float32


def test_unreadable_images_are_named_with_their_reason(encoder, damaged):
    found = embeddings(encoder, GRAY, open_images(damaged), how=HERE)
    assert list(found.unreadable) == [str(damaged / f"{row:02d}.{'jpg' if row == 24 else 'png'}") for row in UNREADABLE]
    reasons = list(found.unreadable.values())
    assert reasons[0] == "not an image" and reasons[1] == "empty file" and all(reasons)
    for row, vector in zip(found.rows, found.vectors["final"]):
        expected = by_hand(encoder, GRAY, damaged / f"{row:02d}.png").pooled[0].numpy()
        assert np.allclose(vector, expected, **CLOSE), "vectors stay with their images"


def test_labels_by_rows(encoder, damaged):
    source = open_images(damaged).add_column("label", [row % 3 for row in range(25)])
    found = embeddings(encoder, GRAY, source, how=HERE)
    assert np.asarray(source["label"])[found.rows].tolist() == [row % 3 for row in range(25) if row not in UNREADABLE]


def test_images_without_a_path_or_of_one_name(encoder, some_digits):
    """In shards: each is counted, and has a name to be found by."""
    data = Path(some_digits[0]).read_bytes()
    rows = [
        {"bytes": data, "path": None},
        {"bytes": b"x", "path": None},
        {"bytes": b"x", "path": "a.png"},
        {"bytes": data, "path": "b.png"},
        {"bytes": b"y", "path": "a.png"},
        {"bytes": b"", "path": "a.png"},
    ]
    source = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))
    found = embeddings(encoder, GRAY, source, how=EncoderPass(2, 0))
    assert found.paths == ("row 0", "b.png") and found.rows.tolist() == [0, 3]
    assert list(found.unreadable) == ["row 1", "a.png", "a.png (2)", "a.png (3)"]
    assert np.array_equal(*found.vectors["final"])


def test_progress_counts_every_image(encoder, damaged):
    seen = []
    embeddings(encoder, GRAY, open_images(damaged), how=EncoderPass(10, 0), progress=seen.append)
    assert seen == [10, 10, 5]


def test_the_mode_of_the_encoder_and_of_torch(digits):
    """Evaluation mode during the pass and the former one after it; inference mode inside alone."""
    encoder = random_encoder().train()
    source = open_images(digits.unlabeled).select(range(12))
    expected = embeddings(random_encoder(), GRAY, source, how=HERE).vectors["final"]
    found = []
    for batch in embedded_batches(encoder, GRAY, source, how=EncoderPass(5, 0)):
        assert not torch.is_inference_mode_enabled()
        found.append(batch.vectors["final"])
    assert np.allclose(np.concatenate(found), expected, **CLOSE), "without drop path"
    assert encoder.training
    encoder(torch.zeros(1, 1, 32, 32)).pooled.sum().backward()
    batches = embedded_batches(encoder, GRAY, source, how=EncoderPass(5, 0))
    next(batches)
    assert not encoder.training
    batches.close()
    assert encoder.training


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_is_followed(tmp_path, interpolation):
    """Color, not square, squashed, by another filter; maps with odd sides."""
    encoder = random_encoder(replace(CONFIG, in_channels=3))
    preprocessing = Preprocessing((40, 24), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), interpolation, fit="squash")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 61, 75, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    features = (Feature(), Feature(1, "2x2"))
    found = embeddings(encoder, preprocessing, open_images(tmp_path), features, how=HERE)
    for row, path in enumerate(found.paths):
        output = by_hand(encoder, preprocessing, path)
        assert np.allclose(found.vectors["final"][row], output.pooled[0].numpy(), **CLOSE)
        stage = output.stages[1][0].numpy()  # 5 × 3: both quarters of an axis see its middle
        corners = itertools.product((np.s_[:3], np.s_[2:]), (np.s_[:2], np.s_[1:]))
        expected = np.stack([stage[:, rows, columns].mean(axis=(1, 2)) for rows, columns in corners], axis=1)
        assert np.allclose(found.vectors["stage 1, 2x2"][row], expected.ravel(), **CLOSE)
    cropped = embeddings(encoder, replace(preprocessing, fit="crop"), open_images(tmp_path), how=HERE)
    smaller = embeddings(encoder, replace(preprocessing, crop=0.5), open_images(tmp_path), how=HERE)
    for other in (cropped, smaller):
        assert np.abs(other.vectors["final"] - found.vectors["final"]).max() > 0.01


def test_autocast_is_near(encoder, digits):
    source = open_images(digits.unlabeled).select(range(20))
    features = (Feature(), Feature(0, "2x2"))
    exact = embeddings(encoder, GRAY, source, features, how=HERE).vectors
    coarse = embeddings(encoder, GRAY, source, features, EncoderPass(workers=0, autocast=torch.bfloat16)).vectors
    for name in exact:
        assert coarse[name].dtype == np.float32
        assert 1e-4 < np.abs(coarse[name] - exact[name]).max() < 0.1


def test_features_of_small_maps():
    """Quarters of a single token are four times the same."""
    config = SwinV2Config(16, (1, 1, 1), (2, 2, 2), window_size=4)
    names = [feature.name for feature in all_features(config, (16, 16))]
    assert names == ["stage 0", "stage 0, 2x2", "stage 1", "stage 1, 2x2", "stage 2", "final"]
    assert [feature.name for feature in all_features(config, (16, 32))][-1] == "final, 2x2"
    assert [Feature(stage, "2x2").dim(config) for stage in (0, 1, 2, None)] == [64, 128, 256, 256]


def test_what_cannot_be_embedded(encoder, tmp_path, digits):
    source = open_images(digits.unlabeled)
    for settings, message in (
        ({"features": (Feature(2),)}, "stage is 2: this encoder has stages 0 to 1"),
        ({"source": source.select([])}, "the source holds no images"),
    ):
        with pytest.raises(ValueError, match=message):
            embeddings(encoder, GRAY, **{"source": source, **settings})
    with pytest.raises(ValueError, match="unknown pooling 'max': give one of mean, 2x2"):
        Feature(0, "max")
    with pytest.raises(ValueError, match="batch size is 0: give 1 or more"):
        EncoderPass(0)
    with pytest.raises(ValueError, match="workers is -1: give 0"):
        EncoderPass(workers=-1)
    for stage in (-1, 1.0, "last"):
        with pytest.raises(ValueError, match=f"stage is {stage!r}: give a number from 0, or None"):
            Feature(stage)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=r"none of 2 images can be read; the first, .+/a.png: not an image"):
        embeddings(encoder, GRAY, open_images(tmp_path), how=HERE)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_is_read_by_everyone(saved, damaged, tmp_path):
    out = tmp_path / "new" / "vectors.parquet"
    result = embed(saved, damaged, out, stage=1, pooling="2x2", how=EncoderPass(6, 2))
    expected = embeddings(saved.encoder, GRAY, open_images(damaged), (Feature(1, "2x2"),), how=HERE)
    vectors = expected.vectors["stage 1, 2x2"]
    assert (result.count, result.dim, result.unreadable) == (20, 128, expected.unreadable)

    table = pq.read_table(out)
    assert table.column_names == ["path", "vector"]
    assert str(table.schema.field("path").type) == "string"
    kind = table.schema.field("vector").type
    assert kind.list_size == 128 and str(kind.value_type) == "float"
    assert table["path"].to_pylist() == list(expected.paths)
    flat = table["vector"].combine_chunks().values.to_numpy().reshape(-1, 128)
    assert np.allclose(flat, vectors, **CLOSE)

    frame = pandas.read_parquet(out)
    assert frame["path"].tolist() == list(expected.paths) and np.array_equal(np.stack(frame["vector"]), flat)

    rows = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["path"][:] == list(expected.paths)
    assert np.array_equal(rows.with_format("numpy")["vector"][:], flat)

    labels = np.arange(20) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Arrow's memory cannot be written, which torch would mind
        assert knn(flat, labels, flat, labels, k=1) == 1.0

    origin = json.loads(pq.read_schema(out).metadata[b"simmim"])
    assert origin["provenance"] == {"method": "SimMIM", "steps": 7}
    assert Path(origin["encoder"]).is_dir() or Path(origin["encoder"]).is_file()
    assert origin["architecture"]["embed_dim"] == 16 and (origin["stage"], origin["pooling"]) == (1, "2x2")
    assert origin["preprocessing"]["image_size"] == [32, 32] and origin["preprocessing"]["mean"] == [0.13]


def test_images_are_given_by_path_or_opened(saved, digits, some_digits, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text("\n".join(some_digits))
    tables = []
    for number, images in enumerate((str(listed), [str(listed)], open_images(str(listed)))):
        embed(saved, images, tmp_path / f"{number}.parquet", how=HERE)
        tables.append(pq.read_table(tmp_path / f"{number}.parquet"))
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    assert tables[0]["path"].to_pylist() == some_digits and tables[0].schema.field("vector").type.list_size == 32


def test_row_groups_are_written_as_they_come(saved, digits, tmp_path, monkeypatch):
    """A group of 50 vectors of 32 values is due with each third batch of 20; the file grows before the images end."""
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 50 * 32 * 4)
    written, encoded = [], []
    write, encode = pq.ParquetWriter.write_table, SwinV2.encode
    monkeypatch.setattr(
        pq.ParquetWriter,
        "write_table",
        lambda writer, table, **how: written.append((len(encoded), len(table))) or write(writer, table, **how),
    )
    monkeypatch.setattr(SwinV2, "encode", lambda *given, **how: encoded.append(1) or encode(*given, **how))
    result = embed(saved, digits.unlabeled, tmp_path / "v.parquet", how=EncoderPass(20, 0))
    assert written == [(3, 60), (6, 60), (9, 60), (12, 60)] and result.count == 240
    metadata = pq.ParquetFile(tmp_path / "v.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [60] * 4
    vectors = np.stack(pandas.read_parquet(tmp_path / "v.parquet")["vector"])
    expected = embeddings(saved.encoder, GRAY, open_images(digits.unlabeled), how=HERE).vectors["final"]
    assert np.allclose(vectors, expected, **CLOSE)


def test_whole_or_not_at_all(saved, digits, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "v.parquet"
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"none of 1 images can be read; the first, .+a\.png: not an image"):
        embed(saved, str(tmp_path / "a.png"), out, how=HERE)
    for settings in ({"stage": 5}, {"pooling": "max"}):
        with pytest.raises(ValueError, match=r"stage is 5|unknown pooling"):
            embed(saved, digits.unlabeled, out, **{"how": HERE, **settings})
    encode, calls = SwinV2.encode, []

    def fails(*given, **how):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return encode(*given, **how)

    monkeypatch.setattr(SwinV2, "encode", fails)
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        embed(saved, digits.unlabeled, out, how=EncoderPass(20, 0))
    assert list(folder.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"v\.parquet' exists: give a new file"):
        embed(saved, digits.unlabeled, out, how=HERE)
    assert out.read_text() == "mine" and [path.name for path in folder.iterdir()] == ["v.parquet"]


# --- k-NN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (100, 0.01), (1000, 0.07)])
def test_knn_is_scikit_learns(digit_vectors, k, temperature):
    train, train_labels, test, test_labels = digit_vectors
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
        assert knn(train[name], train_labels, test[name], test_labels, k, temperature) == np.mean(expected == test_labels)


@pytest.mark.parametrize("test_rows, train_rows", [(7, 13), (1, 1000), (64, 3), (1000, 1)])
def test_knn_in_pieces(digit_vectors, monkeypatch, test_rows, train_rows):
    """However few similarities are held at a time, against a count in float64; k larger than a piece too."""
    monkeypatch.setattr(neighbors, "TEST_ROWS", test_rows)
    monkeypatch.setattr(neighbors, "TRAIN_ROWS", train_rows)
    train, train_labels, test, _ = digit_vectors
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
    """Angles 0, 40, 50 and 180 degrees from the query, of classes 3, 1, 1, 0. Lengths do not count."""
    angles, lengths = np.radians([0, 40, 50, 180]), np.array([0.1, 5, 1, 9])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]
    labels, query = [3, 1, 1, 0], np.array([[2.0, 0.0]])
    assert knn_predict(train, labels, query, k=1) == 3
    # cos: 1, 0.766, 0.643. At 0.07 e^-3.34 + e^-5.1 = 0.04 are less than 1; at 1 0.79 + 0.70 are more.
    assert knn_predict(train, labels, query, k=3, temperature=0.07) == 3
    assert knn_predict(train, labels, query, k=3, temperature=1.0) == 1
    assert knn_predict(train, labels, query, k=2, temperature=1.0) == 3
    assert knn_predict(train, labels, query, k=50, temperature=1e-5) == 3, "exp(100,000) is no number"
    assert knn_predict(train, labels, np.zeros((1, 2)), k=50) == 1, "like none: each votes alike"
    assert knn(train, labels, np.repeat(query, 4, axis=0), [3, 3, 7, 0], k=1) == 0.5, "7 is no class that could be found"


def test_knn_of_wrong_input():
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
        ({"classes": 1}, "a train label is 1: with 1 classes, give 0 to 0"),
    ):
        given = {"train": vectors, "train_labels": labels, "test": vectors, "test_labels": labels, "classes": 2, **change}
        with pytest.raises(ValueError, match=message):
            knn(**given)


# --- linear probe ----------------------------------------------------------------------------------------------------


def searched(vectors, labels, folds, seed):
    """scikit-learn's own search over the same strengths, each fit from the start."""
    return GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": STRENGTHS},
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    ).fit(vectors.astype(np.float64), labels)


@pytest.mark.parametrize("name, seed", [("stage 0", 0), ("final", 3)])
def test_probe_is_scikit_learns_search(digit_vectors, name, seed):
    """Its table, choice and predictions; features with outliers, so that it matters what they are standardized by."""
    train, train_labels, test, test_labels = digit_vectors
    vectors, others = np.copy(train[name]), test[name]
    vectors[np.arange(0, 240, 31), np.arange(8)] *= 100
    found = linear_probe(vectors, train_labels, others, test_labels, seed)
    reference = searched(vectors, train_labels, 5, seed)
    assert found.folds == 5 and [row.c for row in found.cross_validation] == list(STRENGTHS)
    means, stds = reference.cv_results_["mean_test_score"], reference.cv_results_["std_test_score"]
    # Ours starts each fit from the last one's solution: an image on the border between two classes may change sides.
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


def test_probe_ignores_scale_and_the_test_labels(digit_vectors):
    train, train_labels, test, test_labels = digit_vectors
    vectors, others = train["final"], test["final"]
    found = linear_probe(vectors, train_labels, others, test_labels)
    stretch, moved = np.logspace(-3, 3, 32), np.linspace(-5, 5, 32)
    again = linear_probe(vectors * stretch + moved, train_labels, others * stretch + moved, test_labels[::-1])
    assert (again.c, again.cross_validation[:4]) == (found.c, found.cross_validation[:4])
    assert np.mean(again.predictions == found.predictions) > 0.98 and again.accuracy != found.accuracy


def test_folds_follow_from_the_smallest_class(digit_vectors):
    train, train_labels, test, test_labels = digit_vectors
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


def test_classes_need_not_be_all(digit_vectors):
    """Two of ten, by their own numbers; a test label that was never seen counts as missed."""
    train, train_labels, test, test_labels = digit_vectors
    chosen = np.isin(train_labels, (4, 9))
    found = linear_probe(train["stage 0"][chosen], train_labels[chosen], test["stage 0"], test_labels)
    assert set(found.predictions) == {4, 9}
    assert found.accuracy == np.mean(found.predictions == test_labels) <= np.isin(test_labels, (4, 9)).mean()


def test_equal_strengths_give_the_strongest_penalty():
    """Two clouds far apart are told apart at any strength."""
    labels = np.arange(40) % 2
    vectors = np.random.default_rng(0).normal(size=(40, 3)) + 20 * labels[:, None]
    found = linear_probe(vectors, labels, vectors, labels)
    assert {row.mean for row in found.cross_validation} == {1.0} and found.c == STRENGTHS[0] and found.accuracy == 1.0


def test_fits_that_end_early_say_so(digit_vectors, monkeypatch):
    train, train_labels, test, test_labels = digit_vectors
    monkeypatch.setattr(probe_module, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not linear_probe(train["final"], train_labels, test["final"], test_labels).converged


def test_probe_of_wrong_input(monkeypatch):
    vectors, labels = np.eye(4), [0, 1, 0, 1]
    for change, message in (
        ({"train_labels": [5] * 4}, "all train labels are 5: give vectors of at least two classes"),
        ({"test": vectors[:, :3]}, "train vectors have 4 values, test vectors 3"),
        ({"test": np.full_like(vectors, np.inf)}, "test vector 0 is not finite"),
        ({"test_labels": [0]}, r"test labels have shape \(1,\)"),
    ):
        given = {"train": vectors, "train_labels": labels, "test": vectors, "test_labels": labels, **change}
        with pytest.raises(ValueError, match=message):
            linear_probe(**given)
    for name in ("sklearn", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"needs scikit-learn.+: pip install 'simmim-toolkit\[probe\]'"):
        linear_probe(vectors, labels, vectors, labels)


# --- every stage -----------------------------------------------------------------------------------------------------


def test_every_stage_of_real_digits(digit_vectors):
    train, train_labels, test, test_labels = digit_vectors
    seen = []
    scores = probe_stages(train, train_labels, test, test_labels, k=5, seed=1, progress=seen.append)
    assert [row.name for row in scores.rows] == list(train) and seen == list(scores.rows)
    for row in scores.rows:
        probe = linear_probe(train[row.name], train_labels, test[row.name], test_labels, seed=1)
        assert row == (
            row.name,
            train[row.name].shape[1],
            knn(train[row.name], train_labels, test[row.name], test_labels, k=5),
            probe.accuracy,
            probe.c,
            probe.cross_validated,
            probe.converged,
        )
        assert row.probe > 0.4 and row.knn > 0.3
    assert scores.winner.cross_validated == max(row.cross_validated for row in scores.rows)


def test_the_winner_is_not_chosen_by_test_accuracy():
    """`leaked` tells the test images' classes and not those of the training; of two alike the shorter is taken."""
    chance, labels = np.random.default_rng(0), np.arange(60) % 3
    told = np.eye(3)[labels]
    train = {
        "leaked": chance.normal(size=(60, 3)),
        "long": np.hstack([told, np.zeros((60, 2))]),
        "short": told,
    }
    test = {"leaked": train["leaked"], "long": chance.normal(size=(60, 5)), "short": chance.normal(size=(60, 3))}
    leaked = linear_probe(train["leaked"], labels, test["leaked"], labels)
    test_labels = leaked.predictions
    scores = probe_stages(train, labels, test, test_labels)
    assert scores.rows[0].probe == 1.0 and scores.rows[0].cross_validated < 0.6
    assert scores.rows[1].cross_validated == scores.rows[2].cross_validated == 1.0
    assert scores.winner == scores.rows[2] and scores.winner.name == "short" and scores.winner.probe < 0.6


def test_single_labels_choose_no_winner(digit_vectors):
    train, train_labels, test, test_labels = digit_vectors
    chosen = [int(np.flatnonzero(train_labels == label)[0]) for label in range(10)]
    few = {name: vectors[chosen] for name, vectors in train.items()}
    scores = probe_stages(few, train_labels[chosen], test, test_labels)
    assert scores.winner is None and all(row.cross_validated is None for row in scores.rows)
    last = "None is chosen: a class has a single label, which cross-validation cannot hold out."
    assert stages_table(scores).splitlines()[-2:] == ["", last]


def test_stages_that_differ():
    vectors = np.eye(3)
    for train, test, named in (({"a": vectors}, {"b": vectors}, "a, b"), ({}, {}, "none given"), ({}, {"c": vectors}, "c")):
        with pytest.raises(ValueError, match=rf"train and test features differ \({named}\): give the same, at least one"):
            probe_stages(train, [0, 1, 2], test, [0, 1, 2])


def test_table():
    rows = (
        StageScore("stage 0", 48, 0.5, 0.625, 0.001, 0.75, False),
        StageScore("stage 1, 2x2", 384, 1.0, 0.98765, 100.0, 0.87654, True),
        StageScore("final", 96, 0.1, 0.2, 0.1, None, True),
    )
    assert stages_table(StageScores(rows, rows[1])).splitlines() == [
        "| feature | values | k-NN | linear probe | C | cross-validated |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
        "| stage 0 | 48 | 50.0 | 62.5 (not converged) | 0.001 | 75.0 |",
        "| **stage 1, 2x2** | 384 | 100.0 | 98.8 | 100 | 87.7 |",
        "| final | 96 | 10.0 | 20.0 | 0.1 | – |",
        "",
        "Chosen by cross-validation on the training images alone: stage 1, 2x2.",
    ]
    assert CrossValidated(*linear_probe(np.eye(4), [0, 0, 1, 1], np.eye(4), [0, 0, 1, 1]).cross_validation[0]).c == 1e-4


def test_importing_loads_nothing_heavy():
    """Parquet, scikit-learn and the rest load when they are used."""
    names = ("pyarrow", "sklearn", "datasets", "pandas", "pytorch_lightning")
    code = f"import sys, simmim.evaluate\nprint([name for name in {names!r} if name in sys.modules])"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=100)
    assert done.stdout.strip() == "[]", done.stderr
