"""Settings of detection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simmim.finetune.dense.settings import ScaledScenesSettings, check_inference
from simmim.finetune.detection.labels.base import check_box_format
from simmim.finetune.detection.pyramid import check_head
from simmim.finetune.settings import EncoderSettings, OptimSettings, TransferSettings

INFERENCES = ("auto", "whole", "tiles")
EXIF = ("auto", "upright", "stored")


@dataclass(frozen=True)
class BoxSettings(ScaledScenesSettings):
    """The labeled images, the classes, and how training varies them.

    Args:
        path: images with boxes: COCO JSON (a file, or a folder with annotations/train.json or
            train/_annotations.coco.json), YOLO text (images/ and labels/), Pascal VOC XML (JPEGImages/ or images/, and
            Annotations/), a CSV file, or Parquet files, a saved datasets folder, a hub id with columns image and objects.
            Or images/ and instances/ with instance maps, PNG or TIFF files whose pixel values number the objects, in a
            folder for each class or in none. The masks of COCO, YOLO's polygons and instance maps are learned, too.
        format: coco, yolo, voc, csv, columns or instances; detected by default.
        box_format: what the four numbers of a box are: xyxy, xywh or cxcywh in pixels, voc (pixels from 1, the last one
            inside), or xyxy-shares, xywh-shares, cxcywh-shares. By default what the format fixes; columns need it.
        classes: names in order; by default those that the labels state or hold.
        exif: the picture that boxes were drawn on where EXIF turns it: upright, stored, or auto, the one whose size the
            labels state.
        inference: whole, tiles (of image_size, which overlap by a third, boxes merged), or auto: whole up to four times the
            area of image_size.
    """

    format: str | None = None
    box_format: str | None = None
    classes: tuple[str, ...] = ()
    exif: str = "auto"
    inference: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.box_format is not None:
            check_box_format(self.box_format)
        if self.exif not in EXIF:
            raise ValueError(f"data.exif is {self.exif!r}: give one of {', '.join(EXIF)}")
        check_inference(self.inference, INFERENCES)


@dataclass(frozen=True)
class HeadSettings:
    """The head: a feature pyramid, and towers that all its levels share.

    Args:
        width: channels; by default 256 as published, 64 for nano and micro.
        convolutions: of each tower; by default 4 as published, 2 for nano and micro.
        masks: learn the mask of each object beside its box; by default where every object has one.
    """

    width: int | None = None
    convolutions: int | None = None
    masks: bool | None = None

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
