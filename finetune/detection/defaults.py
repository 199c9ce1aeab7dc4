"""What the user leaves open of a detection run, as it follows from labels, encoder and machine, and why."""

from __future__ import annotations

from dataclasses import replace

from simmim.finetune.dense.settings import resolve_published_lr, resolve_views
from simmim.finetune.detection.labels.scenes import BoxedScenes
from simmim.finetune.detection.settings import DetectionSettings, HeadSettings
from simmim.finetune.settings import resolve_schedule

PUBLISHED_WIDTH, SMALL_WIDTH = 256, 64  # channels of the head; the latter for encoders of nano's and micro's width
PUBLISHED_CONVOLUTIONS, SMALL_CONVOLUTIONS = 4, 2
# Per 512 images: Swin's published 1e-4 at 16.
PUBLISHED_LR = 3.2e-3
SIDE_FOR_LEVEL_ABOVE_PX = 512  # from here on objects may be larger than the last stage's anchors


def resolve_settings(
    settings: DetectionSettings, labels: BoxedScenes, small: bool, device: str
) -> tuple[DetectionSettings, list[str]]:
    """Settings with nothing left open, and a line for each choice that needs a reason.

    Args:
        settings: with image size and the encoder's settings filled in.
        small: whether the encoder is of nano's or micro's width.
        device: cuda, mps or cpu.

    Raises:
        ValueError: where kornia is needed and missing; as `resolve_schedule`.
    """
    settings = resolve_published_lr(settings, PUBLISHED_LR, small)
    settings = resolve_schedule(settings, len(labels.train), device, small)
    data, reasons = resolve_views(settings.data, min(settings.size))
    data = replace(data, classes=labels.classes)
    head = resolve_head(settings.head, small, labels.has_masks)
    return replace(settings, data=data, head=head), [*labels.notes, *reasons]


def resolve_head(head: HeadSettings, small: bool, masks: bool) -> HeadSettings:
    """Width, depth, and whether masks are learned."""
    return replace(
        head,
        width=head.width or (SMALL_WIDTH if small else PUBLISHED_WIDTH),
        convolutions=head.convolutions or (SMALL_CONVOLUTIONS if small else PUBLISHED_CONVOLUTIONS),
        masks=masks,
    )
