"""What the user leaves open of self-training, as it follows from labels, images and machine, and why: what tasks share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simmim.defaults import default_batch_size
from simmim.encoders.base import EncoderConfig

# The teacher gets better from step to step: at equal cost many small steps are worth more than few large ones.
LABELED_SHARE = 8
MIN_STEPS, MAX_STEPS, PASSES = 1500, 6000, 20
EMA = 0.97
WARMUP = 0.05


def resolve_teacher(
    settings: Any, num_labels: int, num_unlabeled: int, encoder: EncoderConfig, device: str, ratio: tuple[int, str]
) -> tuple[Any, list[str]]:
    """Settings with ratio, batch size, length and teacher resolved, and a line for each choice: the value, then why. What
    does not depend on the unlabeled images stays open.

    Args:
        settings: `TransferSettings` with `self_training`, image size and the encoder's settings resolved.
        num_labels, num_unlabeled: images.
        encoder: as it is trained.
        device: cuda, mps or cpu.
        ratio: unlabeled images per labeled one, and why.

    Raises:
        ValueError: where the weights are not to be averaged; as `start_step`.
    """
    if settings.optim.ema == 0:
        raise ValueError(
            "optim.ema is 0: with data.unlabeled the average of the weights is the teacher, give a decay below 1"
        )
    settings, reasons = resolve_length(settings, num_labels, num_unlabeled, encoder, device, ratio)
    if settings.optim.ema is None:
        settings = replace(settings, optim=replace(settings.optim, ema=EMA))
        reasons.append(f"teacher: the average of the weights over about {1 / (1 - EMA):.0f} steps, decay {EMA:g}")
    if settings.optim.warmup_epochs is None:
        epochs = settings.epochs or settings.steps * settings.batch_size / num_labels
        settings = replace(settings, optim=replace(settings.optim, warmup_epochs=WARMUP * epochs))
        reasons.append(f"warm-up over {WARMUP:.0%} of the steps: epochs of a few labels say little")
    start_step(settings, num_labels)
    return settings, reasons


def resolve_length(
    settings: Any, num_labels: int, num_unlabeled: int, encoder: EncoderConfig, device: str, ratio: tuple[int, str]
) -> tuple[Any, list[str]]:
    """Settings with ratio, batch size and number of steps resolved, and the reasons; arguments as of `resolve_teacher`."""
    reasons = []
    chosen, batch_size, steps = settings.self_training, settings.batch_size, settings.steps
    if chosen.ratio is None:
        chosen = replace(chosen, ratio=ratio[0])
        reasons.append(f"{ratio[0]} unlabeled images per labeled one: {ratio[1]}")
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


def start_step(settings: Any, num_labels: int) -> int:
    """The first step with pseudo-labels, of settings whose length is resolved.

    Args:
        num_labels: training images with labels.

    Raises:
        ValueError: when the run ends before it.
    """
    num_steps = settings.steps or settings.num_steps(num_labels)
    start = round(settings.self_training.start * num_steps)
    if start >= num_steps:
        raise ValueError(
            f"self_training.start is {settings.self_training.start:g}: of {num_steps:,} steps none is left for the "
            "unlabeled images; give a smaller share, or more steps"
        )
    return start
