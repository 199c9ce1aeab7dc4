"""Stage 2: transfer an encoder to labeled tasks."""
from importlib import import_module

_HOMES = {
    "finetune": "finetune.run",
    "predict": "finetune.prediction",
    "load_classifier": "finetune.classification",
    "segment": "finetune.segmentation_prediction",
    "load_segmenter": "finetune.segmentation",
    "SegmentationSettings": "finetune.segmentation_settings",
    "SceneSettings": "finetune.segmentation_settings",
    "HeadSettings": "finetune.segmentation_settings",
    "FinetuneSettings": "finetune.classification_settings",
    "LabeledSettings": "finetune.classification_settings",
    "AffineSettings": "finetune.augment",
    "EncoderSettings": "finetune.settings",
    "OptimSettings": "finetune.settings",
    "study": "finetune.label_study",
    "StudySettings": "finetune.study_settings",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
