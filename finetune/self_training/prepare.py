"""A prepared run on labels alone, and the unlabeled images with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from simmim.data import ImageSamples
from simmim.finetune.self_training.module import SelfTrainingSteps
from simmim.finetune.self_training.report import ReportPseudoLabels
from simmim.finetune.self_training.samples import SelfTrainingSamples
from simmim.finetune.self_training.unlabeled import UnlabeledImages
from simmim.finetune.task import PreparedTask


def add_unlabeled(prepared: PreparedTask, unlabeled: UnlabeledImages, samples: ImageSamples) -> PreparedTask:
    """A prepared run with unlabeled images in its batches, its teacher, and a report of the pseudo-labels.

    Args:
        prepared: its module is of `SelfTrainingSteps`, its settings are resolved.
        unlabeled: the images.
        samples: of them.
    """
    settings: Any = prepared.settings
    module, labeled = prepared.module, prepared.train
    assert isinstance(module, SelfTrainingSteps) and isinstance(labeled, ImageSamples)
    report = ReportPseudoLabels(Path(settings.out).expanduser(), prepared.classes, settings.num_steps(len(labeled)))
    first = module.start * settings.optim.accumulate
    return replace(
        prepared,
        train=SelfTrainingSamples(labeled, samples, settings.self_training.ratio, first),
        callbacks=(*prepared.callbacks, report),
        average=module.teacher,
        provenance={
            **prepared.provenance,
            "unlabeled": Path(settings.data.unlabeled).name,
            "unlabeled_images": len(unlabeled.images),
        },
        reasons=(*unlabeled.lines(), *prepared.reasons),
    )
