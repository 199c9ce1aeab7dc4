"""The pipelines that benchmarks/loading.py compares, and the photographs that they load."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import random
from pathlib import Path

SIDE_PX = 192
HEAP_EVERY = 32  # samples
MALLOC_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


def photographs(folder: Path, size: tuple[int, int], count: int, content: str = "tiled") -> list[str]:
    """Write `count` JPEGs of `size` (height, width), quality 90, of two real photographs of 640×427 px; return their paths.

    The time of a JPEG's decoding depends on its pixels and on its bits, and coarse decoding saves the first part only. Files
    of cameras lie between two kinds of content. "tiled" continues the photographs by mirrored copies and has the detail of a
    reduced image in every pixel (1.4 to 2.9 bits). "resized" resizes each photograph and has little detail where this
    enlarges it.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    folder = folder / f"{content}-{size[1]}x{size[0]}"
    paths = [folder / f"{number}.jpg" for number in range(count)]
    if folder.is_dir():
        return list(map(str, paths))
    folder.mkdir(parents=True)
    height, width = size
    for number, path in enumerate(paths):
        photo = load_sample_image(("china.jpg", "flower.jpg")[number % 2])
        if content == "resized":
            box = (4 * number, 0, 4 * number + 427 * 4 // 3, 427)  # 4:3, as all sizes
            image = Image.fromarray(photo).resize((width, height), Image.Resampling.BICUBIC, box=box)
        else:
            mirrored = np.concatenate([photo, photo[:, ::-1]], axis=1)
            mirrored = np.roll(np.concatenate([mirrored, mirrored[::-1]]), 37 * number, axis=(0, 1))
            tiles = -(-height // mirrored.shape[0]), -(-width // mirrored.shape[1]), 1
            image = Image.fromarray(np.tile(mirrored, tiles)[:height, :width])
        image.save(path, quality=90)
    return list(map(str, paths))


def undecoded(paths: list[str]):
    """A data set of paths, as the toolkit's sources return it."""
    import datasets

    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))


class UsualPipeline:
    """The usual pipeline of an ImageFolder: decode in full, to RGB, random resized crop, flip, to float, normalize.

    Written after torchvision's default loader and its transforms RandomResizedCrop, RandomHorizontalFlip, ToTensor and
    Normalize on PIL images, operation by operation. Crops are drawn from SimMIM's range, as ours are.
    """

    def __init__(self, paths: list[str]) -> None:
        from simmim.data import RandomView
        from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD  # version 0.1 has none, whose samples are loaded too

        self.paths, self.view, self.colors = paths, RandomView((SIDE_PX, SIDE_PX)), (IMAGENET_MEAN, IMAGENET_STD)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        import numpy as np
        import torch
        from PIL import Image

        with open(self.paths[index % len(self.paths)], "rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, right, bottom = self.view.crop_box(image.size[::-1], random)
        image = image.crop((left, top, right, bottom)).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.colors)
        return pixels.to(torch.float32).div(255).sub_(mean).div_(std)


def toolkit_samples(paths: list[str], cache: Path | None = None):
    """The toolkit's samples of `paths`: uint8, cropped and flipped, by (epoch, index).

    Args:
        cache: folder in which images are kept shrunk; None keeps none.
    """
    from simmim.data import ImageSamples, RandomView

    view = RandomView((SIDE_PX, SIDE_PX))
    if not cache:
        return ImageSamples(undecoded(paths), view, channels=3, seed=0)
    from simmim.data.kept_pictures import KeptPictures

    kept = KeptPictures([view], (3,), 10**11, cache)
    return ImageSamples(undecoded(paths), view, channels=3, seed=0, kept=kept)


class FirstEpoch:
    """Samples whose images are not kept yet, as all are in a first epoch. They are few, so that each pass over them has a
    folder of its own. Its subfolders are made before, as a large collection has them after a few hundred images.

    Nothing is removed before the end: for minutes ext4 avoids the inodes of removed files, and finding others takes time.
    """

    def __init__(self, paths: list[str], folder: Path) -> None:
        self.samples, self.root, self.numbers = toolkit_samples(paths, folder / "first"), folder / "first", itertools.count()
        self.folders: list[Path] = []
        self.prepare(1)

    def prepare(self, count: int) -> None:
        """Make the folders for `count` more samples."""
        kept = self.samples.kept
        self.folders = []
        for _ in range(math.ceil(count / len(self.samples))):
            kept.folder = self.root / f"{next(self.numbers)}"
            for row in self.samples.source:
                Path(kept.entry(row["image"], [])).parent.mkdir(parents=True, exist_ok=True)
            self.folders.append(kept.folder)

    def __call__(self, epoch: int, index: int) -> object:
        if index % len(self.samples) == 0:
            self.samples.kept.folder = self.folders.pop()
        return self.samples[epoch, index % len(self.samples)]


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def heap_mib() -> dict[str, float]:
    """What the C library's heap holds of this process: blocks that are in use, and freed ones that it keeps. Empty without a
    glibc of 2.33 or later."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return {}
    library.mallinfo2.restype = MallocInfo
    info = library.mallinfo2()
    return {"in use": (info.uordblks + info.hblkhd) / 2**20, "freed and kept": info.fordblks / 2**20}


class SamplesWithHeap:
    """Samples that tell of the process that loaded them what its heap holds, one in `HEAP_EVERY`, as `row`."""

    def __init__(self, samples) -> None:
        self.samples, self.num_loaded = samples, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        sample = self.samples[key]
        self.num_loaded += 1
        return sample | {"row": None if self.num_loaded % HEAP_EVERY else (os.getpid(), heap_mib())}
