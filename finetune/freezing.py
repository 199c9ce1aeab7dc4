"""Which parts of an encoder are trained: all of it, its last stages, or nothing but the head."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from torch import nn

from simmim.encoders.base import Encoder


def frozen_parts(encoder: Encoder, freeze: bool, train_stages: int | None) -> list[nn.Module]:
    """The parts of an encoder that are not trained.

    Args:
        freeze: whether the whole encoder is frozen.
        train_stages: train this number of last stages and the final norm; None for all. The patch embedding belongs to the
            first stage, a downsampling to the stage before it.

    Raises:
        ValueError: when the encoder has fewer stages.
    """
    if freeze:
        return [encoder]
    if train_stages is None:
        return []
    stages = encoder.stage_modules()
    if train_stages > len(stages):
        raise ValueError(f"train_stages is {train_stages}, the encoder has {len(stages)} stages: give 1 to {len(stages)}")
    return [part for stage in stages[: len(stages) - train_stages] for part in stage]


class KeepFrozen(pl.Callback):
    """Keeps parts of a model out of training: without gradients, which also spares the backward pass through them, and in
    evaluation mode, without stochastic depth and with fixed batch statistics.

    Args:
        parts: frozen at once, so that an optimizer that is built later does not hold their parameters.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = list(parts)
        for part in self.parts:
            part.requires_grad_(False)

    def on_train_batch_start(self, *_) -> None:
        """Set evaluation mode again, as Lightning sets the model to training mode."""
        for part in self.parts:
            if part.training:
                part.eval()
