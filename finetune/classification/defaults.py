"""What the user leaves open of a classification run, as it follows from images, labels, encoder and machine, and why."""

from __future__ import annotations

from dataclasses import replace

from simmim.encoders.base import EncoderConfig
from simmim.finetune.augment.color import check_kornia, has_kornia
from simmim.finetune.classification.settings import ClassificationSettings, LabeledSettings
from simmim.finetune.settings import PUBLISHED_LAYER_DECAY, with_schedule

# A side in pixels up to which images are thumbnails, seen whole in evaluation.
THUMBNAIL_PX = 64
# Up to so many labels a class the first layers are kept nearer to what pre-training made of them: of 1 to 0.5, 0.65 was the
# best at 5 and 10 labels a class of real digits (configs/finetune/demo.yaml).
FEW_A_CLASS, LAYER_DECAY_OF_FEW = 20, 0.65
# From so many images a class on, sets are large enough for what the papers do to ImageNet's 1,300 a class.
MANY_A_CLASS = 500


def completed(
    settings: ClassificationSettings, count: int, classes: int, encoder: EncoderConfig, device: str
) -> tuple[ClassificationSettings, list[str]]:
    """Settings with nothing left open, and a line for each choice: what was chosen, then why.

    Args:
        settings: with image size and what belongs to the encoder filled in.
        count: training images.
        encoder: as it is trained.

    Raises:
        ValueError: where augmentation is asked for whose library is missing; as `with_schedule`.
    """
    small = encoder.is_small
    given = settings
    if settings.optim.layer_decay is None:
        few = count / classes <= FEW_A_CLASS
        decay = LAYER_DECAY_OF_FEW if few else PUBLISHED_LAYER_DECAY
        settings = replace(settings, optim=replace(settings.optim, layer_decay=decay))
    settings = with_schedule(settings, count, device, small)
    reasons = schedule_reasons(given, settings, count, device, small)
    if given.optim.layer_decay is None:
        why = f"for {count / classes:,.0f} labels a class" if few else "as published"
        reasons.append(f"layer decay {decay:g}: {why}")
    data, more = with_augmentation(settings.data, min(settings.size), encoder.in_channels, count / classes)
    check_kornia(data.changes().color)
    return replace(settings, data=data), [*reasons, *more]


def schedule_reasons(
    given: ClassificationSettings, settings: ClassificationSettings, count: int, device: str, small: bool
) -> list[str]:
    """Why length, batch, rate, averaging and stochastic depth are what they are, where they were open."""
    steps = settings.epochs * count / settings.batch_size
    reasons = []
    if given.batch_size is None:
        whole = settings.batch_size == count
        why = "all training images" if whole else f"a {'small' if small else 'large'} encoder on {device}"
        reasons.append(f"batch {settings.batch_size}: {why}")
    if given.epochs is None and given.steps is None:
        why = {100.0: "as published", 30.0: "for more than 20,000 images"}.get(settings.epochs, "which make 500 steps")
        reasons.append(f"{settings.epochs:g} epochs: {why}")
    if given.optim.lr is None:
        why = "for nano and micro" if small else "as published"
        reasons.append(f"learning rate {settings.optim.lr:g} per 512 images: {why}")
    if given.optim.ema is None and settings.optim.ema:
        over = 1 / (1 - settings.optim.ema)
        reasons.append(f"averaged weights, decay {settings.optim.ema:.4g}: over about {over:,.0f} of {steps:,.0f} steps")
    return reasons


def with_augmentation(
    data: LabeledSettings, side_px: int, channels: int, images_per_class: float
) -> tuple[LabeledSettings, list[str]]:
    """Data settings with augmentation and evaluation crop filled in, and the reasons.

    Thumbnails have no room for boxes and remapped colors, and gray ones are mostly signs, which a mirror turns into others
    and a crop cuts; rotations, shears and shifts serve them best.
    Mixing images pays where there are many and the run is long; with few labels it keeps a short run from learning them.
    """
    thumbnail, many = side_px <= THUMBNAIL_PX, images_per_class >= MANY_A_CLASS
    if thumbnail:
        kind = f"{'gray' if channels == 1 else 'color'} images of {side_px} px"
        chosen = {
            "crop_scale": (1.0, 1.0) if channels == 1 else (0.5, 1.0),
            "flip": 0.0 if channels == 1 else 0.5,
            "rand_augment": 0.0,
            "erasing": 0.0,
        }
    else:
        kind = f"images of {side_px} px"
        chosen = {
            "crop_scale": (0.08, 1.0) if many else (0.3, 1.0),
            "flip": 0.5,
            "rand_augment": 9.0 if channels == 3 else 5.0,
            "erasing": 0.25 if many else 0.0,
        }
    mixed = many and not thumbnail
    chosen |= {"color_jitter": 0.0, "mixup": 0.8 if mixed else 0.0, "cutmix": 1.0 if mixed else 0.0}
    chosen["evaluation_crop"] = 1.0 if thumbnail else 0.875
    missing = chosen["rand_augment"] > 0 and data.rand_augment is None and not has_kornia()
    if missing:
        chosen["rand_augment"] = 0.0
    filled = {name: value for name, value in chosen.items() if getattr(data, name) is None}
    reasons = []
    if filled:
        labels = f"{images_per_class:,.0f} labels a class"
        shown = ", ".join(f"{name} {described(value)}" for name, value in filled.items())
        reasons.append(f"{shown}: for {kind} and {labels}")
    if missing:
        reasons.append("no RandAugment: kornia is not installed (pip install 'simmim-toolkit[finetune]')")
    return replace(data, **filled), reasons


def described(value: float | tuple[float, float]) -> str:
    """A setting's value in words."""
    if value == (1.0, 1.0):
        return "1"
    return f"{value[0]:g} to {value[1]:g}" if isinstance(value, tuple) else f"{value:g}"
