"""What the user leaves open of self-training in segmentation, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simmim.encoders.base import EncoderConfig
from simmim.finetune.augment.color import ColorSettings, check_kornia, has_kornia
from simmim.finetune.segmentation.settings import SegmentationSettings
from simmim.finetune.self_training.defaults import resolve_teacher

RATIO = 1, "every pixel of theirs teaches"
CUTMIX, JITTER, RAND_AUGMENT = 0.5, 0.5, 0.0


def resolve_self_training(
    settings: SegmentationSettings, num_labels: int, num_unlabeled: int, encoder: EncoderConfig, device: str
) -> tuple[SegmentationSettings, list[str]]:
    """Settings as of `resolve_teacher`, with the strong views resolved too, and the reasons.

    Raises:
        ValueError: as `resolve_teacher`; where kornia is needed and missing.
    """
    settings, reasons = resolve_teacher(settings, num_labels, num_unlabeled, encoder, device, RATIO)
    chosen = settings.self_training
    defaults = {"cutmix": CUTMIX, "color_jitter": JITTER if has_kornia() else 0.0, "rand_augment": RAND_AUGMENT}
    changes: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(chosen, name) is None}
    chosen = replace(chosen, **changes)
    check_kornia(ColorSettings(chosen.rand_augment or 0.0, jitter=chosen.color_jitter or 0.0))
    if changes:
        values = ", ".join(f"{name} {value:g}" for name, value in changes.items())
        reasons.append(f"strong views of unlabeled images, {values}: no pixel moves, so that the teacher's labels stay true")
    return replace(settings, self_training=chosen), reasons
