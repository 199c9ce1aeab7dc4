"""Small random affine changes of labeled images: drawn per image, applied per batch on its device."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AffineSettings:
    """Ranges of the random changes; all zero for none.

    Args:
        degrees: largest rotation in either direction.
        zoom: largest change of size, 0.1 for 0.9 to 1/0.9, drawn for each axis.
        shear: largest tangent of the shear in either direction.
        shift: largest shift in either direction, as a share of the side.
    """

    degrees: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        for name in ("degrees", "zoom", "shear", "shift"):
            if getattr(self, name) < 0 or (name == "zoom" and self.zoom >= 1):
                limit = " and below 1" if name == "zoom" else ""
                raise ValueError(f"data.affine.{name} is {getattr(self, name)}: give a number from 0 on{limit}")

    @property
    def active(self) -> bool:
        """Whether there is any change."""
        return any((self.degrees, self.zoom, self.shear, self.shift))

    def matrices(self, seeds: list[int]) -> Tensor:
        """(N, 2, 3) matrices for N seeds, from output to input coordinates, both from −1 to 1 over a square image."""
        rows = []
        for seed in seeds:
            generator = random.Random(seed)
            angle = math.radians(generator.uniform(-self.degrees, self.degrees))
            limit = -math.log(1 - self.zoom)
            zoom_x, zoom_y = (math.exp(generator.uniform(-limit, limit)) for _ in range(2))
            shear = generator.uniform(-self.shear, self.shear)
            shift_x, shift_y = (2 * generator.uniform(-self.shift, self.shift) for _ in range(2))
            rows.append(affine_matrix(angle, zoom_x, zoom_y, shear, shift_x, shift_y))
        return torch.tensor(rows)


def affine_matrix(
    angle: float = 0.0,
    zoom_x: float = 1.0,
    zoom_y: float = 1.0,
    shear: float = 0.0,
    shift_x: float = 0.0,
    shift_y: float = 0.0,
) -> list[list[float]]:
    """The rows of a (2, 3) matrix from output to input coordinates: zoom, then shear, then rotation, then shift.

    Args:
        angle: in radians, counterclockwise.
        zoom_x, zoom_y: factors of each axis; above 1 the content shrinks.
        shear: its tangent.
        shift_x, shift_y: in coordinates from −1 to 1: a side is 2 long.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    x_row = [zoom_x * cos, zoom_y * (shear * cos - sin), shift_x]
    y_row = [zoom_x * sin, zoom_y * (shear * sin + cos), shift_y]
    return [x_row, y_row]


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Transform images, (B, channels, height, width) float, by `AffineSettings.matrices`; edge pixels continue outwards."""
    height, width = images.shape[-2:]
    # affine_grid measures each axis by its own side, where a rotation would shear an image that is not square.
    aspect = matrices.new_tensor([[1, height / width, 1], [width / height, 1, 1]])
    grid = F.affine_grid((matrices * aspect).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
