"""What fine-tuning for classification needs: which labels are read, what they determine, and what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.data import ImageSamples, LabeledImages, RandomView, evaluation_views, read_labeled_images
from simmim.data.labels import class_indices
from simmim.finetune.classification.balance import BalancedSamples, class_weights
from simmim.finetune.classification.defaults import resolve_settings
from simmim.finetune.classification.folds import hold_out_fold
from simmim.finetune.classification.model import Classifier, save_classifier
from simmim.finetune.classification.module import ClassificationFinetuning
from simmim.finetune.classification.report import CAPTION, CLASSES, class_table, write_class_report
from simmim.finetune.classification.self_training.defaults import resolve_self_training
from simmim.finetune.classification.self_training.prepare import module_builder, read_unlabeled, with_unlabeled
from simmim.finetune.classification.settings import ClassificationSettings
from simmim.finetune.self_training.unlabeled import check_channels
from simmim.finetune.start import Start, find_reading, find_start, measure_training_images
from simmim.finetune.task import PreparedTask, ReportLine
from simmim.reading import AUTO, Reading
from simmim.training.loggers import LossNames, log_picture

VALIDATION_BATCH_SIZE = 64
LOSS = LossNames("cross_entropy", "in nats; ln(classes) is a guess")


def prepare(settings: ClassificationSettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
    """Images by class, a head on the encoder, cross entropy."""
    reading = find_reading(settings)
    labels, unlabeled = read_labels(settings, reading), None
    images = measure_training_images(settings, labels.train)
    if settings.data.unlabeled is not None:
        unlabeled = read_unlabeled(settings, labels, images.reading)
        images = replace(images, decoded_mib=images.decoded_mib + unlabeled.decoded_mib)
    start = find_start(settings, images, device, report_line)
    config = start.encoder.config
    num_labels, num_classes = len(labels.train), len(labels.classes)
    settings = cast(ClassificationSettings, start.settings)
    build = ClassificationFinetuning
    reasons: list[str] = []
    if unlabeled:
        check_channels(unlabeled, config.in_channels)
        settings, reasons = resolve_self_training(settings, num_labels, len(unlabeled.images), config, device)
    settings, further = resolve_settings(settings, num_labels, num_classes, config, device)
    if unlabeled:
        build = module_builder(settings, labels)  # type: ignore[assignment]
    module = build_module(settings, start, labels, report_line, build)
    train, validation = build_samples(settings, labels, config.in_channels, start)
    prepared = PreparedTask(
        settings=settings,
        module=module,
        source=start.source,
        train=train,
        validation=validation,
        validation_batch_size=VALIDATION_BATCH_SIZE,
        classes=labels.classes,
        test_validates=labels.test_validates,
        monitor=settings.monitor,
        loss=LOSS,
        save=partial(save_classifier, classes=labels.classes, preprocessing=module.preprocessing),
        provenance={"labels_per_class": settings.labels_per_class},
        reasons=(*reasons, *further),
        report=partial(report_validation, classes=labels.classes),
        closing_text=closing_text,
    )
    return with_unlabeled(prepared, unlabeled, config.in_channels, start) if unlabeled else prepared


def read_labels(settings: ClassificationSettings, reading: Reading | None = None) -> LabeledImages:
    """The labeled images; in cross-validation the training images alone, of which a part is held out.

    Args:
        reading: as from `find_reading`.

    Raises:
        ValueError: when the labels cannot be read or are too few.
    """
    data = settings.data
    labels = read_labeled_images(
        data.path,
        settings.labels_per_class,
        settings.seed,
        data.column,
        data.label_column,
        data.validation_seed,
        reading or AUTO,
    )
    return hold_out_fold(labels, *data.fold, settings.seed) if data.fold else labels


def build_module(
    settings: ClassificationSettings,
    start: Start,
    labels: LabeledImages,
    report_line: ReportLine | None,
    build: Callable[..., ClassificationFinetuning] = ClassificationFinetuning,
) -> ClassificationFinetuning:
    """Encoder, head and how they are trained; the head's weights come from the source where it is for the same classes.

    Args:
        build: makes the module from the arguments of `ClassificationFinetuning`.
    """
    # An encoder that was read is in evaluation mode, which Lightning would keep: without stochastic depth.
    model = Classifier(start.encoder, len(labels.classes), settings.head).train()
    if settings.init != "none" and start.source.head:
        load_head(model, start.source, labels.classes, report_line)
    data = settings.data
    preprocessing = replace(start.preprocessing, crop=data.evaluation_crop, views=data.evaluation_views or 1)
    weights: Tensor | None = None
    if settings.data.balance == "weights":
        weights = class_weights(class_indices(labels.train), len(labels.classes))
    learning_rate = settings.learning_rate(len(labels.train))
    return build(model, preprocessing, settings.data.changes(), learning_rate, settings.optim, weights)


def load_head(model: Classifier, source: Checkpoint, classes: tuple[str, ...], report_line: ReportLine | None) -> None:
    """Load the source's head where it is of the same kind and classes, else keep the fresh one. Either is reported."""
    shapes = {name: value.shape for name, value in source.head.items()}
    if source.classes != tuple(classes):
        text = f"head of {len(source.classes)} classes replaced by a fresh one of {len(classes)}"
    elif shapes == {name: value.shape for name, value in model.head.state_dict().items()}:
        model.head.load_state_dict(source.head)
        text = f"head of the same {len(classes)} classes loaded"
    else:
        text = "head of another kind replaced by a fresh one"
    if report_line:
        report_line(f"adapted    {text}")


def build_samples(
    settings: ClassificationSettings, labels: LabeledImages, channels: int, start: Start
) -> tuple[ImageSamples, ImageSamples]:
    """Training samples, cropped and flipped at random, and validation samples, cropped in the center or in all places."""
    data = settings.data
    train_view = RandomView(settings.size, data.crop_scale, data.crop_ratio, data.flip)
    train_class = BalancedSamples if data.balance == "sampling" else ImageSamples
    validation_view, *further = evaluation_views(settings.size, data.evaluation_crop, data.evaluation_views or 1)
    how, reading = (channels, settings.seed), start.preprocessing.reading_or_default
    keep_validation = start.keeps(labels.validation, labels.train)
    return (
        train_class(labels.train, train_view, *how, keep_decoded=start.keep_decoded, reading=reading),
        ImageSamples(labels.validation, validation_view, *how, keep_validation, reading=reading, further=further),
    )


def report_validation(run: Path, module: ClassificationFinetuning, classes: tuple[str, ...]) -> None:
    """Write classes.csv and confusions.png, which TensorBoard shows too."""
    if module.confusions is not None:
        step = module.trainer.global_step
        picture = write_class_report(run, module.confusions, classes, step)
        log_picture(module.trainer.loggers, "confusions", picture, max(step - 1, 0), CAPTION)


def closing_text(run: Path) -> str:
    """Precision, recall and F1 of each class."""
    return f"{class_table(run / CLASSES)}\n" if (run / CLASSES).is_file() else ""
