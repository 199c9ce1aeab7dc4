"""The detector's head: a feature pyramid (arXiv 1612.03144) over all stages, and towers that all levels share, with norms of
each level's own (FCOS, arXiv 1904.01355, shares them, too).

Each point of a level, the center of a cell of its map, predicts the class of the object that it is assigned to, its
distances to the sides of that object's box, its centerness, and, if masks are learned, the parameters of a small network
that turns shared features into the object's mask (`condinst.py`).

Shape letters: B images, C channels of a stage, D channels of the head, K classes, H W height and width of a map, P points of
all levels together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.finetune.detection.condinst import CHANNELS, NUM_PARAMETERS, mask_logits

GROUP_CHANNELS = 8  # normalized together
FIRST_PROBABILITY = 0.01  # of every class at initialization, so that the many points of background do not swamp the loss
ANCHOR_CELLS = 8  # side of a level's square anchor in cells, as in ATSS (arXiv 1912.02424); distances start at its half
MAX_GROWTH = 64.0  # of a distance from its first value, so that it stays finite


class Predictions(NamedTuple):
    """What the head says of every point, the points of the finest level first, row by row.

    Attributes:
        logits: (B, P, K) float32.
        distances: (B, P, 4) float32, from the point to left, top, right and bottom side, in pixels, positive.
        centerness: (B, P) float32 logits.
        points: (P, 2) float32, (x, y) in pixels.
        strides: (P,) float32, pixels per cell of the point's level.
        sizes: (H, W) of each level.
        mask_parameters: (B, P, `NUM_PARAMETERS`) float32, of the network for the mask of each point's object; None for a
            detector of boxes alone, as the features.
        mask_features: (B, `CHANNELS`, H, W) float32, at the finest level.
    """

    logits: Tensor
    distances: Tensor
    centerness: Tensor
    points: Tensor
    strides: Tensor
    sizes: tuple[tuple[int, int], ...]
    mask_parameters: Tensor | None = None
    mask_features: Tensor | None = None

    def boxes(self) -> Tensor:
        """(B, P, 4) in pixels; they may reach out of the image."""
        signs = self.distances.new_tensor([-1, -1, 1, 1])
        return self.points.repeat(1, 2) + signs * self.distances

    @property
    def mask_stride(self) -> int:
        """Of the masks, in pixels."""
        return int(self.strides[0])

    def mask_logits(self, row: int, points: Tensor) -> Tensor:
        """The masks that some points of an image predict, (N, H, W) float32.

        Args:
            row: of the image.
            points: (N,), their numbers.

        Raises:
            ValueError: from a detector of boxes alone.
        """
        if self.mask_features is None or self.mask_parameters is None:
            raise ValueError("this detector finds boxes alone: it was trained without masks")
        units = ANCHOR_CELLS * self.strides[points]
        with torch.autocast(self.points.device.type, enabled=False):
            features, parameters = self.mask_features[row], self.mask_parameters[row, points]
            return mask_logits(features, self.mask_stride, parameters, self.points[points], units)


class FeaturePyramid(nn.Module):
    """Maps of all stages to maps of D channels, each with what the coarser ones know.

    Args:
        channels: of each stage's map, the finest first; one stage or more.
        width: D.
        num_above: further levels, each half as large as the one before.
    """

    def __init__(self, channels: Sequence[int], width: int, num_above: int = 0) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(stage, width, 1) for stage in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.above = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(num_above))
        for convolution in (*self.laterals, *self.outputs, *self.above):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of (B, C, H, W), the finest first, to maps of (B, D, H, W), the finest first."""
        levels = [lateral(stage) for lateral, stage in zip(self.laterals, maps)]
        for level in range(len(levels) - 1, 0, -1):
            finer = levels[level - 1]
            levels[level - 1] = finer + F.interpolate(levels[level], finer.shape[2:], mode="nearest")
        levels = [output(level) for output, level in zip(self.outputs, levels)]
        for above in self.above:
            levels.append(above(F.relu(levels[-1]) if len(levels) > len(self.outputs) else levels[-1]))
        return levels


class Tower(nn.Module):
    """Convolutions of 3 × 3 that all levels share, each followed by a group norm of the level's own and ReLU.

    Args:
        width: D, a multiple of `GROUP_CHANNELS`.
        num_convolutions: 1 or more.
        num_levels: that have norms.
    """

    def __init__(self, width: int, num_convolutions: int, num_levels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(num_convolutions))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.GroupNorm(width // GROUP_CHANNELS, width) for _ in range(num_levels))
            for _ in range(num_convolutions)
        )
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]

    def forward(self, level_map: Tensor, level: int) -> Tensor:
        """A level's map, (B, D, H, W), to one of the same shape."""
        for convolution, norms in zip(self.convolutions, self.norms):
            level_map = F.relu(norms[level](convolution(level_map)))  # type: ignore[index]
        return level_map


