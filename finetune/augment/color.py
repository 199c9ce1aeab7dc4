"""RandAugment and color jitter of labeled images: drawn image by image from their seeds, done by kornia on the device.

Images are grouped by operation, so that every image has operations of its own and a batch still costs a few calls. What
moves pixels (rotation, shear, translation) is given as matrices, so that it is one warp with all other such changes.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HIGHEST_MAGNITUDE = 10.0
# What an operation is applied by once it is drawn, as in the published recipes' code.
PROBABILITY = 0.5

MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
BRIGHTNESSES = ("brightness", "contrast", "sharpness")
REMAPPING = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")


@dataclass(frozen=True)
class Change:
    """One operation for one image.

    Attributes:
        name: of the operation.
        level: its strength, 0 to 1.
        sign: which way, -1 or 1, where there are two ways.
    """

    name: str
    level: float
    sign: int


@dataclass(frozen=True)
class ColorSettings:
    """How images' values are changed; all zero for not at all.

    Args:
        rand_augment: magnitude of RandAugment (arXiv 1909.13719), 0 to 10.
        operations: how many of its operations an image goes through, each with probability one half.
        spread: standard deviation of the magnitude from image to image.
        jitter: brightness, contrast and saturation are scaled by 1 − jitter to 1 + jitter.
    """

    rand_augment: float = 0.0
    operations: int = 2
    spread: float = 0.5
    jitter: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self.rand_augment > 0 or self.jitter > 0

    def drawn(self, seeds: Sequence[int], channels: int) -> list[list[Change]]:
        """RandAugment's operations for each seed, in order, at most `operations` of them.

        Args:
            channels: of the images, by which operations make sense, see `operations_for`.
        """
        if self.rand_augment <= 0:
            return [[] for _ in seeds]
        names, changes = operations_for(channels), []
        for seed in seeds:
            generator = random.Random(f"{seed}/rand-augment")
            of_image = []
            for _ in range(self.operations):
                name, taken = generator.choice(names), generator.random() < PROBABILITY
                level = generator.gauss(self.rand_augment, self.spread) / HIGHEST_MAGNITUDE
                sign = generator.choice((-1, 1))
                if taken:
                    of_image.append(Change(name, min(max(level, 0.0), 1.0), sign))
            changes.append(of_image)
        return changes

    def jitters(self, seeds: Sequence[int]) -> Tensor:
        """Factors of brightness, contrast and saturation for each seed: (3, B) float32."""
        low, high = max(0.0, 1 - self.jitter), 1 + self.jitter
        # The text keeps its first spelling: another one would change every draw.
        generators = [random.Random(f"{seed}/colour-jitter") for seed in seeds]
        return torch.tensor([[generator.uniform(low, high) for _ in range(3)] for generator in generators]).T


def operations_for(channels: int) -> tuple[str, ...]:
    """RandAugment's operations that make sense for images of so many channels: all for three, all but saturation for one,
    and for other counts, whose bands are measurements, none that remaps values band by band."""
    if channels == 3:
        return MOVING + BRIGHTNESSES + REMAPPING + ("saturation",)
    return MOVING + BRIGHTNESSES + (REMAPPING if channels == 1 else ())


def recolor(images: Tensor, seeds: Sequence[int], changes: Sequence[Sequence[Change]], settings: ColorSettings) -> Tensor:
    """Images with jitter and then with those of the changes that are not movements.

    Args:
        images: (B, channels, height, width) uint8.
        seeds, changes: one an image.

    Returns:
        The same shape and type.
    """
    color = [[change for change in of_image if change.name not in MOVING] for of_image in changes]
    touched = range(len(images)) if settings.jitter else [row for row, of_image in enumerate(color) if of_image]
    if not len(touched):
        return images
    rows = torch.tensor(list(touched), device=images.device)
    values = images[rows].float() / 255
    if settings.jitter:
        values = jittered(values, settings.jitters([seeds[row] for row in touched]))
    for turn in range(max((len(of_image) for of_image in color), default=0)):
        groups: dict[str, list[tuple[int, Change]]] = {}
        for place, row in enumerate(touched):
            if turn < len(color[row]):
                groups.setdefault(color[row][turn].name, []).append((place, color[row][turn]))
        for name, members in groups.items():
            places = torch.tensor([place for place, _ in members], device=images.device)
            amounts = torch.tensor([amount(change) for _, change in members], device=images.device)
            values[places] = OPERATIONS[name](values[places], amounts)
    changed = images.clone()
    changed[rows] = (values * 255).round().clamp(0, 255).to(torch.uint8)
    return changed


def jittered(values: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and, of three channels, saturation scaled by factors, (3, B); values in [0, 1]."""
    factors = factors.to(values)
    values = contrast(brightness(values, factors[0]), factors[1])
    return saturation(values, factors[2]) if values.shape[1] == 3 else values


