"""Pictures of label maps: a color per class, laid over the image. Tensors in, pictures out; nothing here writes or logs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from simmim.finetune.dense.pictures import enlarged, palette, picture_grid

OPACITY = 0.55
COLUMNS = ("image", "labels", "prediction")
MIN_CELL_PX, MAX_CELL_PX = 128, 384


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
    return picture_grid(rows, COLUMNS, classes, [tuple(map(int, color)) for color in colors])


def overlay_row(image: Tensor, label_maps: Sequence[Tensor], colors: np.ndarray) -> list[np.ndarray]:
    """The image, and each label map over it, (height, width, 3) uint8, resized so that they are well seen."""
    shown = enlarged(image, MIN_CELL_PX, MAX_CELL_PX)
    cells = [shown]
    for label_map in label_maps:
        resized = F.interpolate(label_map[None, None].float(), shown.shape[:2], mode="nearest-exact")[0, 0]
        cells.append(overlay(shown, resized.long().cpu().numpy(), colors))
    return cells
