"""Defaults that follow from the images and the machine."""

from __future__ import annotations

import math

# Per channel, of values in [0, 1]: ImageNet's, by which published weights for color images are normalized.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


CPU_SIDE_PX = 96


def default_image_size(short_side_px: int, device: str) -> int:
    """192 px as published, and 96 px on a CPU; for smaller images the largest multiple of 32 that they reach, at least 32.

    A CPU sees five times as many images of 96 px in the same time. On 2,640 photographs, seven minutes of one core, 57,000
    images of 96 px, brought fine-tuning with 8 labels per class 6 points above training from scratch.

    Args:
        short_side_px: of the images.
        device: cuda, mps or cpu.
    """
    return min(max(short_side_px // 32 * 32, 32), CPU_SIDE_PX if device == "cpu" else 192)


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
    if side_px <= 48:
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


def default_finetuning_epochs(num_images: int, batch_size: int) -> float:
    """100 as published, 30 for more than 20,000 images; more where those make fewer than 500 steps."""
    return float(max(math.ceil(500 * batch_size / num_images), 30 if num_images > 20_000 else 100))


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