def movements(changes: Sequence[Sequence[Change]]) -> Tensor | None:
    """What the changes move, as matrices for `simmim.finetune.augment.affine.warp`, (B, 2, 3); None where nothing moves.

    At level 1: 30° of rotation, a shear of 0.3, a translation of 0.45 of the side.
    """
    if not any(change.name in MOVING for of_image in changes for change in of_image):
        return None
    matrices = torch.eye(3).repeat(len(changes), 1, 1)
    for row, of_image in enumerate(changes):
        for change in of_image:
            if change.name in MOVING:
                # A later change's output is looked up in what the earlier made: matrices lead from output to input.
                matrices[row] = matrices[row] @ movement(change)
    return matrices[:, :2]


def movement(change: Change) -> Tensor:
    """One movement as a (3, 3) matrix from output to input, in coordinates from −1 to 1."""
    matrix, much = torch.eye(3), change.sign * change.level
    if change.name == "rotate":
        angle = math.radians(30 * much)
        matrix[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    elif change.name == "shear_x":
        matrix[0, 1] = 0.3 * much
    elif change.name == "shear_y":
        matrix[1, 0] = 0.3 * much
    elif change.name == "translate_x":
        matrix[0, 2] = 2 * 0.45 * much
    else:
        matrix[1, 2] = 2 * 0.45 * much
    return matrix


# --- Operations on values in [0, 1], (B, channels, height, width), with an amount an image -----------------------------


def amount(change: Change) -> float:
    """What an operation takes. Changes grow with the level, as in the "increasing" variant that the published recipes use:
    factors of 1 ± 0.9, 4 bits down to 1, thresholds from 1 down to 0, additions up to 0.43."""
    if change.name in ("brightness", "contrast", "saturation", "sharpness"):
        return 1 + change.sign * 0.9 * change.level
    if change.name == "posterize":
        return float(max(4 - int(4 * change.level), 1))
    if change.name == "solarize":
        return 1 - change.level
    return 0.43 * change.level


def brightness(values: Tensor, factors: Tensor) -> Tensor:
    """Times a factor."""
    from kornia.enhance import adjust_brightness_accumulative

    return adjust_brightness_accumulative(values, factors)


def contrast(values: Tensor, factors: Tensor) -> Tensor:
    """Distance from the image's mean gray, times a factor."""
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(values, factors)


def saturation(values: Tensor, factors: Tensor) -> Tensor:
    """Distance from gray, times a factor."""
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(values, factors)


def sharpness(values: Tensor, factors: Tensor) -> Tensor:
    """Distance from a smoothed image, times a factor; images under 3 px have none and stay."""
    from kornia.enhance import sharpness as sharpened

    return sharpened(values, factors) if min(values.shape[-2:]) >= 3 else values


def auto_contrast(values: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; one of a single value stays."""
    low, high = values.amin(dim=(-2, -1), keepdim=True), values.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp(min=1e-6), values)


def equalize(values: Tensor, _: Tensor) -> Tensor:
    """Each channel's histogram made level."""
    from kornia.enhance import equalize as equalized

    return equalized(values)


def invert(values: Tensor, _: Tensor) -> Tensor:
    """Bright for dark."""
    return 1 - values


def posterize(values: Tensor, bits: Tensor) -> Tensor:
    """Only the highest bits kept."""
    from kornia.enhance import posterize as posterized

    return posterized(values, bits.to(torch.int64))


def solarize(values: Tensor, thresholds: Tensor) -> Tensor:
    """Inverted from a threshold on."""
    return torch.where(values >= thresholds.view(-1, 1, 1, 1), 1 - values, values)


def solarize_add(values: Tensor, additions: Tensor) -> Tensor:
    """Dark half made brighter."""
    return torch.where(values < 0.5, (values + additions.view(-1, 1, 1, 1)).clamp(max=1), values)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    operation.__name__: operation
    for operation in (
        brightness,
        contrast,
        saturation,
        sharpness,
        auto_contrast,
        equalize,
        invert,
        posterize,
        solarize,
        solarize_add,
    )
}


def has_kornia() -> bool:
    """Whether what `recolor` needs is installed."""
    return importlib.util.find_spec("kornia") is not None


def check_kornia(settings: ColorSettings) -> None:
    """Refuse changes of color where kornia is missing.

    Raises:
        ValueError: saying how to get it.
    """
    if settings.active and not has_kornia():
        raise ValueError(
            "data.rand_augment and data.color_jitter need kornia, which is not installed: "
            "pip install 'simmim-toolkit[finetune]', or set both to 0"
        )
