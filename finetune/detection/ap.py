"""Average precision by COCO's rules (cocodataset.org/#detection-eval), computed by faster-coco-eval.

A box is right if it overlaps a given box of its class, which no better one has taken, by a threshold of 0.50, 0.55, … 0.95.
AP is the mean over thresholds and classes of the precision at 101 recalls. 100 boxes of an image count. Boxes that lie in
ignored ones are neither right nor wrong. Masks are judged in the same way, by the overlap of their pixels.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simmim.files import atomic_write

COLUMNS = ("class", "AP", "AP50", "AP75")  # and how many objects there are
SIZES = {"small": "up to 32² px", "medium": "32² to 96² px", "large": "from 96² px"}  # of the box, or of the mask
BOXES, MASKS = "bbox", "segm"  # what is judged, as COCO calls it
AT_75 = 5  # index of the threshold 0.75
SLACK = 1e-4  # by which a threshold is below its box's score, whose last digits depend on batch and device


class Judged(NamedTuple):
    """One image with what is there and what was found, in its own pixels.

    Attributes:
        row: which image; each counts once.
        boxes: (N, 4), (x1, y1, x2, y2).
        classes: (N,).
        ignored: (N,) bool.
        found_boxes: (M, 4).
        found_scores, found_classes: (M,).
        masks, found_masks: COCO's run lengths of each object; None where boxes alone are learned.
        size: (height, width) of the image, for masks.
    """

    row: int
    boxes: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray
    found_boxes: np.ndarray
    found_scores: np.ndarray
    found_classes: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None
    found_masks: Sequence[dict[str, Any]] | None = None
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scores:
    """Average precisions in [0, 1]; nan where there is no given box.

    Attributes:
        by_class: (K, 3), AP, AP50 and AP75 of each class.
        by_size: AP of the sizes of which there are given boxes.
        num_boxes: given boxes of each class, without ignored ones.
        precision: (K, 101) at overlap 0.5, by recall from 0 to 1; 0 beyond the recall that is reached.
        thresholds: of each class the score with the best F1 at overlap 0.5; 1 where no box of the class was right.
    """

    by_class: np.ndarray
    by_size: dict[str, float]
    num_boxes: tuple[int, ...]
    precision: np.ndarray
    thresholds: tuple[float, ...]

    @property
    def overall(self) -> tuple[float, float, float]:
        """AP, AP50 and AP75, means over the classes that have given boxes; nan if none has."""
        known = self.by_class[~np.isnan(self.by_class[:, 0])]
        ap, ap50, ap75 = known.mean(axis=0) if len(known) else (math.nan,) * 3
        return float(ap), float(ap50), float(ap75)


def check_installed() -> None:
    """Refuse to start without the package that judges.

    Raises:
        ValueError: naming how to install it.
    """
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ValueError("detection needs faster-coco-eval: pip install 'simmim-toolkit[detection]'") from error


def average_precision(images: Sequence[Judged], num_classes: int, kind: str = BOXES) -> Scores:
    """Judge all images together. An image that occurs several times counts once.

    Args:
        kind: `BOXES` or `MASKS`.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    images = list({one.row: one for one in images}.values())
    truth = COCO(coco_labels(images, num_classes, kind))
    judge = COCOeval_faster(truth, truth.loadRes(coco_results(images, kind)), kind, print_function=silent)
    judge.evaluate()
    judge.accumulate()
    # (thresholds, recalls, classes, sizes, numbers of boxes); −1 where there is no given box.
    precision: np.ndarray = judge.eval["precision"][..., -1]
    scores: np.ndarray = judge.eval["scores"][..., -1]
    everywhere = np.where(precision[..., 0] < 0, np.nan, precision[..., 0])
    by_class = np.stack([everywhere.mean(axis=(0, 1)), everywhere[0].mean(axis=0), everywhere[AT_75].mean(axis=0)], axis=1)
    by_size = {}
    for number, size in enumerate(SIZES, start=1):
        known = precision[..., number][precision[..., number] >= 0]
        if known.size:
            by_size[size] = float(known.mean())
    given = [np.bincount(one.classes[~one.ignored], minlength=num_classes) for one in images]
    counts = tuple(int(count) for count in np.sum(given, axis=0))
    at_half = everywhere[0].T
    return Scores(by_class, by_size, counts, at_half, best_thresholds(at_half, scores[0, :, :, 0].T))


