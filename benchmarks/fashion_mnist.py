"""Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747), 70,000 gray garments of 28 px, as files that this toolkit reads.

    python benchmarks/fashion_mnist.py --out data/fashion-mnist

reads the four .gz files of the data set, by default from Debian's package dataset-fashion-mnist, and writes

    OUT/unlabeled/    the 60,000 training images as one Parquet file, for simmim pretrain
    OUT/labeled/      a saved datasets folder, parts train and test with the classes' names, for simmim finetune

Settings are chosen with `--development`. Its test part is taken from the training images, so the test images stay unseen.
"""

from __future__ import annotations

import argparse
import gzip
import io
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PARTS = {"train": "train", "test": "t10k"}
SIDE_PX = 28
# By the label's number, as the data set's authors name them.
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
UNSIGNED_BYTES = 0x08  # idx's code for the type of its numbers


def main(arguments: list[str] | None = None) -> int:
    """Write both sets. Exit code 2 if the files cannot be read or OUT exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--source", type=Path, default=DEBIAN, help=f"folder with the .gz files; by default {DEBIAN}")
    parser.add_argument("--test", type=int, default=10_000, help="images of the test part, the same number per class")
    parser.add_argument(
        "--development", action="store_true", help="take the test part from the training images, to choose settings with"
    )
    options = parser.parse_args(arguments)
    try:
        counts = write_fashion_mnist(options.source, options.out, options.test, options.development)
    except ValueError as error:
        print(f"fashion_mnist: {error}", file=sys.stderr)
        return 2
    for place, count in counts.items():
        print(f"{options.out / place}: {count:,} images")
    return 0


def write_fashion_mnist(source: Path, out: Path, test: int = 10_000, development: bool = False) -> dict[str, int]:
    """Write OUT/unlabeled and OUT/labeled, both or neither.

    Args:
        test: number of images in the test part, the first of each class in the order of the files.
        development: take the test part from the training images and leave these out of the labeled train part. The
            unlabeled images are all 60,000 in either case.

    Returns:
        Number of images in each folder.

    Raises:
        ValueError: when a file is missing or has other content, `out` exists, or `test` is no multiple of the number of
            classes.
    """
    parts = {}
    for part, name in PARTS.items():
        images = read_idx(source / f"{name}-images-idx3-ubyte.gz", dimensions=3)
        labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz", dimensions=1)
        if images.shape != (len(labels), SIDE_PX, SIDE_PX) or labels.max(initial=0) >= len(CLASSES):
            raise ValueError(
                f"{source} has {part} images of shape {images.shape} with {len(labels)} labels from 0 to "
                f"{labels.max(initial=0)}: expected {SIDE_PX} × {SIDE_PX} px, one label per image, {len(CLASSES)} classes"
            )
        parts[part] = images, labels
    if out.exists():
        raise ValueError(f"{out} exists: give another --out, or delete it")
    train, train_labels = parts["train"]
    test_images, test_labels = parts["train" if development else "test"]
    held_out = first_of_each_class(test_labels, test)
    rows = np.setdiff1d(np.arange(len(train)), held_out) if development else np.arange(len(train))

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        write_unlabeled(Path(folder) / "unlabeled", train)
        write_labeled(
            Path(folder) / "labeled",
            {"train": (train[rows], train_labels[rows]), "test": (test_images[held_out], test_labels[held_out])},
        )
        # The parts are moved and the folder is not renamed, because TemporaryDirectory expects it at its exit.
        out.mkdir()
        for place in ("unlabeled", "labeled"):
            shutil.move(Path(folder) / place, out / place)
    return {"unlabeled": len(train), "labeled/train": len(rows), "labeled/test": len(held_out)}


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    The format is two zero bytes, a type, the number of dimensions, each dimension as a big-endian 32-bit number, and the
    values.

    Raises:
        ValueError: when the file does not exist or has other content.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist: give the folder of Fashion-MNIST's four .gz files by --source, or install Debian's "
            "package dataset-fashion-mnist"
        ) from None
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    header = 4 + 4 * dimensions
    shape = tuple(int(side) for side in np.frombuffer(content[4:header], ">u4")) if len(content) >= header else ()
    if content[:4] != bytes((0, 0, UNSIGNED_BYTES, dimensions)) or len(content) != header + math.prod(shape):
        raise ValueError(f"{file} is no complete idx file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """The first rows of each class, the same number per class and `count` in total, in ascending order.

    Raises:
        ValueError: when `count` is no multiple of the number of classes, or a class has too few rows.
    """
    per_class, rest = divmod(count, len(CLASSES))
    fewest = int(np.bincount(labels, minlength=len(CLASSES)).min())
    if rest or not 1 <= per_class <= fewest:
        raise ValueError(f"--test is {count}: give a multiple of {len(CLASSES)}, {fewest * len(CLASSES)} at most")
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]))


def write_unlabeled(folder: Path, images: np.ndarray) -> None:
    """Write (N, height, width) uint8 as one Parquet file with a column `image` of PNG bytes."""
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    folder.mkdir()
    datasets.Dataset.from_dict({"image": encode(images)}, features).to_parquet(folder / "images.parquet")


def write_labeled(folder: Path, parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write images and labels by part, as a saved `datasets.DatasetDict` with columns `image` and `label`."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    saved = {
        part: datasets.Dataset.from_dict({"image": encode(images), "label": labels.tolist()}, features)
        for part, (images, labels) in parts.items()
    }
    datasets.DatasetDict(saved).save_to_disk(folder)


def encode(images: np.ndarray) -> list[dict]:
    """Each image as PNG bytes, in the form of `datasets.Image`."""
    from PIL import Image

    rows = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    return rows


if __name__ == "__main__":
    sys.exit(main())
