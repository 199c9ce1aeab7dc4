"""SimMIM as a LightningModule: normalise, mask, loss, optimise as published. The method itself is in `simmim.model`."""
from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor

from simmim.data import normalise
from simmim.masking import BlockMasking
from simmim.model import SimMIM
from simmim.optim import adamw, parameter_groups
from simmim.training.sharding import clip_gradients, shard
from simmim.training.watch import judge_step


class SimMIMPretraining(pl.LightningModule):
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
        super().__init__()
        self.model, self.masking = model, masking
        self.mean, self.std = mean, std
        self.learning_rate, self.weight_decay, self.clip = learning_rate, weight_decay, clip

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

    def configure_model(self) -> None:
        """Divide the model among the devices where the strategy is to."""
        shard(self, self.model)

    def configure_optimizers(self):
        """AdamW with the papers' parameter groups, and the schedule, step by step."""
        optimiser = adamw(parameter_groups(self.model, lr=1.0, weight_decay=self.weight_decay))
        # The groups' rate is 1, so that the schedule's value is the rate itself.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.learning_rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the norm over all parameters, and log that norm; a step that is not finite is skipped."""
        norm = clip_gradients(self.model.parameters(), self.clip)
        judge_step(self, optimizer, norm)
        self.log("grad_norm", norm)
        self.log("lr", optimizer.param_groups[0]["lr"])
