"""Views: the part of an image that a model sees, and its size. Normalizing happens on the device."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from simmim.data.orientation import Size
from simmim.data.pictures import Picture
from simmim.data.resizing import get_interpolation

FITS = ("crop", "squash")
NUM_VIEWS = (1, 5, 10)  # of an image that evaluation averages over
# Of the sides. Of 0.87, 0.8, 0.75 and 0.7 it was the best for classifiers of few labels, on photographs of groceries and on
# CIFAR-10 together (docs/results.md).
SEVERAL_VIEWS_CROP = 0.75
CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))  # down, across


@dataclass(frozen=True)
class RandomView:
    """Random resized crop, flip and turn.

    Args:
        size: (height, width) of the result in pixels.
        crop_scale: range of the crop's share of the image's area.
        crop_ratio: range of the crop's width over height, drawn on a log scale.
        flip: probability of mirroring left and right.
        turns: turn by 0 to 3 quarters, each as likely; with flips, which then are vertical too.
    """

    size: Size
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    turns: bool = False

    def __call__(self, picture: Picture, generator: random.Random) -> Tensor:
        """A view drawn from `generator`: (channels, height, width), uint8 or float32 as the picture's crops."""
        box = self.crop_box(picture.size, generator)
        mirrored = generator.random() < self.flip
        # Drawn last, so that without turns all other draws are as they were.
        quarters = generator.randrange(4) if self.turns else 0
        view = picture.crop(box, self.size[::-1] if quarters % 2 else self.size)  # type: ignore[arg-type]
        view = view.flip(-1) if mirrored else view
        return view.rot90(quarters, (-2, -1)) if quarters else view

    def crop_box(self, image_size: Size, generator: random.Random) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the crop in an image of `image_size`, (height, width). After ten draws that do not
        fit, the largest centered crop that the ratios allow, as in torchvision."""
        height, width = image_size
        for _ in range(10):
            area = width * height * generator.uniform(*self.crop_scale)
            ratio = math.exp(generator.uniform(*map(math.log, self.crop_ratio)))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left, top = generator.randint(0, width - crop_width), generator.randint(0, height - crop_height)
                return left, top, left + crop_width, top + crop_height
        ratio = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + max(crop_width, 1), top + max(crop_height, 1)

    def enlarged_from(self, image_size: Size) -> float:
        """The factor by which an image of `image_size`, (height, width), can be resized before a crop is enlarged."""
        return enlarged_from(self, image_size)


@lru_cache(maxsize=1024)  # most images of a collection have one of a few sizes
def enlarged_from(view: RandomView, image_size: Size) -> float:
    """As of `RandomView`."""
    height, width = image_size
    low, high = view.crop_ratio
    area = width * height * view.crop_scale[0]
    ratio = min(max(width / height, low), high)  # of the crop that is taken where none of ten fits
    # Whole pixels: the sides of a crop are rounded.
    smallest_height = max(1, min(math.floor(math.sqrt(area / high)), height, round(width / ratio)))
    smallest_width = max(1, min(math.floor(math.sqrt(area * low)), width, round(height * ratio)))
    sizes = (view.size, view.size[::-1]) if view.turns else (view.size,)
    return max(max(tall / smallest_height, wide / smallest_width) for tall, wide in sizes)


@dataclass(frozen=True)
class EvaluationView:
    """A view for evaluation: a crop of the target's aspect ratio, the central one for instance, or the whole image resized.

    Args:
        size: (height, width) of the result in pixels.
        share: kept share of the largest possible crop's sides, in (0, 1]; 0.875 is common for photographs.
        interpolation: nearest, bilinear, bicubic or lanczos.
        fit: crop keeps the image's aspect ratio and loses what is outside the target's; squash keeps the whole image and
            changes its aspect ratio, as transformers' `ViTImageProcessor` does.
        place: where the crop lies, down and across: 0 at the top or left edge, 1 at the bottom or right one.
        mirrored: left and right.

    Raises:
        ValueError: for an unknown interpolation or fit, and a share out of range.
    """

    size: Size
    share: float = 1.0
    interpolation: str = "bilinear"
    fit: str = "crop"
    place: tuple[float, float] = (0.5, 0.5)
    mirrored: bool = False

    def __post_init__(self) -> None:
        # Checked here: while images are read, a ValueError counts as a broken image.
        get_interpolation(self.interpolation)
        if self.fit not in FITS:
            raise ValueError(f"unknown fit {self.fit!r}: give one of {', '.join(FITS)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share of the image is {self.share}: give a number above 0, at most 1")

    def __call__(self, picture: Picture, generator: random.Random | None = None) -> Tensor:
        """The view, (channels, height, width), uint8 or float32 as the picture's crops; draws nothing."""
        image_height, image_width = picture.size
        if self.fit == "squash":
            height, width = image_height * self.share, image_width * self.share
        else:
            height, width = self.size
            scale = min(image_width / width, image_height / height) * self.share
            height, width = height * scale, width * scale
        top, left = (image_height - height) * self.place[0], (image_width - width) * self.place[1]
        view = picture.crop((left, top, left + width, top + height), self.size, self.interpolation)
        return view.flip(-1) if self.mirrored else view


def evaluation_views(
    size: Size, share: float = 1.0, count: int = 1, interpolation: str = "bilinear", fit: str = "crop"
) -> tuple[EvaluationView, ...]:
    """The views of an image over which evaluation averages: the central crop; of 5 also those in the corners; of 10 also all
    of them mirrored, as in Krizhevsky et al. (2012).

    Args:
        size, share, interpolation, fit: as of `EvaluationView`.
        count: 1, 5 or 10.

    Raises:
        ValueError: for another number, and as `EvaluationView`.
    """
    check_num_views(count)
    center = EvaluationView(size, share, interpolation, fit)
    corners = [replace(center, place=place) for place in CORNERS] if count > 1 else []
    views = (center, *corners)
    return views + tuple(replace(view, mirrored=True) for view in views) if count > 5 else views


def check_num_views(count: int, name: str = "number of views") -> None:
    """Check how many views evaluation averages over.

    Args:
        name: of the number, for the message.

    Raises:
        ValueError: for another number than 1, 5 and 10.
    """
    if count not in NUM_VIEWS:
        raise ValueError(
            f"{name} is {count}: give 1 for the central crop, 5 for it and the corners, 10 for these and their mirror images"
        )


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, channels, height, width) to float32: values in [0, 1] minus `mean`, divided by `std`, per channel.

    Args:
        images: uint8 levels, or float shares of a range; NaN, which is no data, becomes the mean.
    """
    means, stds = (channel_constants(tuple(values), images.device) for values in (mean, std))
    if images.is_floating_point():
        return ((images.float() - means) / stds).nan_to_num(nan=0.0)
    return (images.float() / 255 - means) / stds


@lru_cache(maxsize=64)
def channel_constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One float32 number for each channel, (channels, 1, 1), on a device. Kept there, since a copy from the host waits for
    all that the device has yet to do."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def without_holes(images: Tensor, mean: Sequence[float]) -> Tensor:
    """Images whose pixels without data are the mean, one per channel."""
    if not images.is_floating_point():
        return images
    return torch.where(images.isnan(), images.new_tensor(mean).view(-1, 1, 1), images)


def valid_pixels(images: Tensor) -> Tensor | None:
    """Where images have data, bool of their shape; None for uint8 levels, which have data everywhere."""
    return ~images.isnan() if images.is_floating_point() else None
