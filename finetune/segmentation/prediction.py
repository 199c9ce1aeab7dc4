"""Masks predicted by a fine-tuned segmenter for a folder of images, as PNG files, and overlays to look at."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from simmim.data import UNREADABLE, describe_error, open_images, open_picture
from simmim.data.label_maps import CLASSES_FILE, ClassScheme
from simmim.files import atomic_write
from simmim.finetune.segmentation.model import SavedSegmenter, load_segmenter
from simmim.finetune.segmentation.overlays import as_color, overlay, palette
from simmim.finetune.segmentation.sliding import Size, best_class
from simmim.finetune.segmentation.views import whole_picture
from simmim.training.trainer import device_type

MASKS, OVERLAYS = "masks", "overlays"
BATCH_PIXELS = 2**22  # of the images of one batch at the model's scale


@dataclass(frozen=True)
class Segmented:
    """What was done.

    Attributes:
        count: images whose masks were written.
        unreadable: the reason of each image that could not be read, by path.
        pixels: of each class, over all masks.
    """

    count: int
    unreadable: dict[str, str]
    pixels: dict[str, int]


class Read(NamedTuple):
    """One image to segment: its name in the output, its pixels at the model's scale, (height, width) of the file's."""

    name: str
    pixels: Tensor
    size: Size


def segment(run: str | Path, images: str | Path, out: str | Path, batch_size: int = 16, overlays: bool = True) -> Segmented:
    """Write a mask for every image below `images`: OUT/masks/NAME.png, of the image's size and upright, a palette PNG whose
    values are those of the training masks; OUT/overlays/NAME.png, the mask's colors over the image; OUT/classes.txt.

    Args:
        run: a run of `simmim finetune segmentation`, or its folder encoder/.
        images: a folder, or any other source of images that pre-training takes; names are those in the folder.
        out: folder to make; must not exist yet, or be empty.
        batch_size: images of one size at a time, fewer of large ones.
        overlays: write them too.

    Raises:
        ValueError: when `run` is no segmenter, there are no images, none can be read, or `out` is not empty.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists: give a new folder")
    saved = load_segmenter(run)
    device = device_type()
    saved.model.to(device)
    source = open_images(images)
    names = output_names([source[row]["image"]["path"] for row in range(len(source))], Path(images))
    unreadable: dict[str, str] = {}
    counts = np.zeros(len(saved.scheme.classes), dtype=np.int64)
    done = 0
    with saved.model.encoder.position_bias_kept():
        for batch in batches_of_one_size(read_all(source, names, saved, unreadable), batch_size):
            pixels = torch.stack([one.pixels for one in batch]).to(device)
            for logits, one in zip(saved.logits(pixels).split(1), batch):
                mask = best_class(logits, one.size)[0].cpu().numpy()
                counts += np.bincount(mask.ravel(), minlength=len(counts))
                write_mask(out / MASKS / f"{one.name}.png", mask, saved.scheme)
                if overlays:
                    write_overlay(out / OVERLAYS / f"{one.name}.png", one.pixels, mask, len(counts))
            done += len(batch)
    if not done:
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(unreadable)} images can be read; the first, {path}: {why}")
    with atomic_write(out / CLASSES_FILE) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in saved.scheme.classes), encoding="utf-8")
    return Segmented(done, unreadable, dict(zip(saved.scheme.classes, counts.tolist())))


def read_all(source, names: list[str], saved: SavedSegmenter, unreadable: dict[str, str]) -> Iterator[Read]:
    """Every image that can be read, in order; the others go to `unreadable`."""
    channels = saved.model.encoder.config.in_channels
    for row in tqdm(range(len(source)), desc="predicting", unit="image"):
        record = source[row]["image"]
        try:
            picture = open_picture(record, channels)
            pixels = whole_picture(picture, saved.short_side)
        except UNREADABLE as error:
            unreadable[record["path"] or f"row {row}"] = describe_error(error)
            continue
        yield Read(names[row], pixels, picture.size)


def batches_of_one_size(images: Iterator[Read], batch_size: int) -> Iterator[list[Read]]:
    """Neighbors that are of one size at the model's scale, so many at a time, fewer where they are large."""
    waiting: list[Read] = []
    for one in images:
        full = len(waiting) >= min(batch_size, max(1, BATCH_PIXELS // one.pixels[0].numel()))
        if waiting and (full or waiting[0].pixels.shape != one.pixels.shape):
            yield waiting
            waiting = []
        waiting.append(one)
    if waiting:
        yield waiting


def output_names(paths: list[str | None], images: Path) -> list[str]:
    """A name for each image's mask, without an ending: its path in the folder `images`, else its file's name, else its
    number; with its own ending where two differ by that alone, and a number where names are the same."""
    inside = images.expanduser().is_dir()
    root = os.path.abspath(images.expanduser())
    plain = []
    for row, path in enumerate(paths):
        if path is None:
            plain.append(f"{row:06d}")
        elif inside and os.path.abspath(path).startswith(root + os.sep):
            plain.append(os.path.relpath(os.path.abspath(path), root))
        else:
            plain.append(os.path.basename(path))
    stems = [os.path.splitext(name)[0] for name in plain]
    once = {stem for stem, count in Counter(stems).items() if count == 1}
    names, taken = [], set()
    for row, (name, stem) in enumerate(zip(plain, stems)):
        wanted = stem if stem in once else name
        while wanted in taken:
            wanted = f"{wanted}-{row:06d}"
        taken.add(wanted)
        names.append(wanted)
    return names


def write_mask(file: Path, mask: np.ndarray, scheme: ClassScheme) -> None:
    """A mask of classes' numbers with the values of the training masks: a palette PNG, or 16-bit gray where a value is above
    255; whole or not at all."""
    values = np.array(scheme.values)[mask]
    if max(scheme.values) > 255:
        write_image(file, Image.fromarray(values.astype(np.uint16)))
        return
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[list(scheme.values)] = palette(len(scheme.classes))
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette(colors.tobytes())
    write_image(file, image)


def write_overlay(file: Path, pixels: Tensor, mask: np.ndarray, classes: int) -> None:
    """The mask's colors over the image as the model saw it, at the mask's size."""
    image = Image.fromarray(as_color(pixels)).resize(mask.shape[::-1], Image.Resampling.BILINEAR)
    write_image(file, Image.fromarray(overlay(np.array(image), mask, palette(classes))))


def write_image(file: Path, image: Image.Image) -> None:
    """A PNG, whole or not at all."""
    data = io.BytesIO()
    image.save(data, format="png")
    with atomic_write(file) as temporary:
        temporary.write_bytes(data.getvalue())
