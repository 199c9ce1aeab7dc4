"""Boxes and masks found by a fine-tuned detector in a folder of images: COCO results, CSV files, and pictures."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simmim.data import open_images
from simmim.data.records import paths_of
from simmim.evaluate.single_files import suit_model
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
from simmim.finetune.detection.inference import MAX_COUNTED, Found, best_or_trusted, is_trusted, take
from simmim.finetune.detection.masks import PackedMask, coco_rle
from simmim.finetune.detection.model import SavedDetector, load_detector
from simmim.finetune.detection.pictures import draw_boxes, palette, tint_masks
from simmim.training.devices import device_type

RESULTS, IMAGES, TABLE, COUNTS = "results.json", "images.json", "boxes.csv", "counts.csv"
COLUMNS = ("path", "class", "score", "xmin", "ymin", "xmax", "ymax")
AREA = "area"  # of the mask, in pixels; a further column where there are masks


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
    the validation images; OUT/counts.csv how many of each class each image has. Boxes are in pixels of the upright images,
    exclusive. A detector of masks writes them as COCO's run lengths, and their areas in pixels.

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
    saved, device = suit_model(load_detector(run), images), device_type()
    saved.model.to(device)
    source = open_images(images, reading=saved.preprocessing.reading_or_default)
    paths = paths_of(source)
    names = output_names(paths, Path(images))
    path_of = {name: None if path is None else label_path(path) for name, path in zip(names, paths)}
    unreadable: dict[str, str] = {}
    found: list[FoundIn] = []
    with saved.model.encoder.fixed_weights():
        for batch in batches_of_one_size(read_images(source, names, saved, unreadable), batch_size):
            pixels = torch.stack([image.pixels for image in batch]).to(device)
            for image, one in zip(batch, saved.find(pixels, MAX_COUNTED)):
                one = one.at((image.pixels.shape[1], image.pixels.shape[2]), image.size)
                one = best_or_trusted(one, saved.thresholds)
                # Masks are kept packed: soft ones of many images would fill the memory.
                masks = None if one.masks is None else [mask.packed(image.size) for mask in one.masks]
                of_image = FoundIn(path_of[image.name] or image.name, image.size, one._replace(masks=None), masks)
                if overlays:
                    write_overlay(out / OVERLAYS / f"{image.name}.png", image, of_image.trusted(saved.thresholds), saved)
                found.append(of_image)
    check_any_read(len(found), unreadable)
    write_coco(out, found, saved.classes)
    counts = write_table(out / TABLE, found, saved)
    write_counts(out / COUNTS, found, saved)
    return FoundBoxes(len(found), unreadable, {name: counts[name] for name in saved.classes})


class FoundIn(NamedTuple):
    """What was found in one image.

    Attributes:
        path: of the image.
        size: (height, width).
        found: in the image's own pixels, without soft masks.
        masks: of each object; None from a detector of boxes alone.
    """

    path: str
    size: tuple[int, int]
    found: Found
    masks: list[PackedMask] | None

    def trusted(self, thresholds: Sequence[float]) -> FoundIn:
        """Those with a score from their class's threshold on."""
        chosen = is_trusted(self.found, thresholds)
        masks = None if self.masks is None else [mask for mask, kept in zip(self.masks, chosen.tolist()) if kept]
        return self._replace(found=take(self.found, chosen), masks=masks)


def write_coco(out: Path, found: Sequence[FoundIn], classes: tuple[str, ...]) -> None:
    """Write all boxes and masks as COCO results, and what their ids refer to."""
    images = [
        {"id": number, "file_name": image.path, "height": image.size[0], "width": image.size[1]}
        for number, image in enumerate(found, start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    # A line, and a piece an image: there may be a hundred boxes an image, and millions would fill the memory.
    with atomic_write(out / RESULTS) as temporary, temporary.open("w", encoding="utf-8") as text:
        text.write("[")
        before = ""
        for number, image in enumerate(found, start=1):
            if results := coco_results(number, image):
                text.write(before + json.dumps(results)[1:-1])
                before = ", "
        text.write("]")
    write_json(out / IMAGES, {"images": images, "categories": categories, "annotations": []})


def coco_results(number: int, image: FoundIn) -> list[dict[str, Any]]:
    """The boxes and masks of one image as COCO results.

    Args:
        number: id of the image.
    """
    found, masks = image.found, image.masks
    shapes = [{}] * len(found.boxes) if masks is None else [{"segmentation": coco_rle(mask, image.size)} for mask in masks]
    return [
        {
            "image_id": number,
            "category_id": label + 1,
            "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 6),
            **shape,
        }
        for (x1, y1, x2, y2), score, label, shape in zip(
            found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), shapes
        )
    ]


def write_table(file: Path, found: Sequence[FoundIn], saved: SavedDetector) -> Counter[str]:
    """Write a row per trusted box, with the area of its mask where there are masks, and one without a class for each image
    that has none. It can be read as labels.

    Returns:
        The number of rows of each class.
    """
    counts: Counter[str] = Counter()
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        columns = [*COLUMNS, *[AREA] * saved.model.shape.masks]
        writer.writerow(columns)
        for image in found:
            path, _, kept, masks = image.trusted(saved.thresholds)
            areas = [[]] * len(kept.boxes) if masks is None else [[mask.area] for mask in masks]
            for box, score, label, area in zip(kept.boxes.tolist(), kept.scores.tolist(), kept.classes.tolist(), areas):
                writer.writerow([path, saved.classes[label], f"{score:.4f}", *(f"{value:.2f}" for value in box), *area])
                counts[saved.classes[label]] += 1
            if not len(kept.boxes):
                writer.writerow([path, *[""] * (len(columns) - 1)])
    return counts


def write_counts(file: Path, found: Sequence[FoundIn], saved: SavedDetector) -> None:
    """Write a row per image: the number of trusted boxes of each class, and the area of their masks together, in pixels."""
    names = list(saved.classes)
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(["path", *names, *(f"{AREA} of {name}" for name in names if saved.model.shape.masks)])
        for image in found:
            path, _, kept, masks = image.trusted(saved.thresholds)
            labels = kept.classes.tolist()
            row: list[Any] = [path, *(labels.count(number) for number in range(len(names)))]
            if masks is not None:
                areas: Counter[int] = Counter()
                for label, mask in zip(labels, masks):
                    areas[label] += mask.area
                row += [areas[number] for number in range(len(names))]
            writer.writerow(row)


def write_overlay(file: Path, image: InputImage, shown: FoundIn, saved: SavedDetector) -> None:
    """Write the image as the model saw it, at its own size, with masks, boxes and scores."""
    picture, colors, found = at_size(image.pixels, image.size), palette(len(saved.classes)), shown.found
    if shown.masks is not None:
        picture = tint_masks(picture, shown.masks, found.classes.tolist(), colors)
    write_png(file, draw_boxes(picture, found.boxes.numpy(), found.classes.tolist(), colors, found.scores.tolist()))
