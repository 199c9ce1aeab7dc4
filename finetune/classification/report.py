"""The validation of the best classifier in files: a table of classes, and a picture of the confusion matrix."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from simmim.files import atomic_write
from simmim.finetune.classification.metrics import ClassRow, class_rows

CLASSES, CONFUSIONS = "classes.csv", "confusions.png"
CAPTION = "of the best validation so far; rows: true class, columns: predicted class, shade: share of the row"
MAX_PRINTED, NUM_WORST = 20, 10  # classes in the printed table; of more classes the worst
CELL_PX, LABEL_PX, MARGIN_PX = 28, 12, 6
MAX_NAMED = 40  # a picture of more classes has no numbers and no names
PICTURE_PX = 1000
DARK_BLUE = (8, 48, 107)
MAX_NAME_LENGTH = 16


def write_class_report(run: Path, confusions: Tensor, names: Sequence[str], step: int) -> Image.Image:
    """Write table and picture into the run folder, and return the picture.

    Args:
        confusions: (classes, classes), a row per true class.
        step: number of steps after which this was the best validation; both files say so.
    """
    write_class_table(run / CLASSES, class_rows(confusions, names), step)
    picture = titled(confusion_picture(confusions, names), f"the best validation, after {step:,} steps")
    with atomic_write(run / CONFUSIONS) as temporary:
        picture.save(temporary, format="PNG")
    return picture


# --- Table -------------------------------------------------------------------------------------------------------------


def write_class_table(path: Path, rows: Sequence[ClassRow], step: int) -> None:
    """Write a CSV file with a row per class; a cell is empty where a rate is not defined. `step` is in every row."""
    names = [field.name for field in fields(ClassRow)]
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *names[1:], "step"])
        for row in rows:
            rates = ["" if rate != rate else f"{rate:.6f}" for rate in (row.precision, row.recall, row.f1)]
            writer.writerow([row.name, *rates, row.images, step])


def class_table(path: Path) -> str:
    """The file of `write_class_table` as aligned text; of many classes only those with the lowest F1."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    title = ""
    if len(rows) > MAX_PRINTED:
        title = f"the {NUM_WORST} of {len(rows)} classes with the lowest F1; {path} has all\n"
        rows = sorted(rows, key=lambda row: float(row["f1"]))[:NUM_WORST]
    width = max(len("class"), *(len(row["class"]) for row in rows))
    lines = [f"{'class':<{width}}  precision  recall     F1  images"]
    for row in rows:
        rates = [f"{float(row[name]):.1%}" if row[name] else "–" for name in ("precision", "recall", "f1")]
        lines.append(f"{row['class']:<{width}}  {rates[0]:>9}  {rates[1]:>6} {rates[2]:>6}  {int(row['images']):>6,}")
    return title + "\n".join(lines)


# --- Picture -----------------------------------------------------------------------------------------------------------


def confusion_picture(confusions: Tensor, names: Sequence[str]) -> Image.Image:
    """The confusion matrix as a picture: white for none of the row, dark blue for all of it.

    Args:
        confusions: (classes, classes), a row per true class.
    """
    counts = confusions.double().numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    depth = np.sqrt(shares)[..., None]  # the square root makes rare confusions visible
    shades = Image.fromarray(((1 - depth) * 255 + depth * np.array(DARK_BLUE)).round().astype(np.uint8))
    if len(names) > MAX_NAMED:
        side_px = len(names) * max(1, PICTURE_PX // len(names))
        return shades.resize((side_px, side_px), Image.Resampling.NEAREST)
    return named_picture(shades, counts, shares, [shortened(name) for name in names])


def named_picture(shades: Image.Image, counts: np.ndarray, shares: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Cells with numbers, and the names of the classes beside rows and above columns.

    Args:
        shades: a pixel per cell.
        counts, shares: (classes, classes), images and shares of the row.
    """
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label_px = int(max(draw.textlength(name) for name in names)) + MARGIN_PX
    cells_px = len(names) * CELL_PX
    side_px = label_px + cells_px + MARGIN_PX
    picture = Image.new("RGB", (side_px, side_px), "white")
    picture.paste(shades.resize((cells_px, cells_px), Image.Resampling.NEAREST), (label_px, label_px))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        middle = label_px + row * CELL_PX + CELL_PX // 2
        draw.text((label_px - MARGIN_PX // 2, middle), name, fill="black", anchor="rm")
        picture.paste(*vertical_text(name, (middle, label_px - MARGIN_PX // 2)))
        for column in range(len(names)):
            if counts[row, column]:
                color = "white" if shares[row, column] > 0.2 else "black"
                center = (label_px + column * CELL_PX + CELL_PX // 2, middle)
                draw.text(center, f"{int(counts[row, column])}", fill=color, anchor="mm")
    return picture


def titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture below a line of text."""
    width = max(picture.width, int(ImageDraw.Draw(picture).textlength(title)) + 2 * MARGIN_PX)
    whole = Image.new("RGB", (width, picture.height + LABEL_PX + MARGIN_PX), "white")
    whole.paste(picture, (0, LABEL_PX + MARGIN_PX))
    ImageDraw.Draw(whole).text((MARGIN_PX, MARGIN_PX // 2), title, fill="black")
    return whole


def shortened(name: str) -> str:
    """A name that fits beside the picture."""
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def vertical_text(text: str, start: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """A text that runs upwards, and the corner at which to paste it so that it begins at `start`, all (x, y)."""
    width_px = int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text)) + 1
    line = Image.new("RGB", (width_px, LABEL_PX), "white")
    ImageDraw.Draw(line).text((0, LABEL_PX // 2), text, fill="black", anchor="lm")
    turned = line.rotate(90, expand=True)
    return turned, (start[0] - LABEL_PX // 2, start[1] - turned.height)
