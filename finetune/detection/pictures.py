"""Pictures of boxes, and precision over recall. Tensors in, pictures out; nothing here writes or logs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from simmim.finetune.segmentation.overlays import as_color, legend_lines
from simmim.finetune.segmentation.overlays import palette as colors_after_gray

COLUMNS = ("image", "given", "found")
GAP_PX, LINE_PX, MIN_CELL_PX, MAX_CELL_PX = 4, 14, 192, 480
SWATCH_PX, CHARACTER_PX, ENTRY_GAP_PX = 9, 8, 10
MAX_ENLARGEMENT = 8
GRAY, GRID_COLOR = (150, 150, 150), (225, 225, 225)
PLOT_PX, MARGIN_PX = (560, 420), (56, 30, 16, 44)  # width, height; left, top, right, bottom


def palette(count: int) -> list[tuple[int, int, int]]:
    """A bright color per class."""
    return [(int(red), int(green), int(blue)) for red, green, blue in colors_after_gray(count + 1)[1:]]


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    classes: Sequence[int],
    colors: Sequence[tuple[int, int, int]],
    scores: Sequence[float] | None = None,
    hidden: Sequence[bool] | None = None,
) -> Image.Image:
    """The image with boxes drawn on it, the best last.

    Args:
        image: in mode RGB.
        boxes: (N, 4), (x1, y1, x2, y2) in its pixels.
        classes, scores, hidden: of each box. Hidden ones, which are ignored, are gray.
        colors: of each class.
    """
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    thick = max(1, round(max(picture.size) / 400))
    for number in reversed(range(len(boxes))):
        color = GRAY if hidden is not None and hidden[number] else colors[classes[number]]
        x1, y1, x2, y2 = boxes[number].tolist()
        # Pillow's last column and row are inside.
        corner = max(round(x1), round(x2) - 1), max(round(y1), round(y2) - 1)
        draw.rectangle((round(x1), round(y1), *corner), outline=color, width=thick)
        if scores is not None and max(picture.size) >= MIN_CELL_PX:
            draw.text((round(x1) + thick + 1, round(y1) + thick), f"{scores[number]:.2f}", fill=color)
    return picture


def enlarged(image: Tensor) -> Image.Image:
    """An image, (channels, height, width), uint8 or shares in [0, 1], as a picture in color, large enough to see boxes."""
    height, width = image.shape[1:]
    longer = max(height, width)
    factor = MAX_CELL_PX / longer if longer > MAX_CELL_PX else min(max(1, -(-MIN_CELL_PX // longer)), MAX_ENLARGEMENT)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    shown = F.interpolate(image[None].float(), size, mode="nearest-exact")[0].to(image.dtype)
    return Image.fromarray(as_color(shown))


def box_grid(rows: Sequence[Sequence[Image.Image]], classes: Sequence[str]) -> Image.Image:
    """Pictures side by side, a row per image, under the titles of `COLUMNS` and above a legend of the classes' colors."""
    colors = palette(len(classes))
    column_px = max(cells[0].width for cells in rows) + GAP_PX
    width_px = len(COLUMNS) * column_px - GAP_PX
    entries_px = [LINE_PX + CHARACTER_PX * len(name) + ENTRY_GAP_PX for name in classes]
    legend = legend_lines(entries_px, width_px)
    heights_px = [cells[0].height + GAP_PX for cells in rows]
    picture = Image.new("RGB", (width_px, LINE_PX * (1 + len(legend)) + sum(heights_px) + GAP_PX), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(COLUMNS):
        draw.text((column * column_px, 1), title, fill="black")
    top = LINE_PX
    for cells, height_px in zip(rows, heights_px):
        for column, cell in enumerate(cells):
            picture.paste(cell, (column * column_px, top))
        top += height_px
    for line in legend:
        left = 0
        for number in line:
            draw.rectangle((left, top + 2, left + SWATCH_PX, top + 2 + SWATCH_PX), fill=colors[number])
            draw.text((left + LINE_PX, top + 1), classes[number], fill="black")
            left += entries_px[number]
        top += LINE_PX
    return picture


def precision_plot(precision: np.ndarray, by_class: Sequence[float], classes: Sequence[str]) -> Image.Image:
    """Precision over recall at overlap 0.5, a line per class.

    Args:
        precision: (K, 101) by recall; nan for a class without given boxes, which has no line.
        by_class: AP50 of each class.
    """
    left, top, right, bottom = MARGIN_PX
    names = [f"{name} {value:.1%}" for name, value in zip(classes, by_class)]
    legend = legend_lines([LINE_PX + CHARACTER_PX * len(name) + ENTRY_GAP_PX for name in names], PLOT_PX[0] - left)
    picture = Image.new("RGB", (PLOT_PX[0], PLOT_PX[1] + LINE_PX * len(legend)), "white")
    draw, colors = ImageDraw.Draw(picture), palette(len(classes))
    width, height = PLOT_PX[0] - left - right, PLOT_PX[1] - top - bottom
    for tenth in range(0, 11, 2):
        x, y = left + width * tenth / 10, top + height * (1 - tenth / 10)
        draw.line([(x, top), (x, top + height)], fill=GRID_COLOR)
        draw.line([(left, y), (left + width, y)], fill=GRID_COLOR)
        draw.text((x, top + height + 6), f"{tenth / 10:g}", fill="black", anchor="ma")
        draw.text((left - 6, y), f"{tenth / 10:g}", fill="black", anchor="rm")
    draw.text((left, 8), "precision over recall at overlap 0.5, and AP50", fill="black")
    for curve, color in zip(precision, colors):
        if not np.isnan(curve).any():
            shares = np.linspace(0, 1, len(curve))
            draw.line(
                [(left + width * x, top + height * (1 - y)) for x, y in zip(shares, curve.tolist())], fill=color, width=2
            )
    y = PLOT_PX[1] - LINE_PX
    for line in legend:
        x = left
        for number in line:
            draw.rectangle((x, y + 2, x + SWATCH_PX, y + 2 + SWATCH_PX), fill=colors[number])
            draw.text((x + LINE_PX, y + 1), names[number], fill="black")
            x += LINE_PX + CHARACTER_PX * len(names[number]) + ENTRY_GAP_PX
        y += LINE_PX
    return picture
