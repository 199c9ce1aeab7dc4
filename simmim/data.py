"""Images from a folder to batches: find, decode, view, order.

Everything random about a sample (its place in the order, its crop, flip and mask) follows from (seed, epoch, index) and
from nothing else, so that batches do not depend on the number of workers or devices, and a resumed run goes on as if it
had never stopped. Images leave here as uint8; normalising is the device's work.
"""
from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    import datasets

Size = tuple[int, int]

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALIDATION_NAMES = ("val", "valid", "validation", "test")
# What reading an image can raise when the file is at fault. Pillow signals broken files by SyntaxError and ValueError
# too, and decompression bombs by an exception of its own.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
REPLACEMENTS_TRIED = 32


# --- Sources -----------------------------------------------------------------------------------------------------------


def find_images(folder: str | Path) -> list[str]:
    """Paths of all images below `folder`, sorted; nested folders and symbolic links are followed, each folder once.

    Raises:
        ValueError: when there is no such folder, it is empty, or it holds no file with an image's extension.
    """
    if not str(folder):
        raise ValueError("image folder '' is no folder: give a folder that holds images")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"image folder {str(folder)!r} {what}: give a folder that holds images")
    found, others, seen, waiting = [], 0, set(), [str(folder)]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    found.append(entry.path)
                else:
                    others += 1
    if not found:
        kinds = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
        what = f"holds {others} file{'s' * (others != 1)} but no image" if others else "is empty"
        raise ValueError(f"image folder {str(folder)!r} {what}: give one with images ({kinds}), nested as you like")
    return sorted(found)


def image_dataset(paths: Sequence[str], labels: Sequence[int] | None = None) -> datasets.Dataset:
    """Paths as a `datasets.Dataset` with a column `image`, undecoded, and a column `label` where there are labels."""
    import datasets

    columns = {"image": list(paths)} | ({"label": list(labels)} if labels is not None else {})
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


@dataclass(frozen=True)
class LabeledImages:
    """Class folders read: paths and class indices for training and validation, and the classes' names."""

    train: datasets.Dataset
    validation: datasets.Dataset
    classes: tuple[str, ...]


