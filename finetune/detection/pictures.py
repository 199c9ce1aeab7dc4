"""Pictures of boxes and masks, and precision over recall. Tensors in, pictures out; nothing here writes or logs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from simmim.finetune.dense.pictures import LINE_PX, draw_legend, entry_px, legend_lines, picture_grid
from simmim.finetune.dense.pictures import palette as colors_after_gray
from simmim.finetune.detection.masks import PackedMask

COLUMNS = ("image", "given", "found")
MIN_CELL_PX, MAX_CELL_PX = 192, 480
TINT = 0.4  # share of the class's color inside a mask
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


def tint_masks(
    image: Image.Image,
    masks: Sequence[PackedMask],
    classes: Sequence[int],
    colors: Sequence[tuple[int, int, int]],
    hidden: Sequence[bool] | None = None,
) -> Image.Image:
    """The image with masks tinted and outlined, the best last; arguments as of `draw_boxes`, masks in the image's pixels."""
    pixels = np.array(image)
    for number in reversed(range(len(masks))):
        mask = masks[number]
        color = np.array(GRAY if hidden is not None and hidden[number] else colors[classes[number]], dtype=np.float32)
        inside = mask.pixels
        padded = np.pad(inside, 1)
        edge = inside & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])
        part = pixels[mask.top : mask.top + mask.height, mask.left : mask.left + mask.width]
        part[inside] = (1 - TINT) * part[inside] + TINT * color
        part[edge] = color
    return Image.fromarray(pixels)


def box_grid(rows: Sequence[Sequence[Image.Image]], classes: Sequence[str]) -> Image.Image:
    """Pictures side by side, a row per image, under the titles of `COLUMNS` and above a legend of the classes' colors."""
    return picture_grid([[np.asarray(cell) for cell in cells] for cells in rows], COLUMNS, classes, palette(len(classes)))


def precision_plot(precision: np.ndarray, by_class: Sequence[float], classes: Sequence[str]) -> Image.Image:
    """Precision over recall at overlap 0.5, a line per class.

    Args:
        precision: (K, 101) by recall; nan for a class without given boxes, which has no line.
        by_class: AP50 of each class.
    """
    left, top, right, bottom = MARGIN_PX
    names = [f"{name} {value:.1%}" for name, value in zip(classes, by_class)]
    legend = legend_lines([entry_px(name) for name in names], PLOT_PX[0] - left)
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
    draw_legend(draw, legend, names, colors, (left, PLOT_PX[1] - LINE_PX))
    return picture
