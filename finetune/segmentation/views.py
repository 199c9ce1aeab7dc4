"""Views of scenes: the part of an image and of its label map that a model sees. Sizes are (height, width)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simmim.data import Picture
from simmim.data.decode import MAX_PIXELS, STRETCHED
from simmim.data.label_map_files import read_label_map
from simmim.data.label_maps import ClassScheme
from simmim.finetune.dense.views import (
    MAX_CROPS,
    TargetSamples,
    draw_scaled_size,
    nearest_pixels,
    padded_crop,
    whole_picture,
)
from simmim.finetune.dense.windows import Size
from simmim.reading import Reading


@dataclass(frozen=True)
class RandomScene:
    """Random scale, crop and flip. Where a crop exceeds the image, it has the mean color and is ignored.

    Args:
        size: of the view in pixels.
        short_side: as of `scaled_size`, before the random scale.
        scale: range of the random scale, drawn on a log scale.
        class_share: largest share of one class in a crop; after `MAX_CROPS` crops any is accepted.
        flip: probability of mirroring left and right.
        fill: value of each channel outside the image, 0 to 255.
        ignored_id: value of the label map there.
    """

    size: Size
    short_side: int
    scale: tuple[float, float]
    class_share: float
    flip: float
    fill: tuple[int, ...]
    ignored_id: int

    def __call__(self, picture: Picture, label_map: np.ndarray, generator: random.Random) -> tuple[Tensor, Tensor]:
        """A view drawn from `generator`: (channels, height, width), uint8 or float32, and (height, width) of the label map's
        dtype.

        Args:
            label_map: class ids, (height, width) of the picture.
        """
        scaled = draw_scaled_size(picture.size, self.short_side, self.scale, generator)
        height, width = (min(side, scaled_side) for side, scaled_side in zip(self.size, scaled))
        for _ in range(MAX_CROPS):
            top, left = generator.randint(0, scaled[0] - height), generator.randint(0, scaled[1] - width)
            crop = nearest_crop(label_map, scaled, (top, left), (height, width))
            if self.class_share == 1 or largest_share(crop, self.ignored_id) <= self.class_share:
                break
        image = padded_crop(picture, scaled, (top, left), (height, width), self.size, self.fill)
        labels = np.full(self.size, self.ignored_id, dtype=label_map.dtype)
        labels[:height, :width] = crop
        mirrored = generator.random() < self.flip
        target = torch.from_numpy(labels)
        return (image.flip(-1), target.flip(-1)) if mirrored else (image, target)


@dataclass(frozen=True)
class WholeScene:
    """The view for evaluation: the whole image at the scale of training, and its label map unchanged.

    Args:
        short_side: as of `scaled_size`.
    """

    short_side: int

    def __call__(
        self, picture: Picture, label_map: np.ndarray, generator: random.Random | None = None
    ) -> tuple[Tensor, Tensor]:
        """(channels, scaled height, scaled width), uint8 or float32, and the label map at its own size. Draws nothing."""
        return whole_picture(picture, self.short_side), torch.from_numpy(label_map)


def nearest_crop(label_map: np.ndarray, scaled: Size, corner: tuple[int, int], size: Size) -> np.ndarray:
    """A part of a label map that is resized to `scaled`: each pixel is the one nearest to its center.

    Args:
        corner: (top, left) of the part, in pixels of the resized map.
        size: of the part.
    """
    rows, columns = (
        nearest_pixels(count, first, side, scaled_side)
        for count, first, side, scaled_side in zip(size, corner, label_map.shape, scaled)
    )
    return label_map[rows[:, None], columns]


def largest_share(label_map: np.ndarray, ignored_id: int) -> float:
    """The most frequent class's share of the pixels that are not ignored; 1 where there are fewer than two classes."""
    counts = np.bincount(label_map.ravel())
    if ignored_id < len(counts):
        counts[ignored_id] = 0
    return counts.max() / counts.sum() if np.count_nonzero(counts) > 1 else 1.0


class SceneSamples(TargetSamples):
    """Samples of scenes by (epoch, index): as of `TargetSamples`, with `label_map`, class ids of (height, width).

    Args:
        source: undecoded columns `image` and `label_map`.
        view: `RandomScene` or `WholeScene`.
        scheme: the classes.
        channels, seed, max_pixels, reading: as of `ImageSamples`.
        keep_decoded: hold decoded images and label maps in memory.
    """

    def __init__(
        self,
        source,
        view: Callable[[Picture, np.ndarray, random.Random], tuple[Tensor, Tensor]],
        scheme: ClassScheme,
        channels: int,
        seed: int,
        keep_decoded: bool = False,
        max_pixels: int = MAX_PIXELS,
        reading: Reading = STRETCHED,
    ) -> None:
        super().__init__(source, view, channels, seed, keep_decoded, max_pixels, reading)  # type: ignore[arg-type]
        self.scheme = scheme

    def labels_of(self, row: dict, index: int, picture: Picture) -> np.ndarray:
        """The label map as class ids."""
        label_map = self.scheme.class_ids(read_label_map(row["label_map"]))
        if label_map.shape != picture.size:
            height, width = label_map.shape
            raise ValueError(f"its label map has changed and is {height}x{width} pixels now (height x width)")
        return label_map

    def target_of(self, index: int, picture: Picture, target: Tensor) -> dict:
        """The view of the label map."""
        return {"label_map": target}
