"""What fine-tuning for segmentation needs: which labels are read, what they determine, and what is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from torch import nn
from tqdm import tqdm

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data.decode import MAX_PIXELS
from simmim.data.label_maps import ClassScheme, LabeledScenes, read_labeled_scenes
from simmim.finetune.dense.views import mean_color, validation_batch_size
from simmim.finetune.segmentation.defaults import resolve_settings
from simmim.finetune.segmentation.model import FILES, HeadShape, SavedSegmenter, Segmenter, load_segmenter, save_segmenter
from simmim.finetune.segmentation.module import SegmentationFinetuning, balanced_weights
from simmim.finetune.segmentation.report import LogLabelMaps, closing_text, report_validation
from simmim.finetune.segmentation.self_training.defaults import resolve_self_training
from simmim.finetune.segmentation.self_training.prepare import module_builder, read_unlabeled, with_unlabeled
from simmim.finetune.segmentation.settings import SceneSettings, SegmentationSettings
from simmim.finetune.segmentation.views import RandomScene, SceneSamples, WholeScene
from simmim.finetune.self_training.unlabeled import check_channels
from simmim.finetune.start import Start, find_reading, find_start, measure_training_images
from simmim.finetune.task import PreparedTask, ReportLine
from simmim.reading import AUTO
from simmim.training.loggers import LossNames

LOSS = LossNames("cross_entropy", "in nats; ln(classes) is a guess")


def prepare(settings: SegmentationSettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
    """Images with label maps, UPerNet on the encoder's stages, cross entropy over pixels."""
    labels, unlabeled = read_labels(settings), None
    images = measure_training_images(settings, labels.train)
    if settings.data.unlabeled is not None:
        unlabeled = read_unlabeled(settings, labels, read_labels, images.reading)
        images = replace(images, decoded_mib=images.decoded_mib + unlabeled.decoded_mib)
    start = find_start(settings, images, device, report_line)
    config, scheme = start.encoder.config, labels.scheme
    config.check_maps()
    settings, reasons = cast(SegmentationSettings, start.settings), list[str]()
    if unlabeled:
        check_channels(unlabeled, config.in_channels)
        settings, reasons = resolve_self_training(settings, len(labels.train), len(unlabeled.images), config, device)
    settings, further = resolve_settings(settings, labels, config.is_small, device)
    data = settings.data
    train, validation = build_samples(settings, labels, start)
    build = module_builder(settings, labels) if unlabeled else SegmentationFinetuning
    prepared = PreparedTask(
        settings=settings,
        module=build_module(settings, start, labels, report_line, build),
        source=start.source,
        train=train,
        validation=validation,
        validation_batch_size=validation_batch_size(labels.validation_sizes, data.short_side, targets_have_pixels=True),
        classes=scheme.classes,
        test_validates=labels.test_validates,
        monitor="mean_iou",
        loss=LOSS,
        save=partial(save_model, data=data, scheme=scheme, preprocessing=start.preprocessing),
        provenance={"labels": settings.labels},
        reasons=(*reasons, *further),
        callbacks=(LogLabelMaps(scheme.classes),),
        report=partial(report_validation, classes=scheme.classes),
        closing_text=closing_text,
    )
    return with_unlabeled(prepared, unlabeled, train_view(settings, scheme, start), start) if unlabeled else prepared


def read_labels(settings: SegmentationSettings) -> LabeledScenes:
    """The labeled images; every label map is inspected.

    Raises:
        ValueError: when the labels cannot be read, do not fit the images or are too few.
    """
    data = settings.data
    return read_labeled_scenes(
        data.path,
        settings.labels,
        settings.seed,
        data.column,
        data.mask_column,
        data.classes,
        data.values,
        data.ignore_index,
        with_progress_bar,
        data.draw(),
        find_reading(settings) or AUTO,
    )


def with_progress_bar(scenes: Iterable) -> Iterator:
    """The scenes, with a progress bar on a terminal once they take more than a moment."""
    hidden = not sys.stderr.isatty()
    return iter(tqdm(scenes, desc="inspecting label maps", unit="image", delay=3, leave=False, disable=hidden))


def build_module(
    settings: SegmentationSettings,
    start: Start,
    labels: LabeledScenes,
    report_line: ReportLine | None,
    build: Callable[..., SegmentationFinetuning],
) -> SegmentationFinetuning:
    """Encoder, heads and how they are trained; the heads' weights come from the source where they fit.

    Args:
        build: makes the module from the arguments of `SegmentationFinetuning`.
    """
    head, scheme = settings.head, labels.scheme
    shape = HeadShape(head.width, head.norm, head.dropout, head.auxiliary > 0)
    model = Segmenter(start.encoder, len(scheme.classes), shape).train()
    if settings.init != "none":
        FILES.load_source_head(model, settings.init, scheme.classes, load_with_classes, report_line)
    return build(
        model,
        start.preprocessing,
        scheme,
        settings.data.inference,
        settings.learning_rate(len(labels.train)),
        settings.optim,
        head.auxiliary,
        balanced_weights(labels.pixels) if settings.class_weights == "balanced" else None,
        settings.data.color_jitter,
    )


def load_with_classes(path: str) -> tuple[Segmenter, tuple[str, ...]]:
    """A segmenter and its classes."""
    saved = load_segmenter(path)
    return saved.model, saved.scheme.classes


def build_samples(settings: SegmentationSettings, labels: LabeledScenes, start: Start) -> tuple[SceneSamples, SceneSamples]:
    """Training samples, scaled, cropped and flipped at random, and whole validation images."""
    scheme, channels = labels.scheme, start.encoder.config.in_channels
    reading = start.preprocessing.reading_or_default
    how, limits = (scheme, channels, settings.seed), (MAX_PIXELS, reading)
    keep_validation = start.keeps(labels.validation, labels.train)
    return (
        SceneSamples(labels.train, train_view(settings, scheme, start), *how, start.keep_decoded, *limits),
        SceneSamples(labels.validation, WholeScene(settings.data.short_side), *how, keep_validation, *limits),
    )


def train_view(settings: SegmentationSettings, scheme: ClassScheme, start: Start) -> RandomScene:
    """The views of training images."""
    data, fill = settings.data, mean_color(start.preprocessing)
    scale = (data.short_side, data.scale)
    return RandomScene(settings.size, *scale, data.crop_class_share, data.flip, fill, scheme.ignored_id)


def save_model(
    folder: Path, model: nn.Module, provenance: dict, data: SceneSettings, scheme: ClassScheme, preprocessing: Preprocessing
) -> None:
    """Write a model as `simmim.finetune.load_segmenter` reads it."""
    save_segmenter(folder, SavedSegmenter(model, scheme, preprocessing, data.short_side, data.inference), provenance)  # type: ignore[arg-type]
