"""Embeddings and their Parquet files, compared with the encoder on one image at a time, on real digits."""

import contextlib
import io
import itertools
import json
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
from random_encoders import CONFIG, GRAY, random_encoder

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.data import default_num_workers, open_images
from simmim.encoders.swinv2 import SwinV2Config
from simmim.evaluate import (
    EncoderPass,
    Feature,
    all_features,
    collect_embeddings,
    embed_batches,
    knn_accuracy,
    load_views,
    parquet,
    write_embeddings,
)
from simmim.evaluate.embeddings import DEFAULT_PASS

HERE = EncoderPass(workers=0)  # images are read in this process
FINAL = (Feature(),)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def embeddings(encoder, source, features=FINAL, options=HERE, preprocessing=GRAY):
    return collect_embeddings(embed_batches(encoder, preprocessing, source, features, options))


@contextlib.contextmanager
def counted_passes(encoder):
    """The batch size of each forward pass inside the context."""
    sizes = []
    hook = encoder.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    yield sizes
    hook.remove()


@pytest.fixture(scope="module")
def encoder():
    return random_encoder()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, encoder):
    return read_encoder(save_encoder(tmp_path_factory.mktemp("encoder"), encoder, GRAY, {"method": "SimMIM", "steps": 7}))


@pytest.fixture(scope="module")
def some_digits(digits):
    """Paths of 24 images, evenly spread."""
    return sorted(map(str, digits.unlabeled.iterdir()))[::10]


@pytest.fixture
def damaged(tmp_path, some_digits):
    """24 files, of which four are no images, and half of a JPEG file, whose header is intact."""
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
    """The encoder's output for one image, read and scaled by Pillow."""
    height, width = preprocessing.image_size
    filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[preprocessing.interpolation]
    with Image.open(path) as image:
        mode = "L" if encoder.config.in_channels == 1 else "RGB"
        pixels = np.asarray(image.convert(mode).resize((width, height), filter), dtype=np.float32) / 255
    pixels = (np.atleast_3d(pixels) - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None], return_stages=True)


