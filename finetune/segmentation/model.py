"""A segmenter: UPerNet on the maps of an encoder's stages, and how it is saved and loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import normalize
from simmim.data.label_maps import ClassScheme
from simmim.encoders.base import Encoder
from simmim.finetune.dense.head_files import HeadFiles
from simmim.finetune.dense.model import DenseModel
from simmim.finetune.segmentation.sliding import dense_logits
from simmim.finetune.segmentation.upernet import FCN, POOL_SCALES, UPerNet

FILES = HeadFiles("segmentation", "segmenter")


@dataclass(frozen=True)
class HeadShape:
    """What it takes to build a segmenter's heads.

    Args:
        width: channels of UPerNet; the auxiliary head has half as many, as published.
        norm: as of `UPerNet`.
        dropout: as of `UPerNet`.
        auxiliary: whether there is an auxiliary head.
        pool_scales: as of `UPerNet`.
    """

    width: int = 512
    norm: str = "batch"
    dropout: float = 0.1
    auxiliary: bool = True
    pool_scales: tuple[int, ...] = POOL_SCALES

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool_scales", tuple(self.pool_scales))


class SegmenterOutput(NamedTuple):
    """Logits at resolutions of the encoder's maps.

    Attributes:
        logits: (B, classes, H, W) at the first stage's resolution.
        auxiliary: (B, classes, H, W) at the resolution of the last stage but one; None without an auxiliary head.
    """

    logits: Tensor
    auxiliary: Tensor | None


class Segmenter(DenseModel):
    """An encoder, a norm on each stage's map, UPerNet on all maps, and in training an auxiliary head on one.

    Attributes:
        stride, auxiliary_stride: pixels along a side of a cell of each head's logits.
    """

    def __init__(self, encoder: Encoder, num_classes: int, shape: HeadShape) -> None:
        super().__init__(encoder, shape)
        self.head = UPerNet(encoder.channels, num_classes, shape.width, shape.norm, shape.pool_scales, shape.dropout)
        self.auxiliary_stage = max(0, len(encoder.channels) - 2)
        channels = encoder.channels[self.auxiliary_stage]
        width = max(16, shape.width // 2)
        self.stride, self.auxiliary_stride = encoder.strides[0], encoder.strides[self.auxiliary_stage]
        self.auxiliary = FCN(channels, num_classes, width, shape.norm, shape.dropout) if shape.auxiliary else None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.head.classify.out_channels

    def forward(self, images: Tensor, with_auxiliary: bool = False) -> Tensor | SegmenterOutput:
        """Normalized images, (B, channels, height, width), to logits, (B, classes, H, W) at the first stage's resolution, or
        to those of both heads."""
        maps = self.maps(images)
        logits = self.head(maps)
        if not with_auxiliary:
            return logits
        return SegmenterOutput(logits, None if self.auxiliary is None else self.auxiliary(maps[self.auxiliary_stage]))


# --- On disk -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedSegmenter:
    """A segmenter as it was read: the model in evaluation mode, its classes, and how to feed it.

    Attributes:
        short_side: pixels to which the shorter side of an image is resized; 0 keeps images as they are.
        inference: whole, slide or auto.
    """

    model: Segmenter
    scheme: ClassScheme
    preprocessing: Preprocessing
    short_side: int
    inference: str

    def logits(self, images: Tensor) -> Tensor:
        """Logits for every pixel, (B, classes, height, width); `most_likely_class` turns them into label maps.

        Args:
            images: (B, channels, height, width) uint8, at the scale that `short_side` says, on the model's device.
        """
        normalized = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        with torch.inference_mode():
            window = self.preprocessing.image_size
            return dense_logits(self.model, normalized, window, self.inference, self.model.stride)


def save_segmenter(folder: Path, saved: SavedSegmenter, provenance: dict) -> None:
    """Write encoder and heads into `folder`. Readers of the encoder alone ignore the heads' files."""
    description = {
        **asdict(saved.scheme),
        "head": asdict(saved.model.shape),
        "short_side": saved.short_side,
        "inference": saved.inference,
    }
    FILES.save(folder, saved, description, provenance)


def load_segmenter(path: str | Path) -> SavedSegmenter:
    """A fine-tuned segmenter, from its run folder or its folder encoder/.

    Raises:
        ValueError: when there is none, or its weights do not fit.
    """

    def parse(found: dict) -> tuple[ClassScheme, HeadShape, int, str]:
        scheme = ClassScheme(tuple(found["classes"]), tuple(found["values"]), found["ignore_index"])
        return scheme, HeadShape(**found["head"]), found["short_side"], found["inference"]

    saved, folder, (scheme, shape, short_side, inference) = FILES.read(path, parse)
    model = Segmenter(saved.encoder, len(scheme.classes), shape)
    FILES.load_weights(model, folder)
    return SavedSegmenter(model.eval(), scheme, saved.preprocessing, short_side, inference)
