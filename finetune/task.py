"""What a labeled task brings to a fine-tuned run; `simmim.finetune.run` does what all tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import Dataset

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.encoders.base import EncoderConfig
from simmim.finetune.settings import TransferSettings
from simmim.finetune.start import Start


class Labels(Protocol):
    """Labeled images read: `train` and `validation` are datasets with a column `image`, undecoded, and the task's own."""

    train: Any
    validation: Any
    classes: tuple[str, ...]


class Task(ABC):
    """One labeled task. Its methods are called in this order.

    Attributes:
        monitor: of the validation metrics the one by which the best model is chosen, as the module logs it, in [0, 1].
        validation_batch: validation images at a time.
    """

    monitor: str
    validation_batch: int = 64

    @abstractmethod
    def read(self, settings: TransferSettings) -> Labels:
        """The labeled images.

        Raises:
            ValueError: when they cannot serve.
        """

    @abstractmethod
    def completed(
        self, settings: TransferSettings, labels: Labels, encoder: EncoderConfig, device: str
    ) -> tuple[TransferSettings, list[str]]:
        """Settings with what the user left open filled in, and a line for each choice that needs a reason."""

    @abstractmethod
    def module(
        self,
        settings: TransferSettings,
        start: Start,
        labels: Labels,
        learning_rate: Callable[[int], float],
        say: Callable[[str], object] | None,
    ) -> pl.LightningModule:
        """What is trained; its `model` has an `encoder` and is in training mode.

        Args:
            learning_rate: as a function of the optimizer step, from 0.
            say: is told what becomes of a head that came with the encoder.
        """

    @abstractmethod
    def samples(
        self, settings: TransferSettings, labels: Labels, channels: int, keep_decoded: bool
    ) -> tuple[Dataset, Dataset]:
        """Samples to train on and to validate with, by (epoch, index)."""

    def report(self, run: Path, module: pl.LightningModule) -> None:  # noqa: B027
        """Write down what the validation that has just ended says of `module`'s model, the best so far. Called by the first
        process alone."""

    def closing(self, run: Path) -> str:
        """What is said of the best model when the run is through; empty for nothing."""
        return ""

    def callbacks(self, settings: TransferSettings, run: Path) -> list[pl.Callback]:
        """What else runs along."""
        return []

    @abstractmethod
    def save(
        self, folder: Path, model: nn.Module, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
    ) -> None:
        """Write the model so that it can be read without the run."""
