"""What the user leaves open of a segmentation run, as it follows from label maps, encoder and machine, and why."""

from __future__ import annotations

from dataclasses import replace

import torch

from simmim.data.label_maps import LabeledScenes
from simmim.finetune.dense.settings import Schedule, resolve_dense_schedule, resolve_published_lr, resolve_views
from simmim.finetune.segmentation.settings import HeadSettings, SegmentationSettings
from simmim.messages import counted

MIN_IMAGES_FOR_BATCH_NORM = 4  # the statistics of fewer images are noise
PUBLISHED_WIDTH, SMALL_WIDTH = 512, 64  # channels of the head; the latter for encoders of nano's and micro's width
# Per 512 images: the published 6e-5 at 16.
PUBLISHED_LR = 1.92e-3


def resolve_settings(
    settings: SegmentationSettings, labels: LabeledScenes, small: bool, device: str
) -> tuple[SegmentationSettings, list[str]]:
    """Settings with nothing left open, and a line for each choice that needs a reason.

    Args:
        settings: with image size and the encoder's settings filled in.
        small: whether the encoder is of nano's or micro's width.
        device: cuda, mps or cpu.

    Raises:
        ValueError: where kornia is needed and missing, and for batch norms of a single image; as `resolve_schedule`.
    """
    settings = resolve_published_lr(settings, PUBLISHED_LR, small)
    settings, schedule_reasons = resolve_dense_schedule(settings, len(labels.train), device, small, Schedule())
    data, data_reasons = resolve_views(settings.data, min(settings.size))
    data = replace(data, classes=labels.scheme.classes, values=labels.scheme.values)
    head, head_reasons = resolve_head(settings.head, images_per_forward(settings, device), small)
    return replace(settings, data=data, head=head), [*labels.notes, *schedule_reasons, *data_reasons, *head_reasons]


def resolve_head(head: HeadSettings, num_images: int, small: bool) -> tuple[HeadSettings, list[str]]:
    """Width and norms.

    Args:
        num_images: per device and forward pass.

    Raises:
        ValueError: for batch norms of a single image.
    """
    reasons = []
    head = replace(head, width=head.width or (SMALL_WIDTH if small else PUBLISHED_WIDTH))
    if head.norm is None:
        head = replace(head, norm="batch" if num_images >= MIN_IMAGES_FOR_BATCH_NORM else "image")
        reasons.append(f"head.norm {head.norm}: {counted(num_images, 'image')} per device and forward pass")
    elif head.norm == "batch" and num_images < 2:
        raise ValueError("head.norm is batch, with 1 image per device and forward pass: give more, or head.norm image")
    return head, reasons


def images_per_forward(settings: SegmentationSettings, device: str) -> int:
    """Images per forward pass on one device, as far as it is known before there is a trainer."""
    if isinstance(settings.devices, int) or settings.devices.isdecimal():
        num_devices = max(1, int(settings.devices))
    else:
        num_devices = torch.cuda.device_count() if device == "cuda" else 1
    return settings.batch_size // num_devices // settings.optim.accumulate
