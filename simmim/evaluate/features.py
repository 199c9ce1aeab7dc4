"""Which vector stands for an image: a stage's map or the final one, pooled; and plain pixels, to compare with.

Shape letters: B images of a batch, C channels of a map, D values of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from simmim.encoders.base import EncoderConfig, EncoderOutput, Size

POOLINGS = ("mean", "2x2")
# A side of what is left of the pixels: 3,072 values in color, over which logistic regression is still quick.
PIXELS_SIDE = 32


@dataclass(frozen=True)
class Feature:
    """A vector that stands for an image.

    Args:
        stage: a stage's map, from 0, before merging and without the final norm; None for the last one's after the norm.
        pooling: mean of the map, C values; or 2x2, the means of its quarters, 4 · C values, channel by channel. Quarters
            of a map with an odd side share its middle.

    Raises:
        ValueError: for another pooling or a negative stage.
    """

    stage: int | None = None
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}: give one of {', '.join(POOLINGS)}")
        if self.stage is not None and (not isinstance(self.stage, int) or self.stage < 0):
            raise ValueError(f"stage is {self.stage!r}: give a number from 0, or None for the final features")

    @property
    def name(self) -> str:
        """For tables and keys: "stage 2", "stage 2, 2x2", "final"."""
        place = "final" if self.stage is None else f"stage {self.stage}"
        return place if self.pooling == "mean" else f"{place}, {self.pooling}"

    def dim(self, config: EncoderConfig) -> int:
        """D of an encoder of that architecture.

        Raises:
            ValueError: when it has no such stage.
        """
        if self.stage is not None and self.stage >= len(config.channels):
            raise ValueError(f"stage is {self.stage}: this encoder has stages 0 to {len(config.channels) - 1}")
        return config.channels[-1 if self.stage is None else self.stage] * (4 if self.pooling == "2x2" else 1)

    def of(self, images: Tensor, output: EncoderOutput) -> Tensor:
        """(B, D) float32."""
        if self.stage is None and self.pooling == "mean":
            return output.pooled.float()
        features = (output.features if self.stage is None else output.stages[self.stage]).float()
        return features.mean(dim=(2, 3)) if self.pooling == "mean" else F.adaptive_avg_pool2d(features, 2).flatten(1)


@dataclass(frozen=True)
class Pixels:
    """The image itself, normalized, averaged down to at most `PIXELS_SIDE` rows and columns: what a classifier has without
    an encoder, and what features should beat.

    Args:
        image_size: (height, width) that the encoder sees.
    """

    image_size: Size
    stage = None  # none of the encoder's maps is needed

    @property
    def size(self) -> Size:
        """(height, width) of what is left."""
        return tuple(min(side, PIXELS_SIDE) for side in self.image_size)

    @property
    def name(self) -> str:
        """For tables and keys: "pixels, 32×32"."""
        return f"pixels, {self.size[0]}×{self.size[1]}"

    def dim(self, config: EncoderConfig) -> int:
        """D, of an encoder of that many channels."""
        return config.in_channels * self.size[0] * self.size[1]

    def of(self, images: Tensor, output: EncoderOutput) -> Tensor:
        """(B, D) float32."""
        return F.adaptive_avg_pool2d(images.float(), self.size).flatten(1)


def all_features(config: EncoderConfig, image_size: Size) -> tuple[Feature, ...]:
    """Every stage's and the final features, by each pooling that differs: a map of one token has no quarters."""
    found = []
    for stage in (*range(len(config.channels)), None):
        stride = config.strides[-1 if stage is None else stage]
        poolings = POOLINGS if max(image_size) > stride else ("mean",)
        found += [Feature(stage, pooling) for pooling in poolings]
    return tuple(found)


def chosen_features(
    config: EncoderConfig, image_size: Size, stage: str = "all", pooling: str = "all"
) -> tuple[Feature, ...]:
    """Of `all_features` those of one stage, one pooling, or both.

    Args:
        stage: all, final, or a stage's number.
        pooling: all, mean or 2x2.

    Raises:
        ValueError: for another stage or pooling, naming those there are; when none is left.
    """
    stages = {"final": None, **{str(number): number for number in range(len(config.channels))}}
    if stage != "all" and stage not in stages:
        raise ValueError(f"stage is {stage!r}: give all, {', '.join(stages)}")
    if pooling != "all" and pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}: give all, {', '.join(POOLINGS)}")
    found = [feature for feature in all_features(config, image_size) if stage == "all" or feature.stage == stages[stage]]
    kept = tuple(feature for feature in found if pooling in ("all", feature.pooling))
    if not kept:
        raise ValueError(f"the map of stage {stage!r} is a single token, which has no quarters: give pooling mean")
    return kept
