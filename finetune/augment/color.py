"""RandAugment and color jitter of labeled images: drawn per image from its seed, applied by kornia on the device.

Images are grouped by operation, so that each image has its own operations and a batch still needs few calls. Movements of
pixels (rotation, shear, translation) are matrices, so that they are one warp with all other movements.

All operations are of values in [0, 1]: levels of 8 bits by 255, and deep values as shares of their channel's range in the
collection. A deep copy of an 8-bit image, read by the range of its type, is changed as the image is, and its result is not
rounded to levels. Pixels without data stay without, and count in no stretch and no histogram.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simmim.data import without_holes

MAX_MAGNITUDE = 10.0
LAST_LEVEL = 255  # of 8 bits
PROBABILITY = 0.5  # that an operation is applied once it is drawn, as in the code of the published recipes

MOVEMENTS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TONE = ("brightness", "contrast", "sharpness")
REMAPPINGS = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BY_DISTRIBUTION = ("auto_contrast", "equalize")  # of the image's own values, of which NaN is none


@dataclass(frozen=True)
class Change:
    """One operation for one image.

    Attributes:
        name: of the operation.
        level: its strength, 0 to 1.
        sign: direction, -1 or 1, where there are two.
    """

    name: str
    level: float
    sign: int


@dataclass(frozen=True)
class ColorSettings:
    """Random changes of colors; all zero for none.

    Args:
        rand_augment: magnitude of RandAugment (arXiv 1909.13719), 0 to 10.
        operations: number of its operations per image, each applied with probability one half.
        spread: standard deviation of the magnitude over images.
        jitter: brightness, contrast and saturation are scaled by 1 − jitter to 1 + jitter.
    """

    rand_augment: float = 0.0
    operations: int = 2
    spread: float = 0.5
    jitter: float = 0.0

    @property
    def active(self) -> bool:
        """Whether there is any change."""
        return self.rand_augment > 0 or self.jitter > 0

    def draw_changes(self, seeds: Sequence[int], channels: int) -> list[list[Change]]:
        """RandAugment's operations for each seed, in order, at most `operations`.

        Args:
            channels: of the images; they determine which operations there are, see `operations_for`.
        """
        if self.rand_augment <= 0:
            return [[] for _ in seeds]
        names, changes = operations_for(channels), []
        for seed in seeds:
            generator = random.Random(f"{seed}/rand-augment")
            of_image = []
            for _ in range(self.operations):
                name, applied = generator.choice(names), generator.random() < PROBABILITY
                level = generator.gauss(self.rand_augment, self.spread) / MAX_MAGNITUDE
                sign = generator.choice((-1, 1))
                if applied:
                    of_image.append(Change(name, min(max(level, 0.0), 1.0), sign))
            changes.append(of_image)
        return changes

    def draw_jitter(self, seeds: Sequence[int]) -> Tensor:
        """Factors of brightness, contrast and saturation for B seeds: (3, B) float32."""
        low, high = max(0.0, 1 - self.jitter), 1 + self.jitter
        # The text keeps its first spelling: another one would change every draw.
        generators = [random.Random(f"{seed}/colour-jitter") for seed in seeds]
        return torch.tensor([[generator.uniform(low, high) for _ in range(3)] for generator in generators]).T


def operations_for(channels: int) -> tuple[str, ...]:
    """RandAugment's operations for images with a number of channels: all for three, all but saturation for one. With other
    numbers channels are measurements, and none is applied that remaps values channel by channel."""
    if channels == 3:
        return MOVEMENTS + TONE + REMAPPINGS + ("saturation",)
    return MOVEMENTS + TONE + (REMAPPINGS if channels == 1 else ())


def recolor(
    images: Tensor,
    seeds: Sequence[int],
    changes: Sequence[Sequence[Change]],
    settings: ColorSettings,
    mean: Sequence[float] | None = None,
) -> Tensor:
    """Apply jitter, and then the changes that are not movements.

    Args:
        images: (B, channels, height, width), uint8, or shares in [0, 1] with NaN where there is no data.
        seeds, changes: one per image.
        mean: one per channel, of values in [0, 1], which stands for pixels without data beside those that have some; one
            half by default.

    Returns:
        The same shape and dtype, NaN where it was.
    """
    color = [[change for change in of_image if change.name not in MOVEMENTS] for of_image in changes]
    changed_rows = range(len(images)) if settings.jitter else [row for row, of_image in enumerate(color) if of_image]
    if not len(changed_rows):
        return images
    rows = torch.tensor(list(changed_rows), device=images.device)
    is_deep = images.is_floating_point()
    values = images[rows].float() if is_deep else images[rows].float() / 255
    holes = values.isnan() if is_deep else None
    values = values if holes is None else without_holes(values, mean or [0.5] * values.shape[1])
    if settings.jitter:
        values = jitter(values, settings.draw_jitter([seeds[row] for row in changed_rows]))
    for turn in range(max((len(of_image) for of_image in color), default=0)):
        groups: dict[str, list[tuple[int, Change]]] = {}
        for position, row in enumerate(changed_rows):
            if turn < len(color[row]):
                groups.setdefault(color[row][turn].name, []).append((position, color[row][turn]))
        for name, members in groups.items():
            positions = torch.tensor([position for position, _ in members], device=images.device)
            arguments = torch.tensor([argument_of(change) for _, change in members], device=images.device)
            if holes is None:
                values[positions] = OPERATIONS[name](values[positions], arguments)
            else:
                values[positions] = apply_to_deep(name, values[positions], arguments, holes[positions])
    changed = images.clone()
    if holes is not None:
        changed[rows] = values.clamp(0, 1).masked_fill(holes, torch.nan).to(images.dtype)
    else:
        changed[rows] = (values * 255).round().clamp(0, 255).to(torch.uint8)
    return changed


def apply_to_deep(name: str, values: Tensor, arguments: Tensor, holes: Tensor) -> Tensor:
    """An operation on deep values; pixels without data keep theirs where it looks at the distribution.

    Args:
        values: (B, channels, height, width) in [0, 1].
        holes: bool of the same shape, True = no data.
    """
    operation = equalize_deep if name == "equalize" else OPERATIONS[name]
    if name not in BY_DISTRIBUTION:
        return operation(values, arguments)
    return torch.where(holes, values, operation(values.masked_fill(holes, torch.nan), arguments))


def jitter(values: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness, contrast and, for three channels, saturation.

    Args:
        values: (B, channels, height, width) in [0, 1].
        factors: (3, B).
    """
    factors = factors.to(values)
    values = contrast(brightness(values, factors[0]), factors[1])
    return saturation(values, factors[2]) if values.shape[1] == 3 else values


