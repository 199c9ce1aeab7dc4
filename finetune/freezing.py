"""What of an encoder is trained: all of it, its last stages, or nothing but the head."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from torch import nn

from simmim.encoders.base import Encoder


def frozen_parts(encoder: Encoder, freeze: bool, train_stages: int | None) -> list[nn.Module]:
    """The parts of an encoder that stay as they are.

    Args:
        freeze: all of it.
        train_stages: train so many of its last stages and the final norm; the patch embedding counts with the first stage,
            a merging with the stage before it. None for all.

    Raises:
        ValueError: when it does not have so many stages.
    """
    if freeze:
        return [encoder]
    stages = encoder.stage_modules()
    if train_stages is None:
        return []
    if train_stages > len(stages):
        raise ValueError(f"train_stages is {train_stages}, the encoder has {len(stages)} stages: give 1 to {len(stages)}")
    return [part for stage in stages[: len(stages) - train_stages] for part in stage]


class KeepFrozen(pl.Callback):
    """Keeps parts of a model out of training: without gradients, which also spares the backward pass through them, and in
    evaluation mode, without stochastic depth and with batch statistics left alone.

    Args:
        parts: frozen from now on, so that an optimizer that is made later does not hold them.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = list(parts)
        for part in self.parts:
            part.requires_grad_(False)

    def on_train_batch_start(self, *_) -> None:
        """Whatever put the model into training mode."""
        for part in self.parts:
            if part.training:
                part.eval()