def quarters(features):
    """The means of the quarters of a map, (1, C, H, W) with even sides, channel by channel."""
    _, channels, height, width = features.shape
    split = features.reshape(channels, 2, height // 2, 2, width // 2)
    return split.mean(dim=(2, 4)).flatten().numpy()


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_are_the_encoders_features(encoder, digits):
    """Every feature equals the encoder's output for one image at a time."""
    features = all_features(encoder.config, (32, 32))
    found = embeddings(encoder, open_images(digits.unlabeled), features, DEFAULT_PASS)
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
    vectors = collect_embeddings(embed_batches(encoder, GRAY, source)).vectors
    assert list(vectors) == ["final"] and vectors["final"].shape == (5, 32)


@pytest.mark.parametrize("workers, batch_size", [(0, 1), (0, 24), (1, 7), (3, 4), (2, 500)])
def test_workers_and_batches_change_nothing(encoder, damaged, workers, batch_size):
    """Unreadable images are at the start and the end of a batch, fill a batch, and are in the last one."""
    source, features = open_images(damaged), (Feature(), Feature(0, "2x2"))
    found = embeddings(encoder, source, features, EncoderPass(batch_size, workers))
    expected = embeddings(encoder, source, features, EncoderPass(5, 0))
    readable = [row for row in range(25) if row not in UNREADABLE]
    assert found.rows.tolist() == readable and found.rows.dtype == np.int64
    assert found.paths == tuple(str(damaged / f"{row:02d}.png") for row in readable)
    assert list(found.unreadable.items()) == list(expected.unreadable.items())
    for name in ("final", "stage 0, 2x2"):
        assert found.vectors[name].shape[0] == 20
        assert np.allclose(found.vectors[name], expected.vectors[name], **CLOSE)


def test_number_of_reading_processes(digits):
    """By default as many as the machine has for it, and never more than there are batches."""
    source, default = open_images(digits.unlabeled), default_num_workers("cpu")
    options = {(64, None): min(default, 4), (100, 2): 2, (240, 5): 1, (64, 0): 0}
    for (batch_size, workers), expected in options.items():
        assert load_views(GRAY, 1, source, EncoderPass(batch_size, workers)).num_workers == expected


def test_batches_without_an_image_are_not_encoded(encoder, damaged):
    """Not every device can compute with an empty batch."""
    with counted_passes(encoder) as sizes:
        batches = list(embed_batches(encoder, GRAY, open_images(damaged), (Feature(0, "2x2"),), EncoderPass(1, 0)))
    assert sizes == [1] * 20 and len(batches) == 25
    assert batches[0].vectors["stage 0, 2x2"].shape == (0, 64) and batches[0].vectors["stage 0, 2x2"].dtype == np.float32


def test_unreadable_images_are_named_with_their_reason(encoder, damaged):
    found = embeddings(encoder, open_images(damaged))
    assert list(found.unreadable) == [str(damaged / f"{row:02d}.{'jpg' if row == 24 else 'png'}") for row in UNREADABLE]
    reasons = list(found.unreadable.values())
    assert reasons[0] == "not an image" and reasons[1] == "empty file" and all(reasons)
    for row, vector in zip(found.rows, found.vectors["final"]):
        expected = by_hand(encoder, GRAY, damaged / f"{row:02d}.png").pooled[0].numpy()
        assert np.allclose(vector, expected, **CLOSE), "vectors stay with their images"


def test_labels_by_rows(encoder, damaged):
    source = open_images(damaged).add_column("label", [row % 3 for row in range(25)])
    found = embeddings(encoder, source)
    assert np.asarray(source["label"])[found.rows].tolist() == [row % 3 for row in range(25) if row not in UNREADABLE]


def test_images_without_a_path_or_of_one_name(encoder, some_digits):
    """As in shards: each unreadable image is counted and has a name of its own."""
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
    found = embeddings(encoder, source, options=EncoderPass(2, 0))
    assert found.paths == ("row 0", "b.png") and found.rows.tolist() == [0, 3]
    assert list(found.unreadable) == ["row 1", "a.png", "a.png (2)", "a.png (3)"]
    assert np.array_equal(*found.vectors["final"])


def test_progress_counts_every_image(encoder, damaged):
    counts = []
    collect_embeddings(embed_batches(encoder, GRAY, open_images(damaged), options=EncoderPass(10, 0)), counts.append)
    assert counts == [10, 10, 5]


def test_modes_are_restored(digits):
    """The encoder is in evaluation mode during the pass and in its former mode after it; gradients stay enabled outside."""
    encoder = random_encoder().train()
    source = open_images(digits.unlabeled).select(range(12))
    expected = embeddings(random_encoder(), source).vectors["final"]
    found = []
    for batch in embed_batches(encoder, GRAY, source, options=EncoderPass(5, 0)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        found.append(batch.vectors["final"])
    assert np.allclose(np.concatenate(found), expected, **CLOSE), "without drop path"
    assert encoder.training
    encoder(torch.zeros(1, 1, 32, 32)).pooled.sum().backward()
    batches = embed_batches(encoder, GRAY, source, options=EncoderPass(5, 0))
    next(batches)
    assert not encoder.training
    batches.close()
    assert encoder.training


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_is_followed(tmp_path, interpolation):
    """Color images that are not square, squashed by another filter, to maps with odd sides."""
    encoder = random_encoder(replace(CONFIG, in_channels=3))
    preprocessing = Preprocessing((40, 24), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), interpolation, fit="squash")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 61, 75, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    features = (Feature(), Feature(1, "2x2"))
    found = embeddings(encoder, open_images(tmp_path), features, preprocessing=preprocessing)
    for row, path in enumerate(found.paths):
        output = by_hand(encoder, preprocessing, path)
        assert np.allclose(found.vectors["final"][row], output.pooled[0].numpy(), **CLOSE)
        stage = output.stages[1][0].numpy()  # 5 × 3: both quarters along an axis share its middle
        corners = itertools.product((np.s_[:3], np.s_[2:]), (np.s_[:2], np.s_[1:]))
        expected = np.stack([stage[:, rows, columns].mean(axis=(1, 2)) for rows, columns in corners], axis=1)
        assert np.allclose(found.vectors["stage 1, 2x2"][row], expected.ravel(), **CLOSE)
    cropped = embeddings(encoder, open_images(tmp_path), preprocessing=replace(preprocessing, fit="crop"))
    smaller = embeddings(encoder, open_images(tmp_path), preprocessing=replace(preprocessing, crop=0.5))
    for other in (cropped, smaller):
        assert np.abs(other.vectors["final"] - found.vectors["final"]).max() > 0.01


def test_autocast_changes_little(encoder, digits):
    source = open_images(digits.unlabeled).select(range(20))
    features = (Feature(), Feature(0, "2x2"))
    exact = embeddings(encoder, source, features).vectors
    coarse = embeddings(encoder, source, features, EncoderPass(workers=0, autocast=torch.bfloat16)).vectors
    for name in exact:
        assert coarse[name].dtype == np.float32
        assert 1e-4 < np.abs(coarse[name] - exact[name]).max() < 0.1


def test_features_of_small_maps():
    """The quarters of a single token would be equal, so there is no such feature."""
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
            embeddings(encoder, **{"source": source, **settings})
    with pytest.raises(ValueError, match="unknown pooling 'max': give one of mean, 2x2"):
        Feature(0, "max")
    with pytest.raises(ValueError, match="batch_size is 0: give 1 or more"):
        EncoderPass(0)
    with pytest.raises(ValueError, match="workers is -1: give 0"):
        EncoderPass(workers=-1)
    for stage in (-1, 1.0, "last"):
        with pytest.raises(ValueError, match=f"stage is {stage!r}: give a number from 0, or None"):
            Feature(stage)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=r"none of 2 images can be read; the first, .+/a.png: not an image"):
        embeddings(encoder, open_images(tmp_path))


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_is_read_by_other_libraries(saved, damaged, tmp_path):
    out = tmp_path / "new" / "vectors.parquet"
    result = write_embeddings(saved, damaged, out, stage=1, pooling="2x2", options=EncoderPass(6, 2))
    expected = embeddings(saved.encoder, open_images(damaged), (Feature(1, "2x2"),))
    vectors = expected.vectors["stage 1, 2x2"]
    assert (result.count, result.dim, result.unreadable) == (20, 128, expected.unreadable)

    table = pq.read_table(out)
    assert table.column_names == ["path", "vector"]
    assert str(table.schema.field("path").type) == "string"
    vector_type = table.schema.field("vector").type
    assert vector_type.list_size == 128 and str(vector_type.value_type) == "float"
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
        warnings.simplefilter("error")  # Arrow's memory is read-only, and torch warns about that
        assert knn_accuracy(flat, labels, flat, labels, k=1) == 1.0

    origin = json.loads(pq.read_schema(out).metadata[b"simmim"])
    assert origin["provenance"] == {"method": "SimMIM", "steps": 7}
    assert Path(origin["encoder"]).is_dir() or Path(origin["encoder"]).is_file()
    assert origin["architecture"]["family"] == "swinv2" and origin["architecture"]["embed_dim"] == 16
    assert (origin["stage"], origin["pooling"]) == (1, "2x2")
    assert origin["preprocessing"]["image_size"] == [32, 32] and origin["preprocessing"]["mean"] == [0.13]