def silent(*_: Any) -> None:
    """Print nothing."""


def coco_labels(images: Sequence[Judged], num_classes: int, kind: str = BOXES) -> dict[str, list]:
    """What is there, as COCO's labels. Ids start at 1."""
    annotations: list[dict] = []
    for one in images:
        shapes = shapes_of(one.boxes, one.masks, kind)
        for shape, label, ignored in zip(shapes, one.classes.tolist(), one.ignored.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": one.row + 1,
                    "category_id": label + 1,
                    "area": area_of(shape),
                    "iscrowd": int(ignored),
                    **shape,
                }
            )
    return {
        "images": [{"id": one.row + 1, "height": one.size[0], "width": one.size[1]} for one in images],
        "annotations": annotations,
        "categories": [{"id": number + 1, "name": str(number)} for number in range(num_classes)],
    }


def shapes_of(boxes: np.ndarray, masks: Sequence[dict[str, Any]] | None, kind: str) -> list[dict[str, Any]]:
    """The shape by which each object is judged, as COCO's key and value."""
    if kind == MASKS:
        return [{"segmentation": mask} for mask in masks or ()]
    return [{"bbox": [x1, y1, x2 - x1, y2 - y1]} for x1, y1, x2, y2 in boxes.tolist()]


def area_of(shape: dict[str, Any]) -> float:
    """The area of a shape, in pixels."""
    from faster_coco_eval import mask as coco

    return shape["bbox"][2] * shape["bbox"][3] if "bbox" in shape else float(coco.area(shape["segmentation"]))


def coco_results(images: Sequence[Judged], kind: str = BOXES) -> list[dict]:
    """What was found, as COCO's results."""
    return [
        {
            "image_id": one.row + 1,
            "category_id": label + 1,
            "score": score,
            **shape,
        }
        for one in images
        for shape, label, score in zip(
            shapes_of(one.found_boxes, one.found_masks, kind), one.found_classes.tolist(), one.found_scores.tolist()
        )
    ]


def best_thresholds(precision: np.ndarray, scores: np.ndarray) -> tuple[float, ...]:
    """As `Scores.thresholds`.

    Args:
        precision: (K, 101) by recall.
        scores: (K, 101), of the box with which each recall is reached.
    """
    recall = np.linspace(0, 1, precision.shape[1])
    measure = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    thresholds = []
    for of_class, score in zip(np.nan_to_num(measure), scores):
        best = int(of_class.argmax())
        thresholds.append(float(score[best]) - SLACK if of_class[best] > 0 else 1.0)
    return tuple(thresholds)


def write_class_table(file: Path, scores: Scores, classes: Sequence[str], step: int, counted: str = "boxes") -> None:
    """Write a CSV file with a row per class: AP, AP50 and AP75, empty where no box is given, how many are, and the number of
    steps after which this was the best validation.

    Args:
        counted: what is judged, boxes or masks.
    """
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow([*COLUMNS, counted, "step"])
        for name, values, count in zip(classes, scores.by_class.tolist(), scores.num_boxes):
            writer.writerow([name, *("" if math.isnan(value) else f"{value:.4f}" for value in values), count, step])


def class_table(file: Path) -> str:
    """The file of `write_class_table` as a Markdown table, in percent."""
    with file.open(newline="", encoding="utf-8") as text:
        header, *rows = csv.reader(text)
    lines = [f"| {' | '.join(header[:-1])} |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, *values, count, _step in rows:
        shown = (f"{float(value):.1%}" if value else "–" for value in values)
        lines.append(f"| {name} | {' | '.join(shown)} | {count} |")
    return "\n".join(lines)
