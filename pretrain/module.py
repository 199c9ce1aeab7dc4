"""A method of pre-training as a LightningModule: normalize, draw, loss, optimize. The methods are in `simmim.methods`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from simmim.data import normalize, valid_pixels
from simmim.encoders.base import EncoderConfig, Size
from simmim.methods.base import Method, MethodOutput, MethodSettings
from simmim.training.module import TrainingModule


class PretrainingModule(TrainingModule):
    """One optimizer step after another on batches of images, uint8 or, of deep images, float32.

    Args:
        model: the method, with its encoder.
        mean, std: by which images are normalized, of values in [0, 1].
        learning_rate: as a function of the optimizer step, from 0.
        weight_decay, clip: of AdamW and of the gradient's norm.
        by_size: the encoder's architecture and the method's settings at each image size, (height, width), where images grow
            in the course of the run; empty where all have the size that `model` was built for.
    """

    def __init__(
        self,
        model: Method,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        learning_rate: Callable[[int], float],
        weight_decay: float,
        clip: float,
        by_size: Mapping[Size, tuple[EncoderConfig, MethodSettings]] = MappingProxyType({}),
    ) -> None:
        super().__init__(model, learning_rate, weight_decay, clip)
        self.mean, self.std, self.by_size = mean, std, by_size
        self.size_in_use: Size | None = None

    def use_size(self, size: Size) -> None:
        """Compute on images of (height, width) from now on, where images grow. The batch decides, so that images held out
        and pictures, which are of the last size, leave the next step as it is."""
        if self.by_size and size != self.size_in_use:
            self.model.change_size(*self.by_size[size])
            self.size_in_use = size

    def inputs(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Normalized images, (B, channels, height, width), and what the method draws for them from their seeds."""
        images = normalize(batch["image"], self.mean, self.std)
        size: Size = tuple(images.shape[-2:])  # type: ignore[assignment]
        self.use_size(size)
        return images, self.model.draw(size, batch["seed"], images.device)

    def output_of(self, batch: dict) -> MethodOutput:
        """The loss of one batch, of the pixels that have data, and the method's metrics."""
        valid = valid_pixels(batch["image"])
        known: dict[str, Any] = {} if valid is None else {"valid": valid}
        if "views" in batch:
            known["views"] = self.views(batch)
        return self.model(*self.inputs(batch), **known)

    def views(self, batch: dict) -> list[Tensor]:
        """The further views of a batch, normalized and changed by the method; still zeros where there is no data."""
        normalized = [normalize(view, self.mean, self.std) for view in batch["views"]]
        changed = self.model.change_views(normalized, batch["seed"])
        known = [valid_pixels(view) for view in batch["views"]]
        return [view if where is None else torch.where(where, view, 0.0) for view, where in zip(changed, known)]

    def loss_of(self, batch: dict) -> Tensor:
        """The loss of one batch."""
        return self.output_of(batch).loss

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of one batch, logged with the method's other metrics."""
        output, size = self.output_of(batch), len(batch["image"])
        self.log("loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        for name, value in (output.metrics or {}).items():
            self.log(name, value, batch_size=size, sync_dist=True)
        return output.loss

    def optimizer_step(self, *arguments, **options) -> None:
        """Lightning's step, and what the method does after it."""
        super().optimizer_step(*arguments, **options)
        # Lightning counts the step after this hook.
        self.model.after_step(min((self.trainer.global_step + 1) / self.trainer.max_steps, 1.0))
