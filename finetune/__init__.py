"""Stage 2: transfer an encoder to labeled tasks."""
from importlib import import_module

_HOMES = {
    "finetune": "finetune.run",
    "predict": "finetune.classification.prediction",
    "load_classifier": "finetune.classification.model",
    "segment": "finetune.segmentation.prediction",
    "load_segmenter": "finetune.segmentation.model",
    "SegmentationSettings": "finetune.segmentation.settings",
    "SceneSettings": "finetune.segmentation.settings",
    "HeadSettings": "finetune.segmentation.settings",
    "FinetuneSettings": "finetune.classification.settings",
    "LabeledSettings": "finetune.classification.settings",
    "AffineSettings": "finetune.augment.affine",
    "EncoderSettings": "finetune.settings",
    "OptimSettings": "finetune.settings",
    "study": "finetune.label_study.trials",
    "StudySettings": "finetune.label_study.settings",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
