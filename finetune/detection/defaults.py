"""What the user leaves open of a detection run, as it follows from labels, encoder and machine, and why."""

from __future__ import annotations

from dataclasses import replace

from simmim.data import ImageStatistics
from simmim.finetune.dense.settings import Schedule, resolve_dense_schedule, resolve_published_lr, resolve_views
from simmim.finetune.detection.labels.scenes import BoxedScenes
from simmim.finetune.detection.settings import DetectionSettings, HeadSettings
from simmim.finetune.start import takes_larger_images

PUBLISHED_WIDTH, SMALL_WIDTH = 256, 64  # channels of the head; the latter for encoders of nano's and micro's width
PUBLISHED_CONVOLUTIONS, SMALL_CONVOLUTIONS = 4, 2
# Per 512 images: Swin's published 1e-4 at 16.
PUBLISHED_LR = 3.2e-3
LAYER_DECAY = 1.0  # Swin's published detectors have none
EPOCHS = 36.0  # of Swin's published detectors
SCHEDULE = Schedule(layer_decay=LAYER_DECAY, epochs=EPOCHS)
# Blood cells (BCCD's train list, judged by its val list), an encoder of 32 channels at 192 px, 2,400 images in all, one seed
# each. After pre-training, steps of 8, 4 and 2 images made AP 30.6, 35.7 and 39.0 with a layer decay of 0.75, and those of 8
# and 2 made 34.6 and 43.0 with none. From scratch, 8 and 2 made 33.5 and 40.8 with 0.75, 29.0 and 41.5 with none.
CPU_SCHEDULE = Schedule(2, "many small steps are worth more than few large ones", 1200, LAYER_DECAY, EPOCHS)
# How large objects of the smallest class are to be, six patches of 4 px. Blood platelets of 21 px had AP50 92, of 8 px 50.
OBJECT_SIDE_PX = 24
LARGEST_SIDE_PX, LARGEST_CPU_SIDE_PX = 512, 320  # for the memory of 16 images a step, and for the time
SIDE_MULTIPLE_PX = 32  # the last stage's stride
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
    settings, schedule_reasons = resolve_dense_schedule(
        settings, len(labels.train), device, small, CPU_SCHEDULE if device == "cpu" else SCHEDULE
    )
    data, reasons = resolve_views(settings.data, min(settings.size))
    data = replace(data, classes=labels.classes)
    head = resolve_head(settings.head, small, labels.has_masks)
    return replace(settings, data=data, head=head), [*labels.notes, *schedule_reasons, *reasons]


def resolve_image_size(
    settings: DetectionSettings, labels: BoxedScenes, images: ImageStatistics, device: str
) -> tuple[DetectionSettings, list[str]]:
    """Settings with an image size at which the smallest objects can be seen, and why, where the user leaves size and scale
    open.

    An encoder's own size is what it was pre-trained at, often crops of 64 px that an object fills. Here whole images are
    seen, of which it is a small part. The size is at most that of the images themselves and never below the encoder's own.

    Args:
        images: statistics of the training images.
        device: cuda, mps or cpu.

    Raises:
        ValueError: as `find_start`.
    """
    smallest = labels.smallest
    if settings.image_size is not None or settings.data.short_side is not None or smallest is None:
        return settings, []
    wanted = SIDE_MULTIPLE_PX * min(
        round(OBJECT_SIDE_PX / smallest.share / SIDE_MULTIPLE_PX), smallest.short_side_px // SIDE_MULTIPLE_PX
    )
    side = min(wanted, LARGEST_CPU_SIDE_PX if device == "cpu" else LARGEST_SIDE_PX)
    if not takes_larger_images(settings, side, images, device):
        return settings, []
    object_px = round(side * smallest.share)
    reason = f"image size {side}: the usual object of {smallest.name}, the smallest class, is {object_px} px there"
    if side < wanted:
        reason += f"; no larger one is chosen, for its time and memory (--image-size {wanted})"
    return replace(settings, image_size=side), [reason]


def resolve_head(head: HeadSettings, small: bool, masks: bool) -> HeadSettings:
    """Width, depth, and whether masks are learned."""
    return replace(
        head,
        width=head.width or (SMALL_WIDTH if small else PUBLISHED_WIDTH),
        convolutions=head.convolutions or (SMALL_CONVOLUTIONS if small else PUBLISHED_CONVOLUTIONS),
        masks=masks,
    )
