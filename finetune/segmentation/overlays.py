"""Pictures of label maps: a color per class, laid over the image. Tensors in, pictures out; nothing here writes or logs."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

OPACITY = 0.55
COLUMNS = ("image", "labels", "prediction")
GAP_PX, LINE_PX, MIN_CELL_PX, MAX_CELL_PX = 4, 14, 128, 384
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


def overlay(image: np.ndarray, label_map: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The colors of a label map over the image; pixels of no class keep their color.

    Args:
        image: (height, width, 3) uint8.
        label_map: (height, width) class ids; other values are no class.
        colors: (classes, 3) uint8.
    """
    known = (label_map >= 0) & (label_map < len(colors))
    mixed = (1 - OPACITY) * image[known] + OPACITY * colors[label_map[known]]
    result = image.copy()
    result[known] = mixed.round().astype(np.uint8)
    return result


def as_color(image: Tensor) -> np.ndarray:
    """(channels, height, width), uint8 or shares in [0, 1], to (height, width, 3) uint8: one or two channels as gray by the
    first, more by the first three."""
    if image.is_floating_point():
        image = (image.nan_to_num(nan=0.0) * 255).round().to(torch.uint8)
    rgb = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return rgb.permute(1, 2, 0).cpu().numpy()


def overlay_grid(
    images: Sequence[Tensor], labels: Sequence[Tensor], predictions: Sequence[Tensor], classes: Sequence[str]
) -> Image.Image:
    """Image, labels and prediction side by side, a row per image, above a legend of the classes' colors.

    Args:
        images: (channels, height, width) each, uint8 or shares in [0, 1], of any size.
        labels, predictions: class ids, (height, width) each, of any size.
    """
    colors = palette(len(classes))
    rows = [overlay_row(image, maps, colors) for image, *maps in zip(images, labels, predictions)]
    column_px = max(cells[0].shape[1] for cells in rows) + GAP_PX
    width_px = len(COLUMNS) * column_px - GAP_PX
    entries_px = [LINE_PX + CHARACTER_PX * len(name) + ENTRY_GAP_PX for name in classes]
    legend = legend_lines(entries_px, width_px)
    heights_px = [cells[0].shape[0] + GAP_PX for cells in rows]
    picture = Image.new("RGB", (width_px, LINE_PX * (1 + len(legend)) + sum(heights_px) + GAP_PX), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(COLUMNS):
        draw.text((column * column_px, 1), title, fill="black")
    top = LINE_PX
    for cells, height_px in zip(rows, heights_px):
        for column, cell in enumerate(cells):
            picture.paste(Image.fromarray(cell), (column * column_px, top))
        top += height_px
    for line in legend:
        left = 0
        for class_id in line:
            swatch = (left, top + 2, left + SWATCH_PX, top + 2 + SWATCH_PX)
            draw.rectangle(swatch, fill=tuple(map(int, colors[class_id])))
            draw.text((left + LINE_PX, top + 1), classes[class_id], fill="black")
            left += entries_px[class_id]
        top += LINE_PX
    return picture


def overlay_row(image: Tensor, label_maps: Sequence[Tensor], colors: np.ndarray) -> list[np.ndarray]:
    """The image, and each label map over it, (height, width, 3) uint8, resized so that they are well seen."""
    height, width = image.shape[1:]
    longer = max(height, width)
    factor = MAX_CELL_PX / longer if longer > MAX_CELL_PX else min(max(1, -(-MIN_CELL_PX // longer)), MAX_ENLARGEMENT)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    shown = as_color(F.interpolate(image[None].float(), size, mode="nearest-exact")[0].to(image.dtype))
    cells = [shown]
    for label_map in label_maps:
        resized = F.interpolate(label_map[None, None].float(), size, mode="nearest-exact")[0, 0]
        cells.append(overlay(shown, resized.long().cpu().numpy(), colors))
    return cells


def legend_lines(entries_px: Sequence[int], width_px: int) -> list[list[int]]:
    """Indices of legend entries by line.

    Args:
        entries_px: width of each entry.
        width_px: width of a line; a wider entry has a line of its own.
    """
    lines: list[list[int]] = [[]]
    used_px = 0
    for index, entry_px in enumerate(entries_px):
        if lines[-1] and used_px + entry_px > width_px:
            lines.append([])
            used_px = 0
        lines[-1].append(index)
        used_px += entry_px
    return lines
