"""Classification as a task: what is read, what follows where the user says nothing, what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.data import CenterView, ImageSamples, LabeledImages, RandomView, read_labeled_images
from simmim.encoders.base import EncoderConfig
from simmim.finetune.classification.balance import BalancedSamples, class_weights
from simmim.finetune.classification.defaults import completed
from simmim.finetune.classification.folds import held_out_fold
from simmim.finetune.classification.model import ClassificationFinetuning, Classifier, save_classifier
from simmim.finetune.classification.report import CAPTION, CLASSES, class_table, write_class_report
from simmim.finetune.classification.settings import ClassificationSettings
from simmim.finetune.start import Start
from simmim.finetune.task import Task
from simmim.training.logs import log_picture


class Classification(Task):
    """One class an image."""

    def read(self, settings: ClassificationSettings) -> LabeledImages:
        """Images by class."""
        self.monitor, data = settings.monitor, settings.data
        labels = read_labeled_images(data.path, settings.labels_per_class, settings.seed, data.column, data.label_column)
        return held_out_fold(labels, *data.fold, settings.seed) if data.fold else labels

    def completed(
        self, settings: ClassificationSettings, labels: LabeledImages, encoder: EncoderConfig, device: str
    ) -> tuple[ClassificationSettings, list[str]]:
        """Length, batch, rates, augmentation and evaluation crop."""
        return completed(settings, len(labels.train), len(labels.classes), encoder, device)

    def samples(
        self, settings: ClassificationSettings, labels: LabeledImages, channels: int, keep_decoded: bool
    ) -> tuple[ImageSamples, ImageSamples]:
        """Training samples, cropped and flipped at random, and validation samples, cropped in the center."""
        data = settings.data
        views = (
            RandomView(settings.size, data.crop_scale, data.crop_ratio, data.flip),
            CenterView(settings.size, data.evaluation_crop),
        )
        kind = BalancedSamples if data.balance == "sampling" else ImageSamples
        return (
            kind(labels.train, views[0], channels, settings.seed, keep_decoded),
            ImageSamples(labels.validation, views[1], channels, settings.seed, keep_decoded),
        )

    def module(
        self,
        settings: ClassificationSettings,
        start: Start,
        labels: LabeledImages,
        learning_rate: Callable[[int], float],
        say: Callable[[str], object] | None,
    ) -> ClassificationFinetuning:
        """Encoder and head, and how they learn."""
        # What was read is in evaluation mode, which Lightning would leave as it is: without stochastic depth.
        model = Classifier(start.encoder, len(labels.classes)).train()
        if settings.init != "none" and start.source.head:
            take_head(model, start.source, labels.classes, say)
        preprocessing = replace(start.preprocessing, crop=settings.data.evaluation_crop)
        weights = None
        if settings.data.balance == "weights":
            weights = class_weights(labels.train["label"], len(labels.classes))
        changes = settings.data.changes()
        self.classes = labels.classes
        return ClassificationFinetuning(model, preprocessing, changes, learning_rate, settings.optim, weights)

    def report(self, run: Path, module: ClassificationFinetuning) -> None:
        """classes.csv and confusions.png, which TensorBoard shows too."""
        if module.confusions is not None:
            picture = write_class_report(run, module.confusions, self.classes)
            step = max(module.trainer.global_step - 1, 0)
            log_picture(module.trainer.loggers, "confusions", picture, step, CAPTION)

    def closing(self, run: Path) -> str:
        """Precision, recall and F1 by class."""
        return f"{class_table(run / CLASSES)}\n" if (run / CLASSES).is_file() else ""

    def save(
        self, folder: Path, model: Classifier, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
    ) -> None:
        """As `simmim.finetune.load_classifier` reads it."""
        save_classifier(folder, model, classes, preprocessing, provenance)


def take_head(model: Classifier, source: Checkpoint, classes: tuple[str, ...], say: Callable[[str], object] | None) -> None:
    """The source's head where it is for the same classes; else it is fresh. Either is said."""
    if source.classes == tuple(classes):
        model.head.load_state_dict(source.head)
        text = f"head of the same {len(classes)} classes taken over"
    else:
        text = f"head of {len(source.classes)} classes replaced by a fresh one of {len(classes)}"
    if say:
        say(f"adapted    {text}")
