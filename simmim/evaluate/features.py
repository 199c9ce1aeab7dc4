"""Features of an image: the pooled map of a stage or of the final norm, and plain pixels to compare with.

Shape letters: B images of a batch, D values of a feature vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from simmim.encoders.base import EncoderConfig, EncoderOutput, Size

POOLINGS = ("mean", "2x2")
# Largest side of the pixel feature: 3,072 values in color, for which logistic regression is still fast.
PIXELS_SIDE = 32


class AnyFeature(Protocol):
    """A vector per image: `Feature`, `Pixels`, and what has their attributes."""

    @property
    def name(self) -> str:
        """Name in tables and keys."""

    @property
    def stage(self) -> int | None:
        """The stage whose map is needed; None for one that needs the encoder's last map alone, or none."""

    def dim(self, config: EncoderConfig) -> int:
        """D for an encoder of this architecture."""

    def extract(self, images: Tensor, output: EncoderOutput) -> Tensor:
        """The vectors of a batch, (B, D) float32."""


@dataclass(frozen=True)
class Feature:
    """A vector per image, pooled from one of the encoder's maps.

    Args:
        stage: number of the stage, from 0, whose map before downsampling and without the final norm is pooled; None for
            the last map after the norm.
        pooling: mean of the map, as many values as it has channels; or 2x2, the means of its quarters, four values per
            channel. Quarters of a map with an odd side share its middle.

    Raises:
        ValueError: for an unknown pooling or a stage that is no number from 0.
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
        """Name in tables and keys: "stage 2", "stage 2, 2x2", "final"."""
        stage = "final" if self.stage is None else f"stage {self.stage}"
        return stage if self.pooling == "mean" else f"{stage}, {self.pooling}"

    def dim(self, config: EncoderConfig) -> int:
        """D for an encoder of this architecture.

        Raises:
            ValueError: when it has no such stage.
        """
        if self.stage is not None and self.stage >= len(config.channels):
            raise ValueError(f"stage is {self.stage}: this encoder has stages 0 to {len(config.channels) - 1}")
        return config.channels[-1 if self.stage is None else self.stage] * (4 if self.pooling == "2x2" else 1)

    def extract(self, images: Tensor, output: EncoderOutput) -> Tensor:
        """The vectors of a batch, (B, D) float32.

        Args:
            images: what the encoder saw, (B, channels, height, width).
            output: what it returned, with the maps of all stages where `stage` names one.
        """
        if self.stage is None:
            if self.pooling == "mean":
                return output.pooled.float()
            features = output.features.float()
        else:
            assert output.stages is not None, "the encoder was not asked for its stages"
            features = output.stages[self.stage].float()
        return features.mean(dim=(2, 3)) if self.pooling == "mean" else F.adaptive_avg_pool2d(features, 2).flatten(1)


@dataclass(frozen=True)
class Pixels:
    """The normalized image itself, averaged down to at most `PIXELS_SIDE` pixels per side.

    This is what a classifier has without an encoder, so features should be better.

    Args:
        image_size: (height, width) that the encoder sees.
    """

    image_size: Size
    stage = None  # needs no map of the encoder

    @property
    def size(self) -> Size:
        """(height, width) of the reduced image."""
        return (min(self.image_size[0], PIXELS_SIDE), min(self.image_size[1], PIXELS_SIDE))

    @property
    def name(self) -> str:
        """Name in tables and keys: "pixels, 32×32"."""
        return f"pixels, {self.size[0]}×{self.size[1]}"

    def dim(self, config: EncoderConfig) -> int:
        """D for an encoder with as many input channels as this architecture."""
        return config.in_channels * self.size[0] * self.size[1]

    def extract(self, images: Tensor, output: EncoderOutput) -> Tensor:
        """The vectors of a batch, (B, D) float32; the arguments are as of `Feature.extract`."""
        return F.adaptive_avg_pool2d(images.float(), self.size).flatten(1)


def all_features(config: EncoderConfig, image_size: Size) -> tuple[Feature, ...]:
    """The features of every stage and the final ones, by each pooling that differs: a map of one token has no quarters."""
    features = []
    for stage in (*range(len(config.channels)), None):
        stride = config.strides[-1 if stage is None else stage]
        poolings = POOLINGS if max(image_size) > stride else ("mean",)
        features += [Feature(stage, pooling) for pooling in poolings]
    return tuple(features)


def select_features(
    config: EncoderConfig, image_size: Size, stage: str = "all", pooling: str = "all"
) -> tuple[Feature, ...]:
    """Those of `all_features` with one stage, one pooling, or both.

    Args:
        stage: all, final, or the number of a stage.
        pooling: all, mean or 2x2.

    Raises:
        ValueError: for an unknown stage or pooling, naming the known ones; when no feature is left.
    """
    stages = {"final": None, **{str(number): number for number in range(len(config.channels))}}
    if stage != "all" and stage not in stages:
        raise ValueError(f"stage is {stage!r}: give all, {', '.join(stages)}")
    if pooling != "all" and pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}: give all, {', '.join(POOLINGS)}")
    selected = tuple(
        feature
        for feature in all_features(config, image_size)
        if (stage == "all" or feature.stage == stages[stage]) and pooling in ("all", feature.pooling)
    )
    if not selected:
        raise ValueError(f"the map of stage {stage!r} is a single token, which has no quarters: give pooling mean")
    return selected
