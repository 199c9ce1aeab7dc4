"""What fine-tuning for detection needs: which labels are read, what they determine, and what is trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data.decode import MAX_PIXELS
from simmim.finetune.dense.views import mean_color, validation_batch_size
from simmim.finetune.detection.ap import check_installed
from simmim.finetune.detection.defaults import SIDE_FOR_LEVEL_ABOVE_PX, resolve_image_size, resolve_settings
from simmim.finetune.detection.labels.base import ReadingOptions
from simmim.finetune.detection.labels.scenes import BoxedScenes, read_boxed_scenes
from simmim.finetune.detection.losses import target_stride
from simmim.finetune.detection.model import FILES, Detector, HeadShape, SavedDetector, load_detector, save_detector
from simmim.finetune.detection.module import DetectionFinetuning
from simmim.finetune.detection.report import LogBoxes, closing_text, report_validation
from simmim.finetune.detection.settings import BoxSettings, DetectionSettings
from simmim.finetune.detection.views import BoxSamples, RandomBoxes, WholeImage
from simmim.finetune.start import Start, find_reading, find_start, measure_training_images
from simmim.finetune.task import PreparedTask, ReportLine
from simmim.reading import AUTO
from simmim.training.loggers import LossNames

LOSS = LossNames("detection", "of classes, boxes and centerness together, per point with an object")
MASK_LOSS = LossNames("detection", "of classes, boxes, centerness and masks together, per point with an object")


def prepare(settings: DetectionSettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
    """Images with boxes, a pyramid head on the encoder's stages, losses per positive point."""
    check_installed()
    labels = read_labels(settings)
    images = measure_training_images(settings, labels.train)
    settings, of_size = resolve_image_size(settings, labels, images, device)
    start = find_start(settings, images, device, report_line)
    start.encoder.config.check_maps()
    settings, reasons = resolve_settings(start.settings, labels, start.encoder.config.is_small, device)  # type: ignore[arg-type]
    train, validation = build_samples(settings, labels, start)
    module = build_module(settings, start, labels, report_line)
    return PreparedTask(
        settings=settings,
        module=module,
        source=start.source,
        train=train,
        validation=validation,
        validation_batch_size=validation_batch_size(
            labels.validation_sizes, settings.data.short_side, targets_have_pixels=False
        ),
        classes=labels.classes,
        test_validates=labels.test_validates,
        monitor="mask_ap" if labels.has_masks else "ap",
        loss=MASK_LOSS if labels.has_masks else LOSS,
        save=partial(save_model, module=module, data=settings.data, preprocessing=start.preprocessing),
        provenance={"labels": settings.labels},
        reasons=(*of_size, *reasons),
        callbacks=(LogBoxes(),),
        report=report_validation,  # type: ignore[arg-type]
        closing_text=closing_text,
    )


def read_labels(settings: DetectionSettings) -> BoxedScenes:
    """The labeled images with their boxes.

    Raises:
        ValueError: when the labels cannot be read, do not fit the images or are too few.
    """
    data = settings.data
    options = ReadingOptions(data.column, data.box_format, data.classes, find_reading(settings) or AUTO)
    return read_boxed_scenes(
        data.path, settings.labels, settings.seed, options, data.format, data.exif, data.draw(), settings.head.masks
    )


def build_module(
    settings: DetectionSettings, start: Start, labels: BoxedScenes, report_line: ReportLine | None
) -> DetectionFinetuning:
    """Encoder, head and how they are trained; the head's weights come from the source where they fit."""
    above = int(min(settings.size) >= SIDE_FOR_LEVEL_ABOVE_PX)
    shape = HeadShape(settings.head.width, settings.head.convolutions, above, bool(settings.head.masks))
    model = Detector(start.encoder, len(labels.classes), shape).train()
    if settings.init != "none":
        FILES.load_source_head(model, settings.init, labels.classes, load_with_classes, report_line)
    return DetectionFinetuning(
        model,
        start.preprocessing,
        labels.classes,
        settings.data.inference,
        settings.learning_rate(len(labels.train)),
        settings.optim,
        settings.data.color_jitter,
    )


def load_with_classes(path: str) -> tuple[Detector, tuple[str, ...]]:
    """A detector and its classes."""
    saved = load_detector(path)
    return saved.model, saved.classes


def build_samples(settings: DetectionSettings, labels: BoxedScenes, start: Start) -> tuple[BoxSamples, BoxSamples]:
    """Training samples, scaled, cropped and flipped at random, and whole validation images."""
    data, channels = settings.data, start.encoder.config.in_channels
    fill = mean_color(start.preprocessing)
    mask_stride = target_stride(start.encoder.strides[0])
    train_view = RandomBoxes(settings.size, data.short_side, data.scale, data.flip, fill, mask_stride)
    how, limits = (channels, settings.seed), (MAX_PIXELS, start.preprocessing.reading_or_default)
    keep_validation = start.keeps(labels.validation, labels.train)
    whole = WholeImage(data.short_side)
    return (
        BoxSamples(labels.train, labels.train_objects, train_view, *how, start.keep_decoded, *limits),
        BoxSamples(labels.validation, labels.validation_objects, whole, *how, keep_validation, *limits),
    )


def save_model(
    folder: Path,
    model: nn.Module,
    provenance: dict,
    module: DetectionFinetuning,
    data: BoxSettings,
    preprocessing: Preprocessing,
) -> None:
    """Write a model as `simmim.finetune.load_detector` reads it, with the thresholds of the validation that chose it."""
    saved = SavedDetector(
        model,  # type: ignore[arg-type]
        module.classes,
        module.main_scores.thresholds,
        preprocessing,
        data.short_side,
        data.inference,
    )
    save_detector(folder, saved, provenance)
