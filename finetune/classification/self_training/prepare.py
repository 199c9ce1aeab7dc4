"""What a run with unlabeled images has beside a run on labels alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from simmim.data import ImageSamples, LabeledImages, RandomView, read_labeled_images
from simmim.data.decode import STRETCHED
from simmim.data.labels import class_indices
from simmim.finetune.augment.affine import AffineSettings
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.augment.color import ColorSettings
from simmim.finetune.classification.self_training.module import SelfTraining
from simmim.finetune.classification.self_training.samples import UnlabeledSamples
from simmim.finetune.classification.settings import ClassificationSettings
from simmim.finetune.self_training.defaults import start_step
from simmim.finetune.self_training.prepare import add_unlabeled
from simmim.finetune.self_training.pseudo_labels import PseudoLabeler
from simmim.finetune.self_training.teacher import Teacher
from simmim.finetune.self_training.unlabeled import UnlabeledImages, open_unlabeled
from simmim.finetune.start import Start
from simmim.finetune.task import PreparedTask
from simmim.reading import Reading

WEAKEST_CROP = 0.8  # share of the area that the teacher sees at least, unless the labeled views are larger
LARGEST_ZOOM = 0.9  # below 1, see `AffineSettings`


def read_unlabeled(settings: ClassificationSettings, labels: LabeledImages, reading: Reading = STRETCHED) -> UnlabeledImages:
    """The unlabeled images of a run.

    Args:
        labels: what the run learns from and what judges it.
        reading: how values become pictures, as for the labeled images.

    Raises:
        ValueError: as `open_unlabeled`; when a class has no label to learn from.
    """
    data = settings.data
    assert data.unlabeled is not None
    missing = sorted(set(range(len(labels.classes))) - set(class_indices(labels.train).tolist()))
    if missing:
        raise ValueError(
            f"{len(labels.train)} labels for {len(labels.classes)} classes: class {labels.classes[missing[0]]!r} has none "
            "to learn from, give each class one or more"
        )
    everything = read_labeled_images(
        data.path, None, settings.seed, data.column, data.label_column, data.validation_seed, reading
    )
    return open_unlabeled(data.unlabeled, labels, everything, reading, data.unlabeled_column)


def module_builder(settings: ClassificationSettings, labels: LabeledImages) -> Callable[..., SelfTraining]:
    """`SelfTraining` with all of its own arguments, from resolved settings.

    Raises:
        ValueError: when the run holds no step with pseudo-labels.
    """
    chosen, num_classes = settings.self_training, len(labels.classes)
    return partial(
        SelfTraining,
        strong=strong_changes(settings),
        labeler=PseudoLabeler(num_classes, target_shares(chosen.alignment, labels)),
        teacher=Teacher(settings.optim.ema),
        start=start_step(settings, len(labels.train)),
        weight=chosen.weight,
    )


def target_shares(alignment: str, labels: LabeledImages) -> Tensor | None:
    """The shares of the classes that predictions are aligned to, (classes,) float32; None for no alignment."""
    num_classes = len(labels.classes)
    if alignment == "none":
        return None
    if alignment == "uniform":
        return torch.full((num_classes,), 1 / num_classes)
    counts = torch.bincount(torch.from_numpy(class_indices(labels.train)), minlength=num_classes).float()
    return counts / counts.sum()


def strong_changes(settings: ClassificationSettings) -> BatchChanges:
    """The random changes of the student's views of unlabeled images."""
    data, chosen = settings.data, settings.self_training
    factor, given = (1.0 if chosen.affine is None else chosen.affine), data.affine
    zoom = min(given.zoom * factor, LARGEST_ZOOM)
    affine = AffineSettings(given.degrees * factor, zoom, given.shear * factor, given.shift * factor)
    color = ColorSettings(
        chosen.rand_augment or 0.0, data.rand_augment_operations, data.rand_augment_spread, data.color_jitter or 0.0
    )
    return BatchChanges(affine, color, chosen.erasing or 0.0)


def with_unlabeled(prepared: PreparedTask, unlabeled: UnlabeledImages, channels: int, start: Start) -> PreparedTask:
    """A prepared run on labels alone, and the unlabeled images with it.

    Args:
        prepared: its module is of `module_builder`.
        channels: of the encoder.
        start: where the run starts.
    """
    settings, module, labeled = prepared.settings, prepared.module, prepared.train
    assert isinstance(settings, ClassificationSettings) and isinstance(module, SelfTraining)
    assert isinstance(labeled, ImageSamples) and settings.data.unlabeled is not None
    data = settings.data
    low, high = data.crop_scale or (1.0, 1.0)
    strong_view, weak_view = (
        RandomView(settings.size, scale, data.crop_ratio, data.flip or 0.0)
        for scale in ((low, high), (max(low, min(WEAKEST_CROP, high)), high))
    )
    samples = UnlabeledSamples(
        unlabeled.images,
        strong_view,
        weak_view,
        channels,
        settings.seed,
        keep_decoded=start.keep_decoded,
        reading=start.preprocessing.reading_or_default,
    )
    return add_unlabeled(prepared, unlabeled, samples)
