"""Views of scenes: the part of an image and of its label map that a model sees. Sizes are (height, width)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simmim.data import ImageSamples, Picture, open_picture
from simmim.data.decode import MAX_PIXELS, STRETCHED
from simmim.data.label_map_files import read_label_map
from simmim.data.label_maps import ClassScheme
from simmim.reading import Reading

Size = tuple[int, int]
MAX_CROPS = 10  # drawn in search of one in which no class dominates, as published


def scaled_size(size: Size, short_side: int, factor: float = 1.0) -> Size:
    """The size of a resized image.

    Args:
        size: of the image.
        short_side: pixels to which the shorter side is resized; 0 keeps the image's own.
        factor: by which both sides are multiplied in addition.
    """
    height, width = size
    factor = factor * (short_side / min(size) if short_side else 1.0)
    return max(1, round(height * factor)), max(1, round(width * factor))


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
        factor = math.exp(generator.uniform(*map(math.log, self.scale)))
        scaled = scaled_size(picture.size, self.short_side, factor)
        height, width = (min(side, scaled_side) for side, scaled_side in zip(self.size, scaled))
        for _ in range(MAX_CROPS):
            top, left = generator.randint(0, scaled[0] - height), generator.randint(0, scaled[1] - width)
            crop = nearest_crop(label_map, scaled, (top, left), (height, width))
            if self.class_share == 1 or largest_share(crop, self.ignored_id) <= self.class_share:
                break
        down, across = picture.size[0] / scaled[0], picture.size[1] / scaled[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        part = picture.crop(box, (height, width))
        fill = torch.tensor(self.fill, dtype=torch.uint8)
        if part.is_floating_point():
            fill = torch.full_like(fill, torch.nan, dtype=part.dtype)  # no data, which becomes the mean
        image = fill.view(-1, 1, 1).repeat(1, *self.size)
        image[:, :height, :width] = part
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


def whole_picture(picture: Picture, short_side: int) -> Tensor:
    """A whole picture resized to `scaled_size`: (channels, height, width), uint8 or float32."""
    height, width = picture.size
    return picture.crop((0, 0, width, height), scaled_size(picture.size, short_side))


def nearest_crop(label_map: np.ndarray, scaled: Size, corner: tuple[int, int], size: Size) -> np.ndarray:
    """A part of a label map that is resized to `scaled`: each pixel is the one nearest to its center.

    Args:
        corner: (top, left) of the part, in pixels of the resized map.
        size: of the part.
    """
    rows, columns = (
        ((np.arange(count) + first + 0.5) * side / scaled_side).astype(np.intp).clip(max=side - 1)
        for count, first, side, scaled_side in zip(size, corner, label_map.shape, scaled)
    )
    return label_map[rows[:, None], columns]


def largest_share(label_map: np.ndarray, ignored_id: int) -> float:
    """The most frequent class's share of the pixels that are not ignored; 1 where there are fewer than two classes."""
    counts = np.bincount(label_map.ravel())
    if ignored_id < len(counts):
        counts[ignored_id] = 0
    return counts.max() / counts.sum() if np.count_nonzero(counts) > 1 else 1.0


class SceneSamples(ImageSamples):
    """Samples of scenes by (epoch, index): as of `ImageSamples`, with `label_map`, class ids of (height, width).

    Args:
        source: undecoded columns `image` and `label_map`.
        view: `RandomScene` or `WholeScene`.
        scheme: the classes.
        channels, seed, max_pixels, reading: as of `ImageSamples`.
        keep_decoded: hold decoded images and label maps in memory.
    """

    view: Callable[[Picture, np.ndarray, random.Random], tuple[Tensor, Tensor]]  # type: ignore[assignment]
    cache: dict[int, tuple[Picture, np.ndarray]] | None  # type: ignore[assignment]

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

    def view_of(self, index: int, generator: random.Random) -> dict:
        """The view of the scene at `index`."""
        picture, label_map = self.load(index)
        image, view_of_map = self.view(picture, label_map, generator)
        gray_copies = [self.name_of(index)] if picture.loses_color else []
        return {"image": image, "label_map": view_of_map, "gray_copies": gray_copies}

    def load(self, index: int) -> tuple[Picture, np.ndarray]:
        """The image at `index`, and its label map as class ids.

        Raises:
            One of `UNREADABLE`, also for a label map whose size is no longer the image's. Sizes are checked before a run.
        """
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        row = self.source[index]
        picture = open_picture(row["image"], self.channels, self.max_pixels, self.reading)
        label_map = self.scheme.class_ids(read_label_map(row["label_map"]))
        if label_map.shape != picture.size:
            height, width = label_map.shape
            raise ValueError(f"its label map has changed and is {height}x{width} pixels now (height x width)")
        if self.cache is not None:
            self.cache[index] = picture.decoded(), label_map
            return self.cache[index]
        return picture, label_map
