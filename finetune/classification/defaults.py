"""What the user leaves open of a classification run, as it follows from images, labels, encoder and machine, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simmim.data import SEVERAL_VIEWS_CROP
from simmim.encoders.base import EncoderConfig
from simmim.finetune.augment.color import check_kornia, has_kornia
from simmim.finetune.classification.settings import ClassificationSettings, LabeledSettings
from simmim.finetune.settings import PUBLISHED_LAYER_DECAY, resolve_schedule
from simmim.messages import counted

THUMBNAIL_PX = 64  # images up to this side are thumbnails
# With few labels evaluation averages over crops: things are larger in the crops of training than in whole images
# (arXiv 1906.06423), and what one crop leaves in doubt others settle.
FEW_LABELS_VIEWS = 5
# With few labels the first layers stay nearer to their pre-trained weights: of 1 to 0.5, 0.65 was the best at 5 and 10
# labels per class of real digits (configs/finetune/demo.yaml).
FEW_PER_CLASS, FEW_LABELS_LAYER_DECAY = 20, 0.65
# From this number of images per class on, sets are large enough for what the papers do to ImageNet's 1,300 per class.
MANY_PER_CLASS = 500
NO_RAND_AUGMENT = "no RandAugment: kornia is not installed (pip install 'simmim-toolkit[finetune]')"


def resolve_settings(
    settings: ClassificationSettings, num_images: int, num_classes: int, encoder: EncoderConfig, device: str
) -> tuple[ClassificationSettings, list[str]]:
    """Settings with nothing left open, and a line for each choice: the value, then why.

    Args:
        settings: with image size and the encoder's settings resolved.
        num_images: training images.
        encoder: as it is trained.
        device: cuda, mps or cpu.

    Raises:
        ValueError: where kornia is needed and missing; as `resolve_schedule`.
    """
    small, per_class = encoder.is_small, num_images / num_classes
    resolved, decay_reasons = resolve_layer_decay(settings, per_class)
    resolved = resolve_schedule(resolved, num_images, device, small)
    schedule = schedule_reasons(settings, resolved, num_images, device, small)
    data, augmentation_reasons = resolve_augmentation(settings.data, min(settings.size), encoder.in_channels, per_class)
    check_kornia(data.changes().color)
    return replace(resolved, data=data), [*schedule, *decay_reasons, *augmentation_reasons]


def default_layer_decay(per_class: float) -> float:
    """The layer decay of a run with `per_class` training images per class."""
    return FEW_LABELS_LAYER_DECAY if per_class <= FEW_PER_CLASS else PUBLISHED_LAYER_DECAY


def resolve_layer_decay(settings: ClassificationSettings, per_class: float) -> tuple[ClassificationSettings, list[str]]:
    """Settings with the layer decay resolved, and the reason.

    Args:
        per_class: training images per class.
    """
    if settings.optim.layer_decay is not None:
        return settings, []
    decay = default_layer_decay(per_class)
    reason = f"for {counted(round(per_class), 'label')} per class" if decay == FEW_LABELS_LAYER_DECAY else "as published"
    return replace(settings, optim=replace(settings.optim, layer_decay=decay)), [f"layer decay {decay:g}: {reason}"]


def schedule_reasons(
    given: ClassificationSettings, resolved: ClassificationSettings, num_images: int, device: str, small: bool
) -> list[str]:
    """Why batch size, length, learning rate and averaging have their values, where the user left them open."""
    steps = resolved.epochs * num_images / resolved.batch_size
    reasons = []
    if given.batch_size is None:
        all_images = resolved.batch_size == num_images
        reason = "all training images" if all_images else f"a {'small' if small else 'large'} encoder on {device}"
        reasons.append(f"batch size {resolved.batch_size}: {reason}")
    if given.epochs is None and given.steps is None:
        reason = {100.0: "as published", 30.0: "for more than 20,000 images"}.get(resolved.epochs, "500 steps")
        reasons.append(f"{resolved.epochs:g} epochs: {reason}")
    if given.optim.lr is None:
        reason = "for nano and micro" if small else "as published"
        reasons.append(f"learning rate {resolved.optim.lr:g} per 512 images: {reason}")
    if given.optim.ema is None and resolved.optim.ema:
        over = 1 / (1 - resolved.optim.ema)
        reasons.append(f"averaged weights, decay {resolved.optim.ema:.4g}: over about {over:,.0f} of {steps:,.0f} steps")
    return reasons


def resolve_augmentation(
    data: LabeledSettings, side_px: int, channels: int, per_class: float
) -> tuple[LabeledSettings, list[str]]:
    """Data settings with augmentation and evaluation's crop resolved, and the reasons.

    Args:
        side_px: the shorter side of the images.
        channels: of the images.
        per_class: training images per class.
    """
    defaults = default_augmentation(side_px, channels, per_class)
    defaults |= default_evaluation(data, defaults["crop_scale"], side_px, per_class)
    needs_kornia = defaults["rand_augment"] > 0 and data.rand_augment is None and not has_kornia()
    if needs_kornia:
        defaults["rand_augment"] = 0.0
    changes: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(data, name) is None}
    reasons = []
    if changes:
        kind = images_of(channels) if side_px <= THUMBNAIL_PX else "images"
        values = ", ".join(f"{name} {range_text(value)}" for name, value in changes.items())
        reasons.append(f"{values}: for {kind} of {side_px} px and {counted(round(per_class), 'label')} per class")
    if needs_kornia:
        reasons.append(NO_RAND_AUGMENT)
    return replace(data, **changes), reasons


def default_evaluation(data: LabeledSettings, crop_scale: Any, side_px: int, per_class: float) -> dict[str, Any]:
    """How evaluation sees images, by names of `LabeledSettings`: as published with many labels, whole where training sees
    whole images, else by five crops. Where the user gives the crop it is one, as in runs of before there were several.

    Args:
        crop_scale: of training by default.
        side_px, per_class: as of `resolve_augmentation`.
    """
    if data.evaluation_crop is not None:
        return {}
    if (data.crop_scale or crop_scale) == (1.0, 1.0):
        return {"evaluation_crop": 1.0}
    if per_class >= MANY_PER_CLASS:
        return {"evaluation_crop": 1.0 if side_px <= THUMBNAIL_PX else 0.875}
    return {"evaluation_crop": SEVERAL_VIEWS_CROP, "evaluation_views": FEW_LABELS_VIEWS}


def images_of(channels: int) -> str:
    """Images of a number of channels, in words."""
    return {1: "gray images", 3: "color images"}.get(channels, f"images of {channels} channels")


def default_augmentation(side_px: int, channels: int, per_class: float) -> dict[str, float | tuple[float, float]]:
    """The augmentation that suits images and labels, by names of `LabeledSettings`.

    Thumbnails are too small for erased boxes and remapped colors. Gray ones are mostly signs, which mirroring turns into
    others and cropping cuts; rotations, shears and shifts serve them best.
    Mixing images helps with many images and a long run; with few labels it keeps a short run from learning them.
    """
    thumbnail, many = side_px <= THUMBNAIL_PX, per_class >= MANY_PER_CLASS
    sign = thumbnail and channels == 1
    if thumbnail:
        chosen: dict[str, float | tuple[float, float]] = {
            "crop_scale": (1.0, 1.0) if sign else (0.5, 1.0),
            "flip": 0.0 if sign else 0.5,
        }
        chosen |= {"rand_augment": 0.0, "erasing": 0.0}
    else:
        chosen = {"crop_scale": (0.08, 1.0) if many else (0.3, 1.0), "flip": 0.5}
        chosen |= {"rand_augment": 9.0 if channels == 3 else 5.0, "erasing": 0.25 if many else 0.0}
    mixed = many and not thumbnail
    chosen |= {"color_jitter": 0.0, "mixup": 0.8 if mixed else 0.0, "cutmix": 1.0 if mixed else 0.0}
    return chosen


def range_text(value: float | tuple[float, float]) -> str:
    """A number, or a range, as text."""
    if value == (1.0, 1.0):
        return "1"
    return f"{value[0]:g} to {value[1]:g}" if isinstance(value, tuple) else f"{value:g}"