def labeled_images(folder: str | Path, labels_per_class: int | None, seed: int) -> LabeledImages:
    """Images in class folders: `folder/CLASS/…`, or `folder/train/CLASS/…` beside `folder/val/CLASS/…` (or `test`).

    Without a validation folder a fifth of each class, drawn by `seed`, is held out before any label is chosen.

    Args:
        labels_per_class: keep so many training images of each class, drawn by `seed`; None keeps all.

    Raises:
        ValueError: when there are fewer than two classes, the two folders' classes differ, or a class has fewer training
            images than asked for.
    """
    folder = Path(folder).expanduser()
    validation_folder = next((folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()), None)
    split = (folder / "train").is_dir() and validation_folder is not None
    train = class_folders(folder / "train" if split else folder)
    generator = random.Random(f"labels/{seed}")
    if split:
        validation = class_folders(validation_folder)
        if train.keys() != validation.keys():
            raise ValueError(
                f"classes differ between {folder / 'train'} and {validation_folder}: only in one of them: "
                f"{', '.join(sorted(train.keys() ^ validation.keys()))}"
            )
    else:
        validation = {}
        for name, paths in train.items():
            if len(paths) < 2:
                raise ValueError(f"class {name!r} has 1 image: give at least 2, one to train on and one to validate with")
            held_out = set(generator.sample(paths, max(1, len(paths) // 5)))
            validation[name] = sorted(held_out)
            train[name] = [path for path in paths if path not in held_out]
    if labels_per_class is not None:
        for name, paths in train.items():
            if not 1 <= labels_per_class <= len(paths):
                raise ValueError(
                    f"{labels_per_class} labels per class asked for, class {name!r} has {len(paths)} training images: "
                    f"give 1 to {min(map(len, train.values()))}"
                )
            train[name] = sorted(generator.sample(paths, labels_per_class))
    classes = tuple(train)
    return LabeledImages(*(with_labels(part, classes) for part in (train, validation)), classes)


def class_folders(folder: Path) -> dict[str, list[str]]:
    """Class name to image paths, one class a subfolder, in the names' order.

    Raises:
        ValueError: when there is no such folder, there are fewer than two classes, or one has no image.
    """
    if not folder.is_dir():
        raise ValueError(f"labeled folder {str(folder)!r} does not exist: give a folder with one subfolder a class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise ValueError(
            f"labeled folder {str(folder)!r} has {len(names)} class folder{'s' * (len(names) != 1)}: "
            "give at least two, each with the images of one class"
        )
    return {name: find_images(folder / name) for name in names}


def with_labels(paths_of: dict[str, list[str]], classes: tuple[str, ...]) -> datasets.Dataset:
    """The classes' paths in one dataset, labelled by their place in `classes`."""
    paths = [path for name in classes for path in paths_of[name]]
    labels = [label for label, name in enumerate(classes) for _ in paths_of[name]]
    return image_dataset(paths, labels)


# --- Decoding ----------------------------------------------------------------------------------------------------------


def read_image(record: dict, channels: int) -> Image.Image:
    """Decode one row's image, upright, in mode L (`channels` 1) or RGB (3).

    Transparency is laid over white; 16-bit, 32-bit and float images are scaled by their own range.

    Raises:
        One of `UNREADABLE` when the file is broken, missing or no image.
    """
    if record["bytes"] is None and not os.path.getsize(record["path"]):
        raise ValueError("empty file")
    with Image.open(record["path"] if record["bytes"] is None else _bytes_file(record["bytes"])) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = np.nanmin(values), np.nanmax(values)
        image = Image.fromarray(np.nan_to_num((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _bytes_file(data: bytes):
    import io

    return io.BytesIO(data)


@dataclass(frozen=True)
class Survey:
    """What a sample of a source's images looks like.

    Attributes:
        short_side_px: median of the images' shorter sides.
        channels: 1 where every sampled image is gray, else 3.
        decoded_mib: estimated size of all images decoded.
        mean, std: per channel, of values in [0, 1].
    """

    short_side_px: int
    channels: int
    decoded_mib: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def survey(source: datasets.Dataset, channels: int | None = None, sampled: int = 256) -> Survey:
    """Look at up to `sampled` images, evenly spread.

    Raises:
        ValueError: when none of them can be read, with the first one's reason.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, min(sampled, len(source))).round().astype(int))
    images, first_error = [], None
    for row in rows:
        record = source[int(row)]["image"]
        try:
            with Image.open(record["path"] if record["bytes"] is None else _bytes_file(record["bytes"])) as image:
                gray = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;")
            images.append((read_image(record, 3), gray))
        except UNREADABLE as error:
            first_error = first_error or f"{record['path']}: {reason(error)}"
    if not images:
        raise ValueError(f"none of {len(rows)} sampled images can be read; the first, {first_error}")
    channels = channels or (1 if all(gray for _, gray in images) else 3)
    thumbnails = []
    for image, _ in images:
        small = image.convert("L" if channels == 1 else "RGB")
        small.thumbnail((64, 64))
        thumbnails.append(np.asarray(small, dtype=np.float64).reshape(-1, channels) / 255)
    pixels = np.concatenate(thumbnails)
    areas = [image.width * image.height for image, _ in images]
    return Survey(
        short_side_px=int(np.median([min(image.size) for image, _ in images])),
        channels=channels,
        decoded_mib=float(np.mean(areas)) * channels * len(source) / 2**20,
        mean=tuple(round(float(value), 3) for value in pixels.mean(axis=0)),
        std=tuple(round(max(float(value), 0.01), 3) for value in pixels.std(axis=0)),
    )


def reason(error: Exception) -> str:
    """Why an image was not read, in one line."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text or type(error).__name__


# --- Views -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomView:
    """Random resized crop and flip.

    Args:
        size: (height, width) of the result in pixels.
        crop_scale: range of the crop's share of the image's area.
        crop_ratio: range of the crop's width over height, drawn on a log scale.
        flip: probability of mirroring left and right.
    """

    size: Size
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, image: Image.Image, generator: random.Random) -> Image.Image:
        """A view of `image`, drawn from `generator`."""
        box = self.crop_box(image.size, generator)
        mirrored = generator.random() < self.flip
        view = image.resize(self.size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        return ImageOps.mirror(view) if mirrored else view

    def crop_box(self, image_size: Size, generator: random.Random) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the crop in an image of (width, height); after ten misses the largest centred
        crop that the ratios allow, as is usual."""
        width, height = image_size
        for _ in range(10):
            area = width * height * generator.uniform(*self.crop_scale)
            ratio = math.exp(generator.uniform(*map(math.log, self.crop_ratio)))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left, top = generator.randint(0, width - crop_width), generator.randint(0, height - crop_height)
                return left, top, left + crop_width, top + crop_height
        ratio = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + max(crop_width, 1), top + max(crop_height, 1)


@dataclass(frozen=True)
class CentreView:
    """The view for evaluation: the central crop of the target's shape.

    Args:
        size: (height, width) of the result in pixels.
        share: share of the largest possible crop's sides that is kept; 0.875 is usual for photographs.
    """

    size: Size
    share: float = 1.0

    def __call__(self, image: Image.Image, generator: random.Random | None = None) -> Image.Image:
        """The central view of `image`; draws nothing."""
        height, width = self.size
        scale = min(image.width / width, image.height / height) * self.share
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def as_tensor(image: Image.Image) -> Tensor:
    """(channels, height, width) uint8."""
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, channels, height, width) uint8 to float, zero mean and unit deviation by the given statistics of [0, 1]."""
    mean, std = (images.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean) / std


# --- Samples and their order -------------------------------------------------------------------------------------------


class ImageSamples(Dataset):
    """Samples by (epoch, index), each a function of that and the seed.

    A sample is a dict: `image` uint8 (channels, height, width); `seed`, for whatever else is random about it; `label`
    where the source has labels; `skipped`, the (path, reason) of unreadable images that it replaces.

    Args:
        view: `RandomView` or `CentreView`.
        keep_decoded: hold decoded images in memory; for sets that fit.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        view: Callable[[Image.Image, random.Random], Image.Image],
        channels: int,
        seed: int,
        keep_decoded: bool = False,
    ) -> None:
        self.source, self.view, self.channels, self.seed = source, view, channels, seed
        self.labelled = "label" in source.column_names
        self.kept: dict[int, tuple[Image.Image, int | None]] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        generator = random.Random(f"{self.seed}/{epoch}/{index}")
        skipped = []
        for _ in range(REPLACEMENTS_TRIED):
            try:
                image, label = self.decoded(index)
                break
            except UNREADABLE as error:
                skipped.append((self.source[index]["image"]["path"], reason(error)))
                index = generator.randrange(len(self.source))
        else:
            raise ValueError(
                f"{REPLACEMENTS_TRIED} images in a row could not be read, the last {skipped[-1][0]}: {skipped[-1][1]}"
            )
        sample = {"image": as_tensor(self.view(image, generator)), "seed": generator.getrandbits(62), "skipped": skipped}
        return sample | ({"label": label} if self.labelled else {})

    def decoded(self, index: int) -> tuple[Image.Image, int | None]:
        """The image at `index`, decoded, and its label."""
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        row = self.source[index]
        result = read_image(row["image"], self.channels), row.get("label")
        if self.kept is not None:
            self.kept[index] = result
        return result


class SampleStream(Sampler):
    """Endless batches of (epoch, index): the epochs' shuffles one after another, cut into global batches.

    Every epoch holds every sample exactly once, whatever the batch size; a batch may end one epoch and begin the next.
    Rank r of a world takes the r-th part of each global batch, so that the same global batch meets the same samples on
    any number of devices.

    Args:
        count: samples in an epoch.
        batch_size: samples a batch of this rank.
        start: batches already taken, by which a resumed run begins.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        batch = self.start
        while True:
            first = (batch * self.world + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
                keys.append((epoch, int(order[position % self.count])))
            yield keys
            batch += 1


class InOrder(Sampler):
    """Batches of (0, index) in order, every sample once, the last batch as short as it comes out."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices, self.batch_size = range(rank, count, world), batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)


def collate(samples: list[dict]) -> dict:
    """Samples to a batch: images and labels stacked, seeds and skipped files as lists."""
    batch = {
        "image": torch.stack([sample["image"] for sample in samples]),
        "seed": [sample["seed"] for sample in samples],
        "skipped": [entry for sample in samples for entry in sample["skipped"]],
    }
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def batches(samples: ImageSamples, order: Sampler, workers: int) -> DataLoader:
    """A loader over `samples` in `order`, with `workers` processes, pinned where there is a GPU."""
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(device: str) -> int:
    """Loading processes for this machine: all cores but one feed a GPU, up to 16; on a CPU, training needs them."""
    return max(1, min(cores() - 1, 16)) if device != "cpu" else min(max(cores() // 4, 1), 4)
