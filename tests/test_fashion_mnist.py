"""benchmarks/fashion_mnist.py, from idx files to the files that pre-training and fine-tuning read."""

import gzip
import io
import struct

import fashion_mnist
import numpy as np
import pytest
from image_files import write_idx_files
from PIL import Image

from simmim.data import open_images
from simmim.data.decode import open_picture
from simmim.data.labels import read_labeled_images

PER_CLASS = {"train": 6, "t10k": 3}  # images per class


@pytest.fixture
def source(tmp_path):
    """The data set's four files, small: random pixels, labels in turn."""
    folder = tmp_path / "source"
    write_idx_files(folder, {name: random_images(name, per_class) for name, per_class in PER_CLASS.items()})
    return folder


def random_images(name, per_class):
    images = np.random.default_rng(per_class).integers(0, 256, (10 * per_class, 28, 28), np.uint8)
    return images, np.arange(10 * per_class, dtype=np.uint8) % 10


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def by_class(part, classes):
    """Every image of a labeled part as bytes, by class name."""
    images = {}
    for row in part:
        images.setdefault(classes[row["label"]], []).append(pixels(row).tobytes())
    return images


def test_images_and_classes_come_through_exactly(source, tmp_path):
    out = tmp_path / "fm"
    assert fashion_mnist.main(["--out", str(out), "--source", str(source), "--test", "20"]) == 0
    images, labels = random_images("train", 6)
    unlabeled = open_images(str(out / "unlabeled"))
    assert [pixels(row).tobytes() for row in unlabeled] == [image.tobytes() for image in images]
    picture = open_picture(unlabeled[0]["image"], channels=1)
    assert picture.size == (28, 28)

    read = read_labeled_images(str(out / "labeled"), None, seed=0)
    assert set(read.classes) == set(fashion_mnist.CLASSES)
    tested, tested_labels = random_images("t10k", 3)
    for part, pictures, numbers, each in ((read.train, images, labels, 6), (read.validation, tested, tested_labels, 2)):
        images_by_class = by_class(part, read.classes)
        for number, name in enumerate(fashion_mnist.CLASSES):
            assert sorted(images_by_class[name]) == sorted(image.tobytes() for image in pictures[numbers == number][:each])


def test_development_never_shows_a_test_image(source, tmp_path):
    out = tmp_path / "fm"
    counts = fashion_mnist.write_fashion_mnist(source, out, test=20, development=True)
    assert counts == {"unlabeled": 60, "labeled/train": 40, "labeled/test": 20}
    read = read_labeled_images(str(out / "labeled"), None, seed=0)
    train, held_out = ({pixels(row).tobytes() for row in part} for part in (read.train, read.validation))
    assert train | held_out == {image.tobytes() for image in random_images("train", 6)[0]}
    assert not train & held_out


@pytest.mark.parametrize("test", [0, 15, 40])
def test_wrong_size_of_the_test_part(source, tmp_path, capsys, test):
    assert fashion_mnist.main(["--out", str(tmp_path / "fm"), "--source", str(source), "--test", str(test)]) == 2
    assert capsys.readouterr().err == f"fashion_mnist: --test is {test}: give a multiple of 10, 30 at most\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_missing_torn_or_other_files(source, tmp_path, capsys):
    words = ["--out", str(tmp_path / "fm"), "--source", str(source), "--test", "20"]
    file = source / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for content, complaint in (
        (whole[:-9], "cannot be read"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "no complete idx file"),
        (gzip.compress(b"\0\0\x08"), "no complete idx file"),
        (gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 2) + b"\0\1"), "expected 28 × 28 px, one label per image"),
    ):
        file.write_bytes(content)
        assert fashion_mnist.main(words) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
    file.unlink()
    assert fashion_mnist.main(words) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_existing_folder_stays(source, tmp_path, capsys):
    assert fashion_mnist.main(["--out", str(source), "--source", str(source), "--test", "20"]) == 2
    assert "exists" in capsys.readouterr().err
    assert len(list(source.iterdir())) == 4
