"""Pictures of masks: a color a class, laid over the image. Tensors in, images out; nothing here writes or logs."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

OPACITY = 0.55
COLUMNS = ("image", "given", "predicted")
GAP_PX, LINE_PX, MIN_CELL_PX, MAX_CELL_PX = 4, 14, 128, 384
GOLDEN = 0.6180339887498949  # steps around the color circle that never come near an earlier one soon


def palette(count: int) -> np.ndarray:
    """A color a class, (count, 3) uint8: the first, most often the background, a dark gray, neighbors far apart."""
    colors = [(64, 64, 64)]
    for index in range(count - 1):
        shades = ((0.9, 1.0), (0.55, 1.0), (0.9, 0.65))
        saturation, value = shades[index // 12 % len(shades)]
        rgb = colorsys.hsv_to_rgb(index * GOLDEN % 1.0, saturation, value)
        colors.append(tuple(round(255 * part) for part in rgb))
    return np.array(colors[:count], dtype=np.uint8)


def overlay(image: np.ndarray, mask: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """A mask's colors over the image; pixels of no class stay as they are.

    Args:
        image: (height, width, 3) uint8.
        mask: (height, width) numbers of classes; others are no class.
        colors: (classes, 3) uint8.
    """
    known = (mask >= 0) & (mask < len(colors))
    mixed = (1 - OPACITY) * image[known] + OPACITY * colors[mask[known]]
    result = image.copy()
    result[known] = mixed.round().astype(np.uint8)
    return result


def as_color(image: Tensor) -> np.ndarray:
    """(channels, height, width) uint8 to (height, width, 3): one channel as gray, of more than three the first three, of
    two the first."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).cpu().numpy()


def overlay_grid(
    images: Sequence[Tensor], given: Sequence[Tensor], predicted: Sequence[Tensor], classes: Sequence[str]
) -> Image.Image:
    """Image, given mask and predicted mask side by side, a row an image, and below which color is which class.

    Args:
        images: (channels, height, width) uint8 each, of any size.
        given, predicted: numbers of classes, (height, width) each, of any size.
    """
    colors = palette(len(classes))
    rows = []
    for image, *masks in zip(images, given, predicted):
        height, width = image.shape[1:]
        factor = min(max(1, -(-MIN_CELL_PX // max(height, width))), 8)
        factor = factor if max(height, width) <= MAX_CELL_PX else MAX_CELL_PX / max(height, width)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        shown = as_color(F.interpolate(image[None].float(), size, mode="nearest-exact")[0].to(torch.uint8))
        cells = [shown]
        for mask in masks:
            brought = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0]
            cells.append(overlay(shown, brought.long().cpu().numpy(), colors))
        rows.append(cells)
    across = max(cells[0].shape[1] for cells in rows) + GAP_PX
    names = [(name, LINE_PX + 8 * len(name) + 10) for name in classes]
    total = 3 * across - GAP_PX
    lines = legend_lines([width for _, width in names], total)
    heights = [cells[0].shape[0] + GAP_PX for cells in rows]
    picture = Image.new("RGB", (total, LINE_PX * (1 + len(lines)) + sum(heights) + GAP_PX), "white")
    draw = ImageDraw.Draw(picture)
    for column, label in enumerate(COLUMNS):
        draw.text((column * across, 1), label, fill="black")
    top = LINE_PX
    for cells, height in zip(rows, heights):
        for column, cell in enumerate(cells):
            picture.paste(Image.fromarray(cell), (column * across, top))
        top += height
    for line in lines:
        left = 0
        for number in line:
            name, width = names[number]
            draw.rectangle((left, top + 2, left + 9, top + 11), fill=tuple(map(int, colors[number])))
            draw.text((left + LINE_PX, top + 1), name, fill="black")
            left += width
        top += LINE_PX
    return picture


def legend_lines(widths: Sequence[int], total: int) -> list[list[int]]:
    """Entries of such widths, by number, in lines no wider than `total` where that can be."""
    lines, used = [[]], 0
    for number, width in enumerate(widths):
        if lines[-1] and used + width > total:
            lines.append([])
            used = 0
        lines[-1].append(number)
        used += width
    return lines
