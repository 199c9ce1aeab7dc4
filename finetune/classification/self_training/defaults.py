"""What the user leaves open of self-training, as it follows from labels, images and machine, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simmim.defaults import default_batch_size
from simmim.encoders.base import EncoderConfig
from simmim.finetune.augment.color import ColorSettings, check_kornia, has_kornia
from simmim.finetune.classification.defaults import THUMBNAIL_PX, images_of
from simmim.finetune.classification.settings import ClassificationSettings

RATIO = 5
# The teacher gets better from step to step: at equal cost many small steps are worth more than few large ones.
LABELED_SHARE = 8
MIN_STEPS, MAX_STEPS, PASSES = 1500, 6000, 20
EMA = 0.97
WARMUP = 0.05
SIGN_AFFINE, RAND_AUGMENT, ERASING = 1.5, 9.0, 0.5


def resolve_self_training(
    settings: ClassificationSettings, num_labels: int, num_unlabeled: int, encoder: EncoderConfig, device: str
) -> tuple[ClassificationSettings, list[str]]:
    """Settings with ratio, batch size, length, teacher and strong views resolved, and a line for each choice: the value,
    then why. What does not depend on the unlabeled images stays open.

    Args:
        settings: with image size and the encoder's settings resolved.
        num_labels, num_unlabeled: images.
        encoder: as it is trained.
        device: cuda, mps or cpu.

    Raises:
        ValueError: where the weights are not to be averaged, or kornia is needed and missing.
    """
    if settings.optim.ema == 0:
        raise ValueError(
            "optim.ema is 0: with data.unlabeled the average of the weights is the teacher, give a decay below 1"
        )
    settings, reasons = resolve_length(settings, num_labels, num_unlabeled, encoder, device)
    if settings.optim.ema is None:
        settings = replace(settings, optim=replace(settings.optim, ema=EMA))
        reasons.append(f"teacher: the average of the weights over about {1 / (1 - EMA):.0f} steps, decay {EMA:g}")
    if settings.optim.warmup_epochs is None:
        epochs = settings.epochs or settings.steps * settings.batch_size / num_labels
        settings = replace(settings, optim=replace(settings.optim, warmup_epochs=WARMUP * epochs))
        reasons.append(f"warm-up over {WARMUP:.0%} of the steps: epochs of a few labels say little")
    settings, view_reasons = resolve_strong_views(settings, encoder.in_channels)
    return settings, [*reasons, *view_reasons]


def resolve_length(
    settings: ClassificationSettings, num_labels: int, num_unlabeled: int, encoder: EncoderConfig, device: str
) -> tuple[ClassificationSettings, list[str]]:
    """Settings with ratio, batch size and number of steps resolved, and the reasons."""
    reasons = []
    chosen, batch_size, steps = settings.self_training, settings.batch_size, settings.steps
    if chosen.ratio is None:
        chosen = replace(chosen, ratio=RATIO)
        reasons.append(f"{RATIO} unlabeled images per labeled one: those without a confident pseudo-label cost little")
    if batch_size is None:
        share = max(default_batch_size(device, encoder.is_small) // LABELED_SHARE, 1)
        batch_size = min(share, num_labels)
        reason = "all labels" if batch_size == num_labels else "small, as the teacher gets better from step to step"
        reasons.append(f"batch size {batch_size}, with {batch_size * chosen.ratio} unlabeled images: {reason}")
    if settings.epochs is None and steps is None:
        images_per_step = batch_size * chosen.ratio
        steps = round(min(max(PASSES * num_unlabeled / images_per_step, MIN_STEPS), MAX_STEPS))
        seen = steps * images_per_step / num_unlabeled
        reasons.append(f"{steps:,} steps: each unlabeled image is seen about {seen:.2g} times")
    return replace(settings, self_training=chosen, batch_size=batch_size, steps=steps), reasons


def resolve_strong_views(settings: ClassificationSettings, channels: int) -> tuple[ClassificationSettings, list[str]]:
    """Settings with the strong views resolved, and why.

    As published for photographs: RandAugment and an erased box. Gray thumbnails are mostly signs, whose gray values say
    little; they are moved farther than the labeled ones.

    Args:
        channels: of the encoder.
    """
    chosen, side_px = settings.self_training, min(settings.size)
    sign = side_px <= THUMBNAIL_PX and channels == 1
    defaults = {"affine": SIGN_AFFINE if sign else 1.0, "rand_augment": 0.0 if sign else RAND_AUGMENT, "erasing": ERASING}
    if chosen.rand_augment is None and not has_kornia():
        defaults["rand_augment"] = 0.0
    changes: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(chosen, name) is None}
    chosen = replace(chosen, **changes)
    check_kornia(ColorSettings(chosen.rand_augment or 0.0))
    values = ", ".join(f"{name} {value:g}" for name, value in changes.items())
    reason = f"for {images_of(channels)} of {side_px} px"
    reasons = [f"strong views of unlabeled images, {values}: {reason}"] if changes else []
    return replace(settings, self_training=chosen), reasons


def start_step(settings: ClassificationSettings, num_labels: int) -> int:
    """The first step with pseudo-labels, once resolved.

    Args:
        num_labels: training images with labels.

    Raises:
        ValueError: when the run ends before it.
    """
    num_steps = settings.num_steps(num_labels)
    start = round(settings.self_training.start * num_steps)
    if start >= num_steps:
        raise ValueError(
            f"self_training.start is {settings.self_training.start:g}: of {num_steps:,} steps none is left for the "
            "unlabeled images; give a smaller share, or more steps"
        )
    return start
