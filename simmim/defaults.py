"""Defaults that follow from the images and the machine."""

from __future__ import annotations

import math
from typing import NamedTuple

# Per channel, of values in [0, 1]: ImageNet's, by which published weights for color images are normalized.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


THUMBNAIL_PX = 48  # images up to this side have an encoder of their own, nano
CPU_SIDE_PX = 96


class Scale(NamedTuple):
    """How large a pre-training is.

    Attributes:
        preset: of the encoder.
        side_px: of its images.
    """

    preset: str
    side_px: int

    def __str__(self) -> str:
        return f"{self.preset} at {self.side_px} px"


SCALES = (Scale("tiny", 192), Scale("micro", CPU_SIDE_PX), Scale("pico", 64))  # the largest first
# Images that a run shows to its encoder, each as often as there are epochs. Ten minutes of one core on 2,640 photographs,
# fine-tuned on two draws of 10 labels per class: pico at 64 px had seen 270,000 images and reached 30.4 and 25.3 % (from
# scratch 18.2 and 20.6); micro at 96 px had seen 51,000, reached 23.6 % on the first draw, and took seven times as long to
# fine-tune. Where the larger one overtakes was not measured.
ENOUGH_IMAGES_SEEN = 1_000_000


def default_scales(short_side_px: int, device: str, preset: str | None = None, side_px: int | None = None) -> list[Scale]:
    """Sizes of a pre-training to choose from, the largest first: the one to take is the first that sees `ENOUGH_IMAGES_SEEN`
    in the time there is, else the last.

    Args:
        short_side_px: of the images.
        device: cuda, mps or cpu, which does not have the largest one.
        preset, side_px: of these only, where the user gave them.
    """
    found: list[Scale] = []
    for scale in SCALES[1:] if device == "cpu" else SCALES:
        side = side_px or default_image_size(short_side_px, device, preset or scale.preset)
        scale = Scale(preset or ("nano" if side <= THUMBNAIL_PX else scale.preset), side)
        found += [scale] if scale not in found else []
    return found


def default_image_size(short_side_px: int, device: str, preset: str | None = None) -> int:
    """192 px as published, 96 px on a CPU and for micro, 64 px for pico; for smaller images the largest multiple of 32 that
    they reach, at least 32.

    Args:
        short_side_px: of the images.
        device: cuda, mps or cpu.
        preset: of the encoder, where it is known.
    """
    largest = dict(SCALES).get(preset or "", SCALES[0].side_px)
    return min(max(short_side_px // 32 * 32, 32), largest, CPU_SIDE_PX if device == "cpu" else largest)


def plain_size(size: tuple[int, int]) -> int | tuple[int, int]:
    """One number for a square, as settings state it; else (height, width)."""
    return size[0] if size[0] == size[1] else size


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """One number for both sides, or (height, width) as they are: the inverse of `plain_size`."""
    return (size, size) if isinstance(size, int) else size


def encoder_channels(pretrained: int, images: int) -> int:
    """Input channels of a pre-trained encoder on new images.

    Gray and color images are converted to what the encoder was trained on. To any other number of channels the encoder is
    adapted.
    """
    return pretrained if {pretrained, images} <= {1, 3} else images


def default_preset(side_px: int, device: str) -> str:
    """A preset that the machine trains in hours: nano for images up to 48 px, else micro on a CPU and tiny on a GPU."""
    if side_px <= THUMBNAIL_PX:
        return "nano"
    return "micro" if device == "cpu" else "tiny"


def default_mask_unit(size: tuple[int, int], patch_size: int) -> int:
    """The largest unit up to 32 px of which at least six fit on each side, as 32 px at 192 px; where none does, four or two.

    Raises:
        ValueError: when no multiple of the patch size divides the image.
    """
    fitting = [unit for unit in range(patch_size, 33, patch_size) if size[0] % unit == 0 and size[1] % unit == 0]
    for units_per_side in (6, 4, 2):
        large_enough = [unit for unit in fitting if min(size) // unit >= units_per_side]
        if large_enough:
            return max(large_enough)
    raise ValueError(
        f"no mask unit fits images of {size[0]}×{size[1]} px with patches of {patch_size} px: "
        f"give an image size that is a multiple of {patch_size}"
    )


def default_pretraining_epochs(num_images: int) -> float:
    """800 as published; for more than 25,000 images as many as make 20 million crops, at least 100."""
    return float(min(max(math.ceil(20e6 / num_images), 100), 800))


LEAST_STEPS = 500  # of a fine-tuning


def default_finetuning_epochs(
    num_images: int, batch_size: int, least_steps: int = LEAST_STEPS, usual: float | None = None
) -> float:
    """`usual`, else 100 as published, 30 for more than 20,000 images; more where those make fewer than `least_steps`."""
    return float(max(math.ceil(least_steps * batch_size / num_images), usual or (30 if num_images > 20_000 else 100)))


def default_ema(steps: int) -> float:
    """Decay of the moving average of weights: an average over the last twentieth of a run, at most 0.9999.

    By then the cosine schedule is nearly at its end, so the average does not lag behind the weights.
    """
    return min(1 - 1 / max(steps / 20, 1), 0.9999)


def default_batch_size(device: str, small: bool, multiple: int = 1) -> int:
    """Images per optimizer step.

    Args:
        device: cuda, mps or cpu.
        small: as `EncoderConfig.is_small`.
        multiple: of which each device's batch is a multiple. What comes out is one of it and of a power of two, so that it
            divides among devices.
    """
    images = {("cpu", True): 128, ("cpu", False): 32}.get((device, small), 512 if small else 128)
    for power in (16, 8, 4, 2, 1):
        if images >= 4 * power * multiple:
            return images // (power * multiple) * power * multiple
    return multiple
