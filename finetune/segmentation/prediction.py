"""Label maps predicted by a fine-tuned segmenter for a folder of images: PNG files, and overlays for viewing."""

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
from simmim.finetune.segmentation.sliding import Size, most_likely_class
from simmim.finetune.segmentation.views import whole_picture
from simmim.training.trainer import device_type

LABEL_MAPS, OVERLAYS = "masks", "overlays"  # folders; the former is called as in the training data
MAX_BATCH_PIXELS = 2**22  # of the images of one batch at the model's scale


@dataclass(frozen=True)
class SegmentedImages:
    """What was predicted.

    Attributes:
        count: number of images whose label maps were written.
        unreadable: why each image could not be read, by path.
        pixels: pixels of each class over all label maps.
    """

    count: int
    unreadable: dict[str, str]
    pixels: dict[str, int]


class InputImage(NamedTuple):
    """One image to segment.

    Attributes:
        name: name of its files in the output, without an ending.
        pixels: (channels, height, width), uint8 or float32, at the model's scale.
        size: (height, width) of the file's image.
    """

    name: str
    pixels: Tensor
    size: Size


def segment(
    run: str | Path, images: str | Path, out: str | Path, batch_size: int = 16, overlays: bool = True
) -> SegmentedImages:
    """Write a label map for every image below `images`: OUT/masks/NAME.png, upright, of the image's size, a palette PNG with
    the values of the training label maps; OUT/overlays/NAME.png, its colors over the image; OUT/classes.txt.

    Args:
        run: a run of `simmim finetune segmentation`, or its folder encoder/.
        images: a folder, or any other source of images that pre-training reads; names are those in the folder.
        out: folder to make; must not exist yet, or be empty.
        batch_size: images of one size per batch; fewer large ones.
        overlays: whether to write them too.

    Raises:
        ValueError: when `run` is no segmenter, there are no images, none can be read, or `out` is not empty.
    """
    out = check_new_folder(out)
    saved, device = load_segmenter(run), device_type()
    saved.model.to(device)
    source = open_images(images, reading=saved.preprocessing.reading_or_default)
    names = output_names([source[row]["image"]["path"] for row in range(len(source))], Path(images))
    unreadable: dict[str, str] = {}
    num_classes = len(saved.scheme.classes)
    counts, num_done = np.zeros(num_classes, dtype=np.int64), 0
    with saved.model.encoder.fixed_weights():
        for batch in batches_of_one_size(read_images(source, names, saved, unreadable), batch_size):
            pixels = torch.stack([image.pixels for image in batch]).to(device)
            for logits, image in zip(saved.logits(pixels).split(1), batch):
                label_map = most_likely_class(logits, image.size)[0].cpu().numpy()
                counts += np.bincount(label_map.ravel(), minlength=num_classes)
                write_label_map(out / LABEL_MAPS / f"{image.name}.png", label_map, saved.scheme)
                if overlays:
                    write_overlay(out / OVERLAYS / f"{image.name}.png", image.pixels, label_map, num_classes)
            num_done += len(batch)
    if not num_done:
        path, reason = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(unreadable)} images can be read; the first, {path}: {reason}")
    with atomic_write(out / CLASSES_FILE) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in saved.scheme.classes), encoding="utf-8")
    return SegmentedImages(num_done, unreadable, dict(zip(saved.scheme.classes, counts.tolist())))


def check_new_folder(out: str | Path) -> Path:
    """The folder to make.

    Raises:
        ValueError: for one that holds something.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists: give a new folder")
    return out


def read_images(source, names: list[str], saved: SavedSegmenter, unreadable: dict[str, str]) -> Iterator[InputImage]:
    """Every image that can be read, in order; why the others cannot goes to `unreadable`."""
    channels = saved.model.encoder.config.in_channels
    for row in tqdm(range(len(source)), desc="predicting", unit="image"):
        record = source[row]["image"]
        try:
            picture = open_picture(record, channels, reading=saved.preprocessing.reading_or_default)
            pixels = whole_picture(picture, saved.short_side)
        except UNREADABLE as error:
            unreadable[record["path"] or f"row {row}"] = describe_error(error)
            continue
        yield InputImage(names[row], pixels, picture.size)


def batches_of_one_size(images: Iterator[InputImage], batch_size: int) -> Iterator[list[InputImage]]:
    """Consecutive images of one size at the model's scale, `batch_size` at a time, fewer where they are large."""
    batch: list[InputImage] = []
    for image in images:
        full = len(batch) >= min(batch_size, max(1, MAX_BATCH_PIXELS // image.pixels[0].numel()))
        if batch and (full or batch[0].pixels.shape != image.pixels.shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def output_names(paths: list[str | None], images: Path) -> list[str]:
    """A unique name without an ending for each image's label map.

    It is the image's path in the folder `images`, else its file's name, else its index. Names that differ by their endings
    alone keep them, and equal names get an index.
    """
    is_folder = images.expanduser().is_dir()
    root = os.path.abspath(images.expanduser())
    file_names = []
    for row, path in enumerate(paths):
        if path is None:
            file_names.append(f"{row:06d}")
        elif is_folder and os.path.abspath(path).startswith(root + os.sep):
            file_names.append(os.path.relpath(os.path.abspath(path), root))
        else:
            file_names.append(os.path.basename(path))
    stems = [os.path.splitext(name)[0] for name in file_names]
    unique = {stem for stem, count in Counter(stems).items() if count == 1}
    names, used = [], set()
    for row, (file_name, stem) in enumerate(zip(file_names, stems)):
        name = stem if stem in unique else file_name
        while name in used:
            name = f"{name}-{row:06d}"
        used.add(name)
        names.append(name)
    return names


def write_label_map(file: Path, label_map: np.ndarray, scheme: ClassScheme) -> None:
    """Write class ids as the values of the training label maps: a palette PNG, or 16-bit gray where a value is above 255."""
    values = np.array(scheme.values)[label_map]
    if max(scheme.values) > 255:
        write_png(file, Image.fromarray(values.astype(np.uint16)))
        return
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[list(scheme.values)] = palette(len(scheme.classes))
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette(colors.tobytes())
    write_png(file, image)


def write_overlay(file: Path, pixels: Tensor, label_map: np.ndarray, num_classes: int) -> None:
    """Write the label map's colors over the image as the model saw it, at the label map's size."""
    height, width = label_map.shape
    image = Image.fromarray(as_color(pixels)).resize((width, height), Image.Resampling.BILINEAR)
    write_png(file, Image.fromarray(overlay(np.array(image), label_map, palette(num_classes))))


def write_png(file: Path, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all."""
    data = io.BytesIO()
    image.save(data, format="png")
    with atomic_write(file) as temporary:
        temporary.write_bytes(data.getvalue())
