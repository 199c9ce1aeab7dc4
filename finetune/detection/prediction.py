"""Boxes found by a fine-tuned detector in a folder of images: COCO results, a CSV file, and pictures."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simmim.data import open_images
from simmim.files import atomic_write, write_json
from simmim.finetune.dense.pictures import at_size
from simmim.finetune.dense.prediction import (
    OVERLAYS,
    InputImage,
    batches_of_one_size,
    check_any_read,
    check_new_folder,
    label_path,
    output_names,
    read_images,
    write_png,
)
from simmim.finetune.detection.inference import Found, trusted
from simmim.finetune.detection.model import SavedDetector, load_detector
from simmim.finetune.detection.pictures import draw_boxes, palette
from simmim.training.trainer import device_type

RESULTS, IMAGES, TABLE = "results.json", "images.json", "boxes.csv"
COLUMNS = ("path", "class", "score", "xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class FoundBoxes:
    """What was found.

    Attributes:
        count: number of images that were read.
        unreadable: why each image could not be read, by path.
        boxes: number of boxes of each class from its threshold on.
    """

    count: int
    unreadable: dict[str, str]
    boxes: dict[str, int]


def detect(run: str | Path, images: str | Path, out: str | Path, batch_size: int = 16, overlays: bool = True) -> FoundBoxes:
    """Find boxes in every image below `images`.

    OUT/results.json has all boxes of any score as COCO results, OUT/images.json the images and categories that their ids
    refer to; OUT/boxes.csv and OUT/overlays/NAME.png those with a score from their class's threshold on, which was best on
    the validation images. Boxes are in pixels of the upright images, exclusive.

    Args:
        run: a run of `simmim finetune detection`, or its folder encoder/.
        images: a folder, or any other source of images that pre-training reads; names are those in the folder.
        out: folder to make; must not exist yet, or be empty.
        batch_size: images of one size per batch; fewer large ones.
        overlays: whether to write them too.

    Raises:
        ValueError: when `run` is no detector, there are no images, none can be read, or `out` is not empty.
    """
    out = check_new_folder(out)
    saved, device = load_detector(run), device_type()
    saved.model.to(device)
    source = open_images(images, reading=saved.preprocessing.reading_or_default)
    paths = [source[row]["image"]["path"] for row in range(len(source))]
    names = output_names(paths, Path(images))
    path_of = {name: None if path is None else label_path(path) for name, path in zip(names, paths)}
    unreadable: dict[str, str] = {}
    found: list[tuple[InputImage, Found]] = []
    with saved.model.encoder.fixed_weights():
        for batch in batches_of_one_size(read_images(source, names, saved, unreadable), batch_size):
            pixels = torch.stack([image.pixels for image in batch]).to(device)
            for image, one in zip(batch, saved.find(pixels)):
                one = one.at((image.pixels.shape[1], image.pixels.shape[2]), image.size)
                if overlays:
                    write_overlay(out / OVERLAYS / f"{image.name}.png", image, trusted(one, saved.thresholds), saved)
                found.append((image._replace(pixels=image.pixels[:0]), one))
    check_any_read(len(found), unreadable)
    write_coco(out, found, saved.classes, path_of)
    counts = write_table(out / TABLE, found, saved, path_of)
    return FoundBoxes(len(found), unreadable, {name: counts[name] for name in saved.classes})


def write_coco(
    out: Path, found: list[tuple[InputImage, Found]], classes: tuple[str, ...], path_of: dict[str, str | None]
) -> None:
    """Write all boxes as COCO results, and what their ids refer to."""
    results: list[dict[str, Any]] = []
    for number, (_, one) in enumerate(found, start=1):
        for (x1, y1, x2, y2), score, label in zip(one.boxes.tolist(), one.scores.tolist(), one.classes.tolist()):
            results.append(
                {
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(score, 6),
                }
            )
    images = [
        {"id": number, "file_name": path_of[image.name] or image.name, "height": image.size[0], "width": image.size[1]}
        for number, (image, _) in enumerate(found, start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    with atomic_write(out / RESULTS) as temporary:
        temporary.write_text(json.dumps(results), encoding="utf-8")  # a line, as there may be a hundred boxes an image
    write_json(out / IMAGES, {"images": images, "categories": categories, "annotations": []})


def write_table(
    file: Path, found: list[tuple[InputImage, Found]], saved: SavedDetector, path_of: dict[str, str | None]
) -> Counter[str]:
    """Write a row per trusted box, and one without a class for each image that has none. It can be read as labels.

    Returns:
        The number of rows of each class.
    """
    counts: Counter[str] = Counter()
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for image, one in found:
            kept, path = trusted(one, saved.thresholds), path_of[image.name] or image.name
            for box, score, label in zip(kept.boxes.tolist(), kept.scores.tolist(), kept.classes.tolist()):
                writer.writerow([path, saved.classes[label], f"{score:.4f}", *(f"{value:.2f}" for value in box)])
                counts[saved.classes[label]] += 1
            if not len(kept.boxes):
                writer.writerow([path, *[""] * (len(COLUMNS) - 1)])
    return counts


def write_overlay(file: Path, image: InputImage, found: Found, saved: SavedDetector) -> None:
    """Write the image as the model saw it, at its own size, with boxes and scores."""
    picture, colors = at_size(image.pixels, image.size), palette(len(saved.classes))
    write_png(file, draw_boxes(picture, found.boxes.numpy(), found.classes.tolist(), colors, found.scores.tolist()))
