"""Label maps predicted by a fine-tuned segmenter for a folder of images: PNG files, and overlays for viewing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simmim.data import open_images
from simmim.data.label_maps import CLASSES_FILE, ClassScheme
from simmim.data.records import paths_of
from simmim.evaluate.single_files import suit_model
from simmim.files import atomic_write
from simmim.finetune.dense.pictures import at_size, palette
from simmim.finetune.dense.prediction import (
    OVERLAYS,
    batches_of_one_size,
    check_any_read,
    check_new_folder,
    output_names,
    read_images,
    write_png,
)
from simmim.finetune.segmentation.model import load_segmenter
from simmim.finetune.segmentation.overlays import overlay
from simmim.finetune.segmentation.sliding import most_likely_class
from simmim.training.devices import device_type

LABEL_MAPS = "masks"  # folder, called as in the training data


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
    saved, device = suit_model(load_segmenter(run), images), device_type()
    saved.model.to(device)
    source = open_images(images, reading=saved.preprocessing.reading_or_default)
    names = output_names(paths_of(source), Path(images))
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
    check_any_read(num_done, unreadable)
    with atomic_write(out / CLASSES_FILE) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in saved.scheme.classes), encoding="utf-8")
    return SegmentedImages(num_done, unreadable, dict(zip(saved.scheme.classes, counts.tolist())))


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
    image = at_size(pixels, label_map.shape)  # type: ignore[arg-type]
    write_png(file, Image.fromarray(overlay(np.array(image), label_map, palette(num_classes))))
