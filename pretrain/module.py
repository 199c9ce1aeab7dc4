"""SimMIM as a LightningModule: normalise, mask, loss, optimise as published. The method itself is in `simmim.model`."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simmim.data import normalise
from simmim.masking import BlockMasking
from simmim.model import SimMIM
from simmim.training.optimised import OptimisedModule


class SimMIMPretraining(OptimisedModule):
    """One optimiser step after another on batches of uint8 images.

    Args:
        model: encoder and head.
        masking: how masks are drawn; each image's follows from the seed that comes with it.
        mean, std: by which images are normalised, of values in [0, 1].
        learning_rate: as a function of the optimiser step, from 0.
        weight_decay, clip: of AdamW and of the gradient's norm.
    """

    def __init__(
        self,
        model: SimMIM,
        masking: BlockMasking,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        learning_rate: Callable[[int], float],
        weight_decay: float,
        clip: float,
    ) -> None:
        super().__init__(model, learning_rate, weight_decay, clip)
        self.masking, self.mean, self.std = masking, mean, std

    def inputs(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Normalised images, (B, channels, height, width), and masks, (B, H, W) bool, True = masked."""
        images = normalise(batch["image"], self.mean, self.std)
        generator = torch.Generator(images.device)
        return images, self.masking.draw(len(images), images.shape[-2:], generator, batch["seed"])

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, mask = self.inputs(batch)
        loss = self.model(images, mask).loss
        self.log("loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss
