"""Pictures of predictions: a color per class, images side by side above a legend. Tensors in, pictures out; nothing here
writes or logs."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

GAP_PX, LINE_PX = 4, 14
SWATCH_PX, CHARACTER_PX, ENTRY_GAP_PX = 9, 8, 10
MAX_ENLARGEMENT = 8
GOLDEN = 0.6180339887498949  # steps around the color circle whose first points are far from each other


def palette(count: int) -> np.ndarray:
    """A color per class, (count, 3) uint8: dark gray for the first, often the background, then colors that differ from their
    neighbors."""
    colors = [(64, 64, 64)]
    for index in range(count - 1):
        shades = ((0.9, 1.0), (0.55, 1.0), (0.9, 0.65))
        saturation, value = shades[index // 12 % len(shades)]
        red, green, blue = colorsys.hsv_to_rgb(index * GOLDEN % 1.0, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colors[:count], dtype=np.uint8)


def as_color(image: Tensor) -> np.ndarray:
    """(channels, height, width), uint8 or shares in [0, 1], to (height, width, 3) uint8: one or two channels as gray by the
    first, more by the first three."""
    if image.is_floating_point():
        image = (image.nan_to_num(nan=0.0) * 255).round().to(torch.uint8)
    rgb = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return rgb.permute(1, 2, 0).cpu().numpy()


def at_size(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """An image, (channels, height, width), uint8 or shares in [0, 1], as a picture in color of another (height, width)."""
    height, width = size
    return Image.fromarray(as_color(image)).resize((width, height), Image.Resampling.BILINEAR)


def enlarged(image: Tensor, min_px: int, max_px: int) -> np.ndarray:
    """As `as_color`, resized so that it is well seen.

    Args:
        min_px, max_px: limits of the longer side; small images are enlarged by whole numbers.
    """
    height, width = image.shape[1:]
    longer = max(height, width)
    factor = max_px / longer if longer > max_px else min(max(1, -(-min_px // longer)), MAX_ENLARGEMENT)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return as_color(F.interpolate(image[None].float(), size, mode="nearest-exact")[0].to(image.dtype))


def picture_grid(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    classes: Sequence[str],
    colors: Sequence[tuple[int, ...]],
) -> Image.Image:
    """Pictures side by side, a row per image, under the columns' titles and above a legend of the classes' colors.

    Args:
        rows: (height, width, 3) uint8 each, those of a row of one size.
        colors: of each class.
    """
    column_px = max(cells[0].shape[1] for cells in rows) + GAP_PX
    width_px = len(columns) * column_px - GAP_PX
    legend = legend_lines([entry_px(name) for name in classes], width_px)
    heights_px = [cells[0].shape[0] + GAP_PX for cells in rows]
    picture = Image.new("RGB", (width_px, LINE_PX * (1 + len(legend)) + sum(heights_px) + GAP_PX), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(columns):
        draw.text((column * column_px, 1), title, fill="black")
    top = LINE_PX
    for cells, height_px in zip(rows, heights_px):
        for column, cell in enumerate(cells):
            picture.paste(Image.fromarray(cell), (column * column_px, top))
        top += height_px
    draw_legend(draw, legend, classes, colors, (0, top))
    return picture


def entry_px(name: str) -> int:
    """Width of a legend's entry."""
    return LINE_PX + CHARACTER_PX * len(name) + ENTRY_GAP_PX


def draw_legend(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[Sequence[int]],
    names: Sequence[str],
    colors: Sequence[tuple[int, ...]],
    corner: tuple[int, int],
) -> None:
    """Draw the entries of `legend_lines`, a swatch and a name each.

    Args:
        corner: (left, top) of the first line.
    """
    first_left, top = corner
    for line in lines:
        left = first_left
        for number in line:
            draw.rectangle((left, top + 2, left + SWATCH_PX, top + 2 + SWATCH_PX), fill=colors[number])
            draw.text((left + LINE_PX, top + 1), names[number], fill="black")
            left += entry_px(names[number])
        top += LINE_PX


def legend_lines(entries_px: Sequence[int], width_px: int) -> list[list[int]]:
    """Indices of legend entries by line.

    Args:
        entries_px: width of each entry.
        width_px: width of a line; a wider entry has a line of its own.
    """
    lines: list[list[int]] = [[]]
    used_px = 0
    for index, width in enumerate(entries_px):
        if lines[-1] and used_px + width > width_px:
            lines.append([])
            used_px = 0
        lines[-1].append(index)
        used_px += width
    return lines
