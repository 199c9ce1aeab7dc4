"""How every stage optimizes: AdamW by parameter groups, a schedule step by step, clipping, steps judged as they come."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import nn

from simmim.training.numerical_guard import NumericalGuard
from simmim.training.optim import adamw, parameter_groups
from simmim.training.sharding import clip_gradients, pending_scale, shard


class TrainingModule(pl.LightningModule):
    """A model that holds an encoder, and how it learns; what a step computes is the subclass's.

    Args:
        model: what is trained; its `encoder` is an `Encoder`.
        learning_rate: as a function of the optimizer step, from 0; of the last layers where there is layer decay.
        weight_decay, layer_decay: of `simmim.training.optim.parameter_groups`.
        clip: largest norm of the gradient.

    Attributes:
        guard: decides about every optimizer step before it is taken; None lets each pass. Set by the run.
    """

    guard: NumericalGuard | None = None

    def __init__(
        self,
        model: nn.Module,
        learning_rate: Callable[[int], float],
        weight_decay: float,
        clip: float,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        self.weight_decay, self.clip, self.layer_decay = weight_decay, clip, layer_decay

    def configure_model(self) -> None:
        """Divide the model among the devices where the strategy is to."""
        shard(self, self.model)

    def configure_optimizers(self):
        """AdamW with the papers' parameter groups, and the schedule, step by step."""
        # The groups' rates are their layers' scales, so that the schedule's value is the last layers' rate.
        groups = parameter_groups(self.model, 1.0, self.weight_decay, self.layer_decay)
        optimizer = adamw(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the norm over all parameters, and log that norm; a step that is not finite is skipped."""
        scale = pending_scale(self.trainer.precision_plugin, optimizer)
        norm = clip_gradients(self.model.parameters(), self.clip, scale)
        if self.guard is not None:
            self.guard.check_step(self.trainer, optimizer, norm)
        self.log("grad_norm", norm)
        # Lightning sends a number to the device and waits for it, so only where it is written.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % every == 0 or self.trainer.should_stop:
            self.log("lr", max(group["lr"] for group in optimizer.param_groups))
