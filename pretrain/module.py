"""A method of pre-training as a LightningModule: normalize, draw, loss, optimize. The methods are in `simmim.methods`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from simmim.data import normalize, valid_pixels
from simmim.methods.base import Method
from simmim.training.module import TrainingModule


class PretrainingModule(TrainingModule):
    """One optimizer step after another on batches of images, uint8 or, of deep images, float32.

    Args:
        model: the method, with its encoder.
        mean, std: by which images are normalized, of values in [0, 1].
        learning_rate: as a function of the optimizer step, from 0.
        weight_decay, clip: of AdamW and of the gradient's norm.
    """

    def __init__(
        self,
        model: Method,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        learning_rate: Callable[[int], float],
        weight_decay: float,
        clip: float,
    ) -> None:
        super().__init__(model, learning_rate, weight_decay, clip)
        self.mean, self.std = mean, std

    def inputs(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Normalized images, (B, channels, height, width), and what the method draws for them from their seeds."""
        images = normalize(batch["image"], self.mean, self.std)
        return images, self.model.draw(tuple(images.shape[-2:]), batch["seed"], images.device)

    def loss_of(self, batch: dict) -> Tensor:
        """The loss of one batch, of the pixels that have data."""
        valid = valid_pixels(batch["image"])
        known = {} if valid is None else {"valid": valid}
        return self.model(*self.inputs(batch), **known).loss

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of one batch, logged."""
        loss = self.loss_of(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["image"]), sync_dist=True)
        return loss
