"""What the user leaves open of self-training, as it follows from labels, images and machine, and why."""

from __future__ import annotations

from dataclasses import replace

from simmim.defaults import default_batch_size
from simmim.encoders.base import EncoderConfig
from simmim.finetune.augment.color import ColorSettings, check_kornia, has_kornia
from simmim.finetune.classification.defaults import THUMBNAIL_PX
from simmim.finetune.classification.settings import ClassificationSettings

RATIO = 5
LABELED_SHARE = 4  # with five unlabeled images for each labeled one a step costs at most twice as much as on labels alone
MIN_STEPS, MAX_STEPS, PASSES = 700, 4000, 20
EMA = 0.99
RAND_AUGMENT, ERASING = 9.0, 0.5


def resolve_self_training(
    settings: ClassificationSettings, num_unlabeled: int, encoder: EncoderConfig, device: str
) -> tuple[ClassificationSettings, list[str]]:
    """Settings with ratio, batch size, length, teacher and strong views resolved, and a line for each choice: the value,
    then why. What does not depend on the unlabeled images stays open.

    Args:
        settings: with image size and the encoder's settings resolved.
        num_unlabeled: images.
        encoder: as it is trained.
        device: cuda, mps or cpu.

    Raises:
        ValueError: where the weights are not to be averaged, or kornia is needed and missing.
    """
    if settings.optim.ema == 0:
        raise ValueError(
            "optim.ema is 0: with data.unlabeled the average of the weights is the teacher, give a decay below 1"
        )
    settings, reasons = resolve_length(settings, num_unlabeled, encoder, device)
    if settings.optim.ema is None:
        settings = replace(settings, optim=replace(settings.optim, ema=EMA))
        reasons.append(f"teacher: the average of the weights over about {1 / (1 - EMA):.0f} steps, decay {EMA:g}")
    settings, view_reasons = resolve_strong_views(settings)
    return settings, [*reasons, *view_reasons]


def resolve_length(
    settings: ClassificationSettings, num_unlabeled: int, encoder: EncoderConfig, device: str
) -> tuple[ClassificationSettings, list[str]]:
    """Settings with ratio, batch size and number of steps resolved, and the reasons."""
    reasons = []
    chosen, batch_size, steps = settings.self_training, settings.batch_size, settings.steps
    if chosen.ratio is None:
        chosen = replace(chosen, ratio=RATIO)
        reasons.append(f"{RATIO} unlabeled images per labeled one: those without a confident pseudo-label cost little")
    if batch_size is None:
        whole = default_batch_size(device, encoder.is_small)
        batch_size = max(whole // LABELED_SHARE, 1)
        reasons.append(
            f"batch size {batch_size}: labeled images of a step, a quarter of the {whole} of a run on labels alone"
        )
    if settings.epochs is None and steps is None:
        images_per_step = batch_size * chosen.ratio
        steps = round(min(max(PASSES * num_unlabeled / images_per_step, MIN_STEPS), MAX_STEPS))
        seen = steps * images_per_step / num_unlabeled
        reasons.append(f"{steps:,} steps: each unlabeled image is seen about {seen:.2g} times")
    return replace(settings, self_training=chosen, batch_size=batch_size, steps=steps), reasons


def resolve_strong_views(settings: ClassificationSettings) -> tuple[ClassificationSettings, list[str]]:
    """Settings with the strong views resolved, and why. Thumbnails are too small for remapped colors, as in
    `simmim.finetune.classification.defaults`."""
    chosen, side_px = settings.self_training, min(settings.size)
    thumbnail = side_px <= THUMBNAIL_PX
    defaults = {"rand_augment": 0.0 if thumbnail else RAND_AUGMENT, "erasing": 0.0 if thumbnail else ERASING}
    if chosen.rand_augment is None and not has_kornia():
        defaults["rand_augment"] = 0.0
    changes = {name: value for name, value in defaults.items() if getattr(chosen, name) is None}
    chosen = replace(chosen, **changes)
    check_kornia(ColorSettings(chosen.rand_augment or 0.0))
    values = ", ".join(f"{name} {value:g}" for name, value in changes.items())
    reasons = [f"strong views of unlabeled images, {values}: for images of {side_px} px"] if changes else []
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
