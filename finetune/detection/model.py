"""A detector: a feature pyramid on the maps of an encoder's stages, and how it is saved and loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import normalize
from simmim.encoders.base import Encoder
from simmim.finetune.dense.head_files import HeadFiles
from simmim.finetune.dense.model import DenseModel
from simmim.finetune.detection.inference import MAX_BOXES, Found, find_boxes
from simmim.finetune.detection.pyramid import Predictions, PyramidHead

FILES = HeadFiles("detection", "detector")


@dataclass(frozen=True)
class HeadShape:
    """What it takes to build a detector's head.

    Args:
        width, convolutions, num_above, masks: as of `PyramidHead`.
    """

    width: int = 256
    convolutions: int = 4
    num_above: int = 0
    masks: bool = False


class Detector(DenseModel):
    """An encoder, a norm on each stage's map, and a pyramid head on all maps."""

    def __init__(self, encoder: Encoder, num_classes: int, shape: HeadShape) -> None:
        super().__init__(encoder, shape)
        self.head = PyramidHead(
            encoder.channels,
            encoder.strides,
            num_classes,
            shape.width,
            shape.convolutions,
            shape.num_above,
            shape.masks,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.head.classify.out_channels

    def forward(self, images: Tensor) -> Predictions:
        """Normalized images, (B, channels, height, width), to predictions of every point."""
        return self.head(self.maps(images))


# --- On disk -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedDetector:
    """A detector as it was read: the model in evaluation mode, its classes, and how to feed it.

    Attributes:
        thresholds: score of each class from which boxes are shown: the one with the best F1 on the validation images.
        short_side: pixels to which the shorter side of an image is resized; 0 keeps images as they are.
        inference: whole, tiles or auto.
    """

    model: Detector
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    preprocessing: Preprocessing
    short_side: int
    inference: str

    def find(self, images: Tensor, max_boxes: int = MAX_BOXES) -> list[Found]:
        """The boxes in each image, in its pixels, of any score; `thresholds` say which to trust.

        Args:
            images: (B, channels, height, width), uint8 or float32 as the preprocessing reads them, at the scale that
                `short_side` says, on the model's device.
            max_boxes: of one image.
        """
        normalized = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        with torch.inference_mode():
            return find_boxes(self.model, normalized, self.preprocessing.image_size, self.inference, max_boxes)


def save_detector(folder: Path, saved: SavedDetector, provenance: dict) -> None:
    """Write encoder and head into `folder`. Readers of the encoder alone ignore the head's files."""
    description = {
        "classes": list(saved.classes),
        "thresholds": list(saved.thresholds),
        "head": asdict(saved.model.shape),
        "short_side": saved.short_side,
        "inference": saved.inference,
    }
    FILES.save(folder, saved, description, provenance)


def load_detector(path: str | Path) -> SavedDetector:
    """A fine-tuned detector, from its run folder or its folder encoder/.

    Raises:
        ValueError: when there is none, or its weights do not fit.
    """

    def parse(found: dict) -> tuple[tuple[str, ...], tuple[float, ...], HeadShape, int, str]:
        classes, thresholds = tuple(found["classes"]), tuple(found["thresholds"])
        return classes, thresholds, HeadShape(**found["head"]), found["short_side"], found["inference"]

    saved, folder, (classes, thresholds, shape, short_side, inference) = FILES.read(path, parse)
    model = Detector(saved.encoder, len(classes), shape)
    FILES.load_weights(model, folder)
    return SavedDetector(model.eval(), classes, thresholds, saved.preprocessing, short_side, inference)