class MaskFeatures(nn.Module):
    """The finest level of the pyramid to the features that the masks of all objects share.

    Args:
        width: D, a multiple of 16.
        num_convolutions: of its tower, which has half the width.
    """

    def __init__(self, width: int, num_convolutions: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 2, 1)
        self.tower = Tower(width // 2, num_convolutions, 1)
        self.output = nn.Conv2d(width // 2, CHANNELS, 1)
        for convolution in (self.reduce, self.output):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def forward(self, finest: Tensor) -> Tensor:
        """(B, D, H, W) to (B, `CHANNELS`, H, W) float32."""
        return self.output(self.tower(self.reduce(finest), 0)).float()


class PyramidHead(nn.Module):
    """Feature maps of all stages to predictions of every point.

    Args:
        channels, strides: of each stage's map, the finest first; strides in pixels.
        num_classes: K.
        width: D, a multiple of 16.
        convolutions: of each of the two towers.
        num_above: as of `FeaturePyramid`.
        masks: whether each point predicts a mask, too.

    Raises:
        ValueError: for a width or a number of convolutions that cannot be built.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
        convolutions: int = 4,
        num_above: int = 0,
        masks: bool = False,
    ) -> None:
        super().__init__()
        check_head(width, convolutions)
        self.strides = (*strides, *(strides[-1] * 2 ** (number + 1) for number in range(num_above)))
        self.pyramid = FeaturePyramid(channels, width, num_above)
        self.class_tower = Tower(width, convolutions, len(self.strides))
        self.box_tower = Tower(width, convolutions, len(self.strides))
        self.classify = build_output(width, num_classes, -math.log((1 - FIRST_PROBABILITY) / FIRST_PROBABILITY))
        self.regress = build_output(width, 4)
        self.center = build_output(width, 1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))  # of each level's distances
        # Made last: without them the others begin with the same weights as ever.
        self.masks = MaskFeatures(width, convolutions) if masks else None
        self.control = build_output(width, NUM_PARAMETERS) if masks else None

    def forward(self, maps: Sequence[Tensor]) -> Predictions:
        """Maps of (B, C, H, W), the finest first, to predictions of P points."""
        logits, distances, centerness, parameters, sizes = [], [], [], [], []
        levels = self.pyramid(maps)
        for level, level_map in enumerate(levels):
            class_map, box_map = self.class_tower(level_map, level), self.box_tower(level_map, level)
            logits.append(by_point(self.classify(class_map)))
            growth = (self.scales[level] * by_point(self.regress(box_map))).clamp(max=math.log(MAX_GROWTH))
            distances.append(growth.exp() * (ANCHOR_CELLS / 2 * self.strides[level]))
            centerness.append(by_point(self.center(box_map))[..., 0])
            if self.control is not None:
                parameters.append(by_point(self.control(box_map)))
            sizes.append(tuple(level_map.shape[2:]))
        points, strides = grid_points(sizes, self.strides, maps[0].device)
        return Predictions(
            torch.cat(logits, dim=1),
            torch.cat(distances, dim=1),
            torch.cat(centerness, dim=1),
            points,
            strides,
            tuple(sizes),
            torch.cat(parameters, dim=1) if parameters else None,
            self.masks(levels[0]) if self.masks is not None else None,
        )


def build_output(width: int, channels: int, bias: float = 0.0) -> nn.Conv2d:
    """The last convolution of a branch, nearly constant at initialization."""
    convolution = nn.Conv2d(width, channels, 3, padding=1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.constant_(convolution.bias, bias)
    return convolution


def by_point(level_map: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H × W, C), float32."""
    return level_map.flatten(2).transpose(1, 2).float()


def grid_points(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Centers of the cells of all levels, (P, 2) as (x, y) in pixels, and the stride of each, (P,)."""
    points, of_points = [], []
    for (height, width), stride in zip(sizes, strides):
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
        points.append(torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1))
        of_points.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(points), torch.cat(of_points)


def check_head(width: int, convolutions: int) -> None:
    """Refuse settings from which no head can be built.

    Raises:
        ValueError: naming the setting and what to give.
    """
    if width < 1 or width % (2 * GROUP_CHANNELS):
        raise ValueError(f"head.width is {width}: give a positive multiple of {2 * GROUP_CHANNELS}")
    if convolutions < 1:
        raise ValueError(f"head.convolutions is {convolutions}: give 1 or more")
