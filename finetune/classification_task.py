"""Classification as a task: what is read, what follows where the user says nothing, what is trained."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune.classification import ClassificationFinetuning, Classifier, save_classifier
from finetune.classification_settings import FinetuneSettings
from finetune.settings import with_schedule
from finetune.start import Start
from finetune.task import Task
from simmim.checkpoint import Checkpoint, Preprocessing
from simmim.data import CentreView, ImageSamples, LabeledImages, RandomView, labeled_images
from simmim.swinv2 import PRESETS, SwinV2Config


class Classification(Task):
    """One class an image."""

    monitor = "accuracy"

    def read(self, settings: FinetuneSettings) -> LabeledImages:
        """Images by class."""
        data = settings.data
        return labeled_images(data.path, settings.labels_per_class, settings.seed, data.column, data.label_column)

    def completed(
        self, settings: FinetuneSettings, labels: LabeledImages, encoder: SwinV2Config, device: str
    ) -> tuple[FinetuneSettings, list[str]]:
        """Length, batch, rates and evaluation crop."""
        small = encoder.embed_dim < PRESETS["tiny"].embed_dim
        settings = with_schedule(settings, len(labels.train), device, small)
        crop = settings.data.evaluation_crop or (1.0 if min(settings.size) <= 64 else 0.875)
        return replace(settings, data=replace(settings.data, evaluation_crop=crop)), []

    def samples(
        self, settings: FinetuneSettings, labels: LabeledImages, channels: int, keep_decoded: bool
    ) -> tuple[ImageSamples, ImageSamples]:
        """Training samples, cropped and flipped at random, and validation samples, cropped in the centre."""
        data = settings.data
        views = (
            RandomView(settings.size, data.crop_scale, data.crop_ratio, data.flip),
            CentreView(settings.size, data.evaluation_crop),
        )
        parts = zip((labels.train, labels.validation), views)
        train, validation = (ImageSamples(part, view, channels, settings.seed, keep_decoded) for part, view in parts)
        return train, validation

    def module(
        self,
        settings: FinetuneSettings,
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
        return ClassificationFinetuning(
            model, preprocessing, settings.data.affine, learning_rate, settings.optim, settings.freeze
        )

    def save(
        self, folder: Path, model: Classifier, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
    ) -> None:
        """As `finetune.load_classifier` reads it."""
        save_classifier(folder, model, classes, preprocessing, provenance)


def take_head(
    model: Classifier, source: Checkpoint, classes: tuple[str, ...], say: Callable[[str], object] | None
) -> None:
    """The source's head where it is for the same classes; else it is fresh. Either is said."""
    if source.classes == tuple(classes):
        model.head.load_state_dict(source.head)
        text = f"head of the same {len(classes)} classes taken over"
    else:
        text = f"head of {len(source.classes)} classes replaced by a fresh one of {len(classes)}"
    if say:
        say(f"adapted    {text}")
