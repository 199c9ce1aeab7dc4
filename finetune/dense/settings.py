"""What the settings of the labeled images share between tasks whose labels are places in images, and their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from simmim.defaults import LEAST_STEPS
from simmim.finetune.augment.color import ColorSettings, check_kornia, has_kornia
from simmim.finetune.settings import PUBLISHED_LAYER_DECAY, ScenesSettings, TransferSettings, resolve_schedule

JITTER = 0.25  # half of the published segmentation pipeline's, which is for thousands of images


@dataclass(frozen=True)
class ScaledScenesSettings(ScenesSettings):
    """Labeled images that are seen at a scale, as crops in training.

    Args:
        short_side: pixels to which the shorter side of an image is resized before anything else; by default the shorter side
            of image_size, so that a crop shows about as much as in pre-training; 0 keeps the image's own.
        scale: range of the random scale in training, drawn on a log scale.
        flip: probability of mirroring left and right.
        color_jitter: brightness, contrast and saturation are scaled by 1 − color_jitter to 1 + color_jitter; by default
            0.25 where kornia is installed, else 0.
    """

    short_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    color_jitter: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale", tuple(self.scale))
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"data.scale is {self.scale}: give factors, 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}: give a probability")
        if self.color_jitter is not None and not 0 <= self.color_jitter < 1:
            raise ValueError(f"data.color_jitter is {self.color_jitter}: give a share in [0, 1), 0 for none")
        if self.short_side is not None and self.short_side < 0:
            raise ValueError(f"data.short_side is {self.short_side}: give pixels, or 0 to leave images as they are")


def check_inference(inference: str, known: Sequence[str]) -> None:
    """Check how images of any size are passed.

    Raises:
        ValueError: for a way that is not known.
    """
    if inference not in known:
        raise ValueError(f"data.inference is {inference!r}: give one of {', '.join(known)}")


Data = TypeVar("Data", bound=ScaledScenesSettings)
Run = TypeVar("Run", bound=TransferSettings)


def resolve_views(data: Data, side_px: int) -> tuple[Data, list[str]]:
    """Scale and color jitter, and a line for each choice that needs a reason.

    Args:
        side_px: the shorter side of the crops.

    Raises:
        ValueError: where kornia is needed and missing.
    """
    reasons, jitter = [], data.color_jitter
    if jitter is None:
        jitter = JITTER if has_kornia() else 0.0
        if not jitter:
            reasons.append("no color jitter: kornia is not installed (pip install 'simmim-toolkit[finetune]')")
    check_kornia(ColorSettings(jitter=jitter))
    short_side = side_px if data.short_side is None else data.short_side
    return replace(data, short_side=short_side, color_jitter=jitter), reasons


def resolve_published_lr(settings: Run, published: float, small: bool) -> Run:
    """The published learning rate where none is given, but for encoders of nano's or micro's width: most of what learns then
    is the head, at their usual rate."""
    if settings.optim.lr is not None or small:
        return settings
    return replace(settings, optim=replace(settings.optim, lr=published))


class Schedule(NamedTuple):
    """What a task takes where the user gave no batch size, length and layer decay.

    Attributes:
        batch_size: images per step, of fewer training images all; by default Swin's published one for boxes and for
            UPerNet.
        batch_reason: why, for the user.
        least_steps: of a run of few images.
        layer_decay: of the learning rate.
        epochs: as `usual` of `default_finetuning_epochs`.
    """

    batch_size: int = 16
    batch_reason: str = "as published"
    least_steps: int = LEAST_STEPS
    layer_decay: float = PUBLISHED_LAYER_DECAY
    epochs: float | None = None


def resolve_dense_schedule(
    settings: Run, num_images: int, device: str, small: bool, schedule: Schedule
) -> tuple[Run, list[str]]:
    """Settings with everything resolved that `resolve_schedule` does, and a line for batch size and length.

    Args:
        num_images, device, small: as of `resolve_schedule`.

    Raises:
        ValueError: as `resolve_schedule`.
    """
    size, _, least_steps, layer_decay, epochs = schedule
    resolved = resolve_schedule(settings, num_images, device, small, size, least_steps, layer_decay, epochs)
    reasons = []
    if settings.batch_size is None:
        reason = schedule.batch_reason if resolved.batch_size == size else "all training images"
        reasons.append(f"batch size {resolved.batch_size}: {reason}")
    if settings.epochs is None and settings.steps is None:
        known = {100.0: "as published for few images", 30.0: "for more than 20,000 images", epochs: "as published"}
        reason = known.get(resolved.epochs)
        reasons.append(f"{resolved.epochs:g} epochs: {reason or f'{least_steps:,} steps'}")
    return resolved, reasons
