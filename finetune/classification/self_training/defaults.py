"""What the user leaves open of self-training in classification, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simmim.encoders.base import EncoderConfig
from simmim.finetune.augment.color import ColorSettings, check_kornia, has_kornia
from simmim.finetune.classification.defaults import THUMBNAIL_PX, images_of
from simmim.finetune.classification.settings import ClassificationSettings
from simmim.finetune.self_training.defaults import resolve_teacher

RATIO = 5, "those without a confident pseudo-label cost little"
SIGN_AFFINE, RAND_AUGMENT, ERASING = 1.5, 9.0, 0.5


def resolve_self_training(
    settings: ClassificationSettings, num_labels: int, num_unlabeled: int, encoder: EncoderConfig, device: str
) -> tuple[ClassificationSettings, list[str]]:
    """Settings as of `resolve_teacher`, with the strong views resolved too, and the reasons.

    Raises:
        ValueError: as `resolve_teacher`; where kornia is needed and missing.
    """
    settings, reasons = resolve_teacher(settings, num_labels, num_unlabeled, encoder, device, RATIO)
    settings, view_reasons = resolve_strong_views(settings, encoder.in_channels)
    return settings, [*reasons, *view_reasons]


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