def movement_matrices(changes: Sequence[Sequence[Change]]) -> Tensor | None:
    """The movements among the changes, as matrices for `simmim.finetune.augment.affine.warp`, (B, 2, 3); None without any.

    Level 1 is a rotation of 30°, a shear of 0.3, a translation of 0.45 of the side.
    """
    if not any(change.name in MOVEMENTS for of_image in changes for change in of_image):
        return None
    matrices = torch.eye(3).repeat(len(changes), 1, 1)
    for row, of_image in enumerate(changes):
        for change in of_image:
            if change.name in MOVEMENTS:
                # Matrices lead from output to input: a later change looks its pixels up in the output of the earlier one.
                matrices[row] = matrices[row] @ movement_matrix(change)
    return matrices[:, :2]


def movement_matrix(change: Change) -> Tensor:
    """One movement as a (3, 3) matrix from output to input, in coordinates from −1 to 1."""
    matrix, amount = torch.eye(3), change.sign * change.level
    if change.name == "rotate":
        angle = math.radians(30 * amount)
        matrix[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    elif change.name == "shear_x":
        matrix[0, 1] = 0.3 * amount
    elif change.name == "shear_y":
        matrix[1, 0] = 0.3 * amount
    elif change.name == "translate_x":
        matrix[0, 2] = 2 * 0.45 * amount
    else:
        matrix[1, 2] = 2 * 0.45 * amount
    return matrix


# --- Operations on values in [0, 1], (B, channels, height, width), with one argument per image --------------------------


def argument_of(change: Change) -> float:
    """The argument of an operation.

    The change grows with the level, as in the "increasing" variant of the published recipes: factors of 1 ± 0.9, 4 bits down
    to 1, thresholds from 1 down to 0, additions up to 0.43.
    """
    if change.name in ("brightness", "contrast", "saturation", "sharpness"):
        return 1 + change.sign * 0.9 * change.level
    if change.name == "posterize":
        return float(max(4 - int(4 * change.level), 1))
    if change.name == "solarize":
        return 1 - change.level
    return 0.43 * change.level


def brightness(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply by a factor."""
    from kornia.enhance import adjust_brightness_accumulative

    return adjust_brightness_accumulative(values, factors)


def contrast(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply the difference from the image's mean gray by a factor."""
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(values, factors)


def saturation(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply the difference from gray by a factor."""
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(values, factors)


def sharpness(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply the difference from the smoothed image by a factor. Images under 3 px are not changed."""
    from kornia.enhance import sharpness as kornia_sharpness

    return kornia_sharpness(values, factors) if min(values.shape[-2:]) >= 3 else values


def auto_contrast(values: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to [0, 1]. A channel of a single value is not changed. NaN is no value, and stays."""
    low, high = (
        values.nan_to_num(nan=torch.inf).amin(dim=(-2, -1), keepdim=True),
        values.nan_to_num(nan=-torch.inf).amax(dim=(-2, -1), keepdim=True),
    )
    return torch.where(high > low, (values - low) / (high - low).clamp(min=1e-6), values)


def equalize(values: Tensor, _: Tensor) -> Tensor:
    """Equalize the histogram of each channel."""
    from kornia.enhance import equalize as kornia_equalize

    return kornia_equalize(values)


def equalize_deep(values: Tensor, _: Tensor) -> Tensor:
    """Equalize the histogram of each channel, where each value has a bin of its own: as `equalize` does with 256 levels, of
    which deep values would lose what is between them, and without its rounding. NaN is no value, and stays.
    """
    planes = values.flatten(2).flatten(0, 1)
    count = (~planes.isnan()).sum(dim=1, keepdim=True)
    ordered = planes.nan_to_num(nan=torch.inf).sort(dim=1).values
    below = torch.searchsorted(ordered, planes.contiguous())  # of each pixel, those with smaller values
    highest = ordered.gather(1, (count - 1).clamp(min=0))
    num_highest = count - torch.searchsorted(ordered, highest)
    step = (count - num_highest) // LAST_LEVEL
    equalized = (below / (step.clamp(min=1) * LAST_LEVEL)).clamp(max=1).to(planes.dtype)
    return torch.where((step == 0) | planes.isnan(), planes, equalized).reshape(values.shape)


def invert(values: Tensor, _: Tensor) -> Tensor:
    """Subtract from 1."""
    return 1 - values


def posterize(values: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits only."""
    from kornia.enhance import posterize as kornia_posterize

    return kornia_posterize(values, bits.to(torch.int64))


def solarize(values: Tensor, thresholds: Tensor) -> Tensor:
    """Invert values from a threshold on."""
    return torch.where(values >= thresholds.view(-1, 1, 1, 1), 1 - values, values)


def solarize_add(values: Tensor, additions: Tensor) -> Tensor:
    """Add to the dark half."""
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
    """Whether kornia, which `recolor` needs, is installed."""
    return importlib.util.find_spec("kornia") is not None


def check_kornia(settings: ColorSettings) -> None:
    """Refuse changes of color where kornia is missing.

    Raises:
        ValueError: with the command that installs it.
    """
    if settings.active and not has_kornia():
        raise ValueError(
            "data.rand_augment and data.color_jitter need kornia, which is not installed: "
            "pip install 'simmim-toolkit[finetune]', or set both to 0"
        )
