"""Settings of detection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simmim.finetune.detection.labels.base import check_box_format
from simmim.finetune.detection.pyramid import check_head
from simmim.finetune.settings import EncoderSettings, OptimSettings, ScenesSettings, TransferSettings

INFERENCES = ("auto", "whole", "tiles")
EXIF = ("auto", "upright", "stored")


@dataclass(frozen=True)
class BoxSettings(ScenesSettings):
    """The labeled images, the classes, and how training varies them.

    Args:
        path: images with boxes: COCO JSON (a file, or a folder with annotations/train.json or train/_annotations.coco.json),
            YOLO text (images/ and labels/), Pascal VOC XML (JPEGImages/ or images/, and Annotations/), a CSV file, or
            Parquet files, a saved datasets folder, a hub id with columns image and objects.
        format: coco, yolo, voc, csv or columns; detected by default.
        box_format: what the four numbers of a box are: xyxy, xywh or cxcywh in pixels, voc (pixels from 1, the last one
            inside), or xyxy-shares, xywh-shares, cxcywh-shares. By default what the format fixes; columns need it.
        classes: names in order; by default those that the labels state or hold.
        exif: the picture that boxes were drawn on where EXIF turns it: upright, stored, or auto, the one whose size the
            labels state.
        short_side: pixels to which the shorter side of an image is resized before anything else; by default the shorter side
            of image_size, so that a crop shows about as much as in pre-training; 0 keeps the image's own.
        scale: range of the random scale in training, drawn on a log scale.
        flip: probability of mirroring left and right.
        color_jitter: brightness, contrast and saturation are scaled by 1 − color_jitter to 1 + color_jitter; by default
            0.25 where kornia is installed, else 0.
        inference: whole, tiles (of image_size, which overlap by a third, boxes merged), or auto: whole up to four times the
            area of image_size.
    """

    format: str | None = None
    box_format: str | None = None
    classes: tuple[str, ...] = ()
    exif: str = "auto"
    short_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    color_jitter: float | None = None
    inference: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("classes", "scale"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.box_format is not None:
            check_box_format(self.box_format)
        if self.exif not in EXIF:
            raise ValueError(f"data.exif is {self.exif!r}: give one of {', '.join(EXIF)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"data.scale is {self.scale}: give factors, 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}: give a probability")
        if self.color_jitter is not None and not 0 <= self.color_jitter < 1:
            raise ValueError(f"data.color_jitter is {self.color_jitter}: give a share in [0, 1), 0 for none")
        if self.short_side is not None and self.short_side < 0:
            raise ValueError(f"data.short_side is {self.short_side}: give pixels, or 0 to leave images as they are")
        if self.inference not in INFERENCES:
            raise ValueError(f"data.inference is {self.inference!r}: give one of {', '.join(INFERENCES)}")


@dataclass(frozen=True)
class HeadSettings:
    """The head: a feature pyramid, and towers that all its levels share.

    Args:
        width: channels; by default 256 as published, 64 for nano and micro.
        convolutions: of each tower; by default 4 as published, 2 for nano and micro.
    """

    width: int | None = None
    convolutions: int | None = None

    def __post_init__(self) -> None:
        check_head(16 if self.width is None else self.width, 1 if self.convolutions is None else self.convolutions)


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(TransferSettings):
    """One fine-tuning run for detection.

    Args:
        data: the labeled images; in Python a path is enough.
        labels: number of labeled training images, drawn by the seed so that every class is among them; all by default.
        head: the head.
    """

    task: ClassVar[str] = "detection"

    data: BoxSettings
    labels: int | None = None
    head: HeadSettings = HeadSettings()
    encoder: EncoderSettings = EncoderSettings()
    optim: OptimSettings = OptimSettings(label_smoothing=0.0)

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", BoxSettings(self.data))
        if self.optim.label_smoothing:
            raise ValueError(
                f"optim.label_smoothing is {self.optim.label_smoothing}: the focal loss of detection takes none, give 0"
            )
        super().__post_init__()