def test_images_by_path_or_opened(saved, digits, some_digits, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text("\n".join(some_digits))
    tables = []
    for number, images in enumerate((str(listed), [str(listed)], open_images(str(listed)))):
        write_embeddings(saved, images, tmp_path / f"{number}.parquet", options=HERE)
        tables.append(pq.read_table(tmp_path / f"{number}.parquet"))
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    assert tables[0]["path"].to_pylist() == some_digits and tables[0].schema.field("vector").type.list_size == 32


def test_row_groups_are_written_as_they_come(saved, digits, tmp_path, monkeypatch):
    """Groups of 50 vectors of 32 values are written after each third batch of 20 images, not at the end."""
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 50 * 32 * 4)
    written, write = [], pq.ParquetWriter.write_table

    def recorded(writer, table, **options):
        written.append((len(passes), len(table)))
        write(writer, table, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", recorded)
    with counted_passes(saved.encoder) as passes:
        result = write_embeddings(saved, digits.unlabeled, tmp_path / "v.parquet", options=EncoderPass(20, 0))
    assert written == [(3, 60), (6, 60), (9, 60), (12, 60)] and result.count == 240
    metadata = pq.ParquetFile(tmp_path / "v.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [60] * 4
    vectors = np.stack(pandas.read_parquet(tmp_path / "v.parquet")["vector"])
    expected = embeddings(saved.encoder, open_images(digits.unlabeled)).vectors["final"]
    assert np.allclose(vectors, expected, **CLOSE)


def test_the_file_is_written_whole_or_not_at_all(saved, digits, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "v.parquet"
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"none of 1 image can be read; the first, .+a\.png: not an image"):
        write_embeddings(saved, str(tmp_path / "a.png"), out, options=HERE)
    for settings in ({"stage": 5}, {"pooling": "max"}):
        with pytest.raises(ValueError, match=r"stage is 5|unknown pooling"):
            write_embeddings(saved, digits.unlabeled, out, **{"options": HERE, **settings})
    calls = []

    def fail_at_third(encoder, images):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    hook = saved.encoder.register_forward_pre_hook(fail_at_third)
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        write_embeddings(saved, digits.unlabeled, out, options=EncoderPass(20, 0))
    hook.remove()
    assert list(folder.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"v\.parquet' exists: give a new file"):
        write_embeddings(saved, digits.unlabeled, out, options=HERE)
    assert out.read_text() == "mine" and [path.name for path in folder.iterdir()] == ["v.parquet"]
