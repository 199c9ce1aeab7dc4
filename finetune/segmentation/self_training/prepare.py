"""What a segmentation run with unlabeled images has beside a run on labels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from simmim.data.decode import MAX_PIXELS
from simmim.data.label_maps import LabeledScenes
from simmim.finetune.augment.color import ColorSettings
from simmim.finetune.segmentation.self_training.module import PseudoMaskTraining
from simmim.finetune.segmentation.self_training.pseudo_masks import PixelLabeler
from simmim.finetune.segmentation.self_training.samples import UnlabeledScenes
from simmim.finetune.segmentation.settings import SegmentationSettings
from simmim.finetune.segmentation.views import RandomScene
from simmim.finetune.self_training.defaults import start_step
from simmim.finetune.self_training.prepare import add_unlabeled
from simmim.finetune.self_training.teacher import Teacher
from simmim.finetune.self_training.unlabeled import UnlabeledImages, open_unlabeled
from simmim.finetune.start import Start
from simmim.finetune.task import PreparedTask
from simmim.reading import Reading


def read_unlabeled(
    settings: SegmentationSettings,
    labels: LabeledScenes,
    read_labels: Callable[[SegmentationSettings], LabeledScenes],
    reading: Reading,
) -> UnlabeledImages:
    """The unlabeled images of a run.

    Args:
        labels: what the run learns from and what judges it.
        read_labels: of settings. In cross-validation the images that judge without it are left out too.
        reading: how values become pictures, as for the labeled images.

    Raises:
        ValueError: as `open_unlabeled`.
    """
    data, everything = settings.data, labels
    assert data.unlabeled is not None
    if data.fold:
        everything = read_labels(replace(settings, data=replace(data, fold=None)))
    return open_unlabeled(data.unlabeled, labels, everything, reading, data.unlabeled_column)


def module_builder(settings: SegmentationSettings, labels: LabeledScenes) -> Callable[..., PseudoMaskTraining]:
    """`PseudoMaskTraining` with all of its own arguments, from resolved settings.

    Raises:
        ValueError: when the run holds no step with pseudo-labels.
    """
    chosen, num_classes = settings.self_training, len(labels.classes)
    # In cross-validation a class may have no pixel to train on; no share may be zero.
    shares = torch.tensor(labels.pixels, dtype=torch.float32).clamp(min=1)
    if chosen.alignment == "uniform":
        shares = torch.ones(num_classes)
    return partial(
        PseudoMaskTraining,
        strong=ColorSettings(chosen.rand_augment or 0.0, jitter=chosen.color_jitter or 0.0),
        labeler=PixelLabeler(num_classes, shares / shares.sum(), aligned=chosen.alignment != "none"),
        teacher=Teacher(settings.optim.ema),
        start=start_step(settings, len(labels.train)),
        weight=chosen.weight,
    )


def with_unlabeled(prepared: PreparedTask, unlabeled: UnlabeledImages, view: RandomScene, start: Start) -> PreparedTask:
    """A prepared run on labels alone, and the unlabeled images with it.

    Args:
        prepared: its module is of `module_builder`.
        view: of the labeled images.
        start: where the run starts.
    """
    settings, module = prepared.settings, prepared.module
    assert isinstance(settings, SegmentationSettings) and isinstance(module, PseudoMaskTraining)
    samples = UnlabeledScenes(
        unlabeled.images,
        replace(view, class_share=1.0),
        settings.self_training.cutmix or 0.0,
        module.scheme.dtype,
        start.encoder.config.in_channels,
        settings.seed,
        keep_decoded=start.keep_decoded,
        max_pixels=MAX_PIXELS,
        reading=start.preprocessing.reading_or_default,
    )
    return add_unlabeled(prepared, unlabeled, samples)
