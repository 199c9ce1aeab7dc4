"""Stage 2: transfer an encoder to labeled tasks."""

from importlib import import_module

_HOMES = {
    "finetune": "simmim.finetune.run",
    "predict": "simmim.finetune.classification.prediction",
    "load_classifier": "simmim.finetune.classification.model",
    "segment": "simmim.finetune.segmentation.prediction",
    "load_segmenter": "simmim.finetune.segmentation.model",
    "SegmentationSettings": "simmim.finetune.segmentation.settings",
    "SceneSettings": "simmim.finetune.segmentation.settings",
    "HeadSettings": "simmim.finetune.segmentation.settings",
    "detect": "simmim.finetune.detection.prediction",
    "load_detector": "simmim.finetune.detection.model",
    "DetectionSettings": "simmim.finetune.detection.settings",
    "BoxSettings": "simmim.finetune.detection.settings",
    "ClassificationSettings": "simmim.finetune.classification.settings",
    "LabeledSettings": "simmim.finetune.classification.settings",
    "AffineSettings": "simmim.finetune.augment.affine",
    "EncoderSettings": "simmim.finetune.settings",
    "OptimSettings": "simmim.finetune.settings",
    "study": "simmim.finetune.label_study.study",
    "StudySettings": "simmim.finetune.label_study.settings",
    "SegmentationStudySettings": "simmim.finetune.segmentation.study",
    "DetectionStudySettings": "simmim.finetune.detection.study",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'simmim.finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
