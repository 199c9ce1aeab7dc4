"""The validation of the best classifier on paper: a table of classes and a picture of what was taken for what."""

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
PRINTED_AT_MOST = 20
CAPTION = "rows: true class, columns: predicted class, shade: share of the row"
CELL_PX, LABEL_PX, MARGIN_PX = 28, 12, 6
# Beyond so many classes cells hold no numbers and sides no names.
NAMED_AT_MOST = 40
PICTURE_PX = 1000


def write_class_table(path: Path, rows: Sequence[ClassRow]) -> None:
    """A CSV file, a row a class; empty cells where a rate is not defined."""
    names = [field.name for field in fields(ClassRow)]
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *names[1:]])
        for row in rows:
            values = (getattr(row, name) for name in names[1:])
            writer.writerow([row.name, *(value if isinstance(value, int) else rate(value, 6, "") for value in values)])


def rate(value: float, digits: int, undefined: str) -> str:
    """A rate as text."""
    return undefined if value != value else f"{value:.{digits}f}"


def class_table(path: Path) -> str:
    """The CSV file of `write_class_table` as an aligned text; of many classes only the ten with the lowest F1."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    title = ""
    if len(rows) > PRINTED_AT_MOST:
        title = f"the ten of {len(rows)} classes with the lowest F1, all in {path}\n"
        rows = sorted(rows, key=lambda row: float(row["f1"]))[:10]
    width = max(len("class"), *(len(row["class"]) for row in rows))
    lines = [f"{'class':<{width}}  precision  recall     F1  images"]
    for row in rows:
        shown = [f"{float(row[name]):.1%}" if row[name] else "–" for name in ("precision", "recall", "f1")]
        lines.append(f"{row['class']:<{width}}  {shown[0]:>9}  {shown[1]:>6} {shown[2]:>6}  {int(row['images']):>6,}")
    return title + "\n".join(lines)


def confusion_picture(confusions: Tensor, names: Sequence[str]) -> Image.Image:
    """The table of confusions, (classes, classes), as a picture: white for none of the row, dark for all of it."""
    counts = confusions.double().numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    count = len(names)
    # From white to a dark blue; the square root lets rare confusions be seen.
    depth = np.sqrt(shares)[..., None]
    shade = ((1 - depth) * 255 + depth * np.array([8, 48, 107])).round().astype(np.uint8)
    if count > NAMED_AT_MOST:
        side = count * max(1, PICTURE_PX // count)
        return Image.fromarray(shade).resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label = int(max(draw.textlength(shortened(name)) for name in names)) + MARGIN_PX
    side = label + count * CELL_PX + MARGIN_PX
    picture = Image.new("RGB", (side, side), "white")
    cells = Image.fromarray(shade).resize((count * CELL_PX, count * CELL_PX), Image.Resampling.NEAREST)
    picture.paste(cells, (label, label))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        middle = label + row * CELL_PX + CELL_PX // 2
        draw.text((label - MARGIN_PX // 2, middle), shortened(name), fill="black", anchor="rm")
        picture.paste(*upright(shortened(name), (middle, label - MARGIN_PX // 2)))
        for column in range(count):
            if counts[row, column]:
                dark = shares[row, column] > 0.2
                place = (label + column * CELL_PX + CELL_PX // 2, middle)
                draw.text(place, f"{int(counts[row, column])}", fill="white" if dark else "black", anchor="mm")
    return picture


def shortened(name: str) -> str:
    """A name that fits beside the picture."""
    return name if len(name) <= 16 else name[:15] + "…"


def upright(text: str, foot: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """A text turned to run upwards, and where to paste it so that it begins at `foot`, (x, y)."""
    width = int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text)) + 1
    line = Image.new("RGB", (width, LABEL_PX), "white")
    ImageDraw.Draw(line).text((0, LABEL_PX // 2), text, fill="black", anchor="lm")
    turned = line.rotate(90, expand=True)
    return turned, (foot[0] - LABEL_PX // 2, foot[1] - turned.height)


def write_class_report(run: Path, confusions: Tensor, names: Sequence[str]) -> Image.Image:
    """Both in the run folder; the picture is returned."""
    write_class_table(run / CLASSES, class_rows(confusions, names))
    picture = confusion_picture(confusions, names)
    with atomic_write(run / CONFUSIONS) as temporary:
        picture.save(temporary, format="PNG")
    return picture
