"""Metrics of predicted label maps: intersection over union by class, its mean, and pixel accuracy.

Functions of a confusion matrix, (classes, classes) in pixels: a row per labeled class, a column per predicted class. Ignored
pixels are not counted.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from simmim.files import atomic_write

COLUMNS = ("class", "IoU", "recall", "precision", "pixels")


def iou_by_class(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, float64; nan for a class that is neither labeled nor predicted anywhere."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(dim=0) + confusion.sum(dim=1) - intersection)


def mean_iou(confusion: Tensor) -> float:
    """Mean over the classes that are labeled or predicted somewhere; nan where all pixels are ignored."""
    return iou_by_class(confusion).nanmean().item()


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the pixels whose class is predicted; nan where all pixels are ignored."""
    confusion = confusion.double()
    return (confusion.diagonal().sum() / confusion.sum()).item()


def write_class_table(file: Path, confusion: Tensor, classes: Sequence[str], step: int) -> None:
    """Write a CSV file with a row per class: IoU, recall and precision, empty where a class is not labeled or not predicted,
    the share of the labeled pixels, and the number of steps after which this was the best validation."""
    labeled, predicted = confusion.double().sum(dim=1), confusion.double().sum(dim=0)
    correct = confusion.double().diagonal()
    columns = [iou_by_class(confusion), correct / labeled, correct / predicted, labeled / labeled.sum()]
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow([*COLUMNS, "step"])
        for name, *shares in zip(classes, *(column.tolist() for column in columns)):
            writer.writerow([name, *("" if math.isnan(share) else f"{share:.4f}" for share in shares), step])


def class_table(file: Path) -> str:
    """The file of `write_class_table` as a Markdown table, in percent."""
    with file.open(newline="", encoding="utf-8") as text:
        _, *rows = csv.reader(text)
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, *shares, _step in rows:
        lines.append(f"| {name} | {' | '.join(f'{float(share):.1%}' if share else '–' for share in shares)} |")
    return "\n".join(lines)
