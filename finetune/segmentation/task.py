"""Semantic segmentation as a task: what is read, what follows where the user says nothing, what is trained."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from PIL import Image
from tqdm import tqdm

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data.label_maps import LabeledScenes, read_labeled_scenes
from simmim.encoders.base import EncoderConfig
from simmim.files import atomic_write
from simmim.finetune.augment.color import ColorSettings, check_kornia, has_kornia
from simmim.finetune.segmentation.iou import class_table, write_class_rows
from simmim.finetune.segmentation.model import (
    HeadShape,
    SavedSegmenter,
    SegmentationFinetuning,
    Segmenter,
    Shown,
    balanced_weights,
    load_heads,
    load_segmenter,
    save_segmenter,
    segmenter_folder,
)
from simmim.finetune.segmentation.overlays import overlay_grid
from simmim.finetune.segmentation.settings import SegmentationSettings
from simmim.finetune.segmentation.views import RandomScene, SceneSamples, WholeScene, scaled_size
from simmim.finetune.settings import with_schedule
from simmim.finetune.start import Start
from simmim.finetune.task import Task
from simmim.training.logs import log_picture

if TYPE_CHECKING:
    pass

CLASS_ROWS, PICTURE = "iou.csv", "masks.png"
JITTER = 0.25  # half of what the published pipeline draws, whose images are thousands
BATCH_NORM_FROM = 4  # images; statistics of fewer are noise
# Per 512 images: the published 6e-5 at 16. Nano and micro, of which the head is most of what learns, have their usual rate.
PUBLISHED_LR = 1.92e-3
VALIDATION_PIXELS = 2**18  # of one validation batch, where images are of one size
VALIDATION_IMAGES = 64


class Segmentation(Task):
    """A class for every pixel."""

    monitor = "mean_iou"

    def read(self, settings: SegmentationSettings) -> LabeledScenes:
        """Scenes, every mask looked into."""
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
            looking,
        )

    def completed(
        self, settings: SegmentationSettings, labels: LabeledScenes, encoder: EncoderConfig, device: str
    ) -> tuple[SegmentationSettings, list[str]]:
        """Length, batch, rates, scale, jitter, the head's width, and the classes as they were found."""
        small = encoder.is_small
        if settings.optim.lr is None and not small:
            settings = replace(settings, optim=replace(settings.optim, lr=PUBLISHED_LR))
        settings = with_schedule(settings, len(labels.train), device, small)
        data, scheme = settings.data, labels.scheme
        reasons = list(labels.notes)
        jitter = data.color_jitter
        if jitter is None:
            jitter = JITTER if has_kornia() else 0.0
            if not jitter:
                reasons.append("no color jitter: kornia is not installed (pip install 'simmim-toolkit[finetune]')")
        check_kornia(ColorSettings(jitter=jitter))
        data = replace(
            data,
            classes=scheme.classes,
            values=scheme.values,
            short_side=min(settings.size) if data.short_side is None else data.short_side,
            color_jitter=jitter,
        )
        head = replace(settings.head, width=settings.head.width or (64 if small else 512))
        at_once = images_at_once(settings, device)
        if head.norm is None:
            head = replace(head, norm="batch" if at_once >= BATCH_NORM_FROM else "image")
            reasons.append(f"head.norm {head.norm}: {at_once} images a device and forward pass")
        elif head.norm == "batch" and at_once < 2:
            raise ValueError("head.norm is batch, with 1 image a device and forward pass: give more, or head.norm image")
        self.settings = replace(settings, data=data, head=head)
        return self.settings, reasons

    def samples(
        self, settings: SegmentationSettings, labels: LabeledScenes, channels: int, keep_decoded: bool
    ) -> tuple[SceneSamples, SceneSamples]:
        """Training samples, scaled, cropped and flipped at random, and whole validation scenes."""
        data = settings.data
        fill = tuple(round(255 * mean) for mean in self.preprocessing.mean)
        random_view = RandomScene(
            settings.size, data.short_side, data.scale, data.crop_class_share, data.flip, fill, labels.scheme.ignored_id
        )
        views = random_view, WholeScene(data.short_side)
        # Together only if they are of one size, before and after; one by one else.
        sizes = set(labels.validation_sizes)
        self.validation_batch = 1
        if len(sizes) == 1 and None not in sizes:
            area = max(math.prod(size) for size in (*sizes, scaled_size(*sizes, data.short_side)))
            self.validation_batch = min(max(1, VALIDATION_PIXELS // area), VALIDATION_IMAGES)
        parts = zip((labels.train, labels.validation), views)
        train, validation = (
            SceneSamples(part, view, labels.scheme, channels, settings.seed, keep_decoded) for part, view in parts
        )
        return train, validation

    def module(
        self,
        settings: SegmentationSettings,
        start: Start,
        labels: LabeledScenes,
        learning_rate: Callable[[int], float],
        say: Callable[[str], object] | None,
    ) -> SegmentationFinetuning:
        """Encoder and heads, and how they learn."""
        data, head, scheme = settings.data, settings.head, labels.scheme
        shape = HeadShape(head.width, head.norm, head.dropout, head.auxiliary > 0)
        model = Segmenter(start.encoder, len(scheme.classes), shape).train()
        if settings.init != "none":
            take_heads(model, settings.init, scheme.classes, say)
        self.scheme, self.preprocessing = scheme, start.preprocessing
        weights = balanced_weights(labels.pixels) if settings.class_weights == "balanced" else None
        return SegmentationFinetuning(
            model,
            start.preprocessing,
            scheme,
            data.inference,
            learning_rate,
            settings.optim,
            head.auxiliary,
            weights,
            data.color_jitter,
        )

    def callbacks(self, settings: SegmentationSettings, run: Path) -> list[pl.Callback]:
        """Pictures of every validation."""
        return [ShowMasks(settings.data.classes)]

    def report(self, run: Path, module: SegmentationFinetuning) -> None:
        """iou.csv, a row a class, and masks.png."""
        write_class_rows(run / CLASS_ROWS, module.confusion, self.scheme.classes)
        if module.shown:
            with atomic_write(run / PICTURE) as temporary:
                picture_of(module.shown, self.scheme.classes).save(temporary, format="png")

    def closing(self, run: Path) -> str:
        """The table of iou.csv."""
        return f"{class_table(run / CLASS_ROWS)}\n" if (run / CLASS_ROWS).is_file() else ""

    def save(
        self, folder: Path, model: Segmenter, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
    ) -> None:
        """As `simmim.finetune.load_segmenter` reads it."""
        data = self.settings.data
        saved = SavedSegmenter(model, self.scheme, preprocessing, data.short_side, data.inference)
        save_segmenter(folder, saved, provenance)


class ShowMasks(pl.Callback):
    """Logs the first validation images with their given and predicted masks after every validation."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes

    def on_validation_end(self, trainer: pl.Trainer, module: SegmentationFinetuning) -> None:
        """One picture a validation; the first process's images."""
        if not trainer.is_global_zero or not module.shown or trainer.state.fn != "fit":
            return
        picture = picture_of(module.shown, self.classes)
        log_picture(trainer.loggers, "masks", picture, trainer.global_step - 1, "image, given, predicted")


def images_at_once(settings: SegmentationSettings, device: str) -> int:
    """Images of one forward pass on one device, as far as that is known before there is a trainer."""
    if isinstance(settings.devices, int) or settings.devices.isdecimal():
        devices = max(1, int(settings.devices))
    else:
        devices = torch.cuda.device_count() if device == "cuda" else 1
    return settings.batch_size // devices // settings.optim.accumulate


def picture_of(shown: list[Shown], classes: tuple[str, ...]) -> Image.Image:
    """Images, given and predicted masks side by side."""
    return overlay_grid(*([getattr(one, name) for one in shown] for name in ("image", "given", "predicted")), classes)


def take_heads(model: Segmenter, source: str, classes: tuple[str, ...], say: Callable[[str], object] | None) -> None:
    """The heads of a segmenter from which the encoder was read, where they are of the same form and for the same classes;
    else they are fresh. Either is said."""
    if segmenter_folder(Path(source).expanduser()) is None:
        return
    saved = load_segmenter(source)
    state = saved.model.head_state()
    if saved.scheme.classes == classes and saved.model.shape == model.shape:
        load_heads(model, state, Path(source))
        text = f"heads of the same {len(classes)} classes taken over"
    else:
        text = f"heads of {len(saved.scheme.classes)} classes replaced by fresh ones of {len(classes)}"
    if say:
        say(f"adapted    {text}")


def looking(scenes: Iterable) -> Iterator:
    """A bar where there is someone to see it, once it takes more than a moment."""
    return iter(tqdm(scenes, desc="looking into masks", unit="mask", delay=3, leave=False, disable=not sys.stderr.isatty()))
