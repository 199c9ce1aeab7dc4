"""Exponential moving average of the weights, by which a run is validated and exported.

Lightning's own callback averages too, but swaps back before `on_validation_end`, where the best model is exported, puts the
average in the place of the weights in checkpoints, and does not know sharded models.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def decay_at(updates: int, decay: float) -> float:
    """The decay of the update after `updates` earlier ones: `decay`, and less in the beginning, so that the initial weights,
    a fresh head among them, are soon forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


class AverageWeights(pl.Callback):
    """Averages what is trained after every optimizer step: average ← d · average + (1 − d) · weights.

    The average stands in the model while it is validated, and from the end of training on. To be placed behind the callbacks
    that export at `on_validation_end`. Frozen parameters need no average; the statistics of batch norms do.

    Args:
        decay: d, above 0 and below 1, once `decay_at` has reached it.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.updates, self.step = decay, 0, 0
        self.average: dict[str, Tensor] = {}
        self.loaded: Mapping[str, Tensor] = {}
        self.swapped = self.done = False

    def state_dict(self) -> dict:
        """The average, whole on every process."""
        return {"updates": self.updates, "average": {name: whole(value) for name, value in self.average.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Keep what a checkpoint says until the model is where it trains."""
        self.updates, self.loaded = state["updates"], state["average"]

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or go on with a checkpoint's average."""
        self.average = {name: value.detach().clone() for name, value in averaged(module.model).items()}
        for name, value in self.loaded.items():
            self.average[name].copy_(as_divided(value, self.average[name]))
        self.loaded = {}

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        """Count on from here."""
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Average once an optimizer step, not at every accumulated batch."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        update = get_ema_multi_avg_fn(decay_at(self.updates, self.decay))
        now = averaged(module.model)
        update([self.average[name] for name in now], [value.detach() for value in now.values()], None)
        self.updates += 1

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The average in the model's place."""
        self.swap(module.model, True)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The weights that are trained in their own place again."""
        self.swap(module.model, False)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end of validation, so that what others save is not the average."""
        self.swap(module.model, False)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The average for good; the last checkpoint has been taken."""
        self.swap(module.model, True)
        self.done = True

    @torch.no_grad()
    def swap(self, model: nn.Module, average_in_model: bool) -> None:
        """Exchange model and average where they are not yet as asked."""
        if self.done or not self.average or self.swapped == average_in_model:
            return
        self.swapped = average_in_model
        for part in model.modules():
            # After a forward pass some of a divided model's parameters are whole.
            if hasattr(part, "reshard"):
                part.reshard()
        for name, value in averaged(model).items():
            kept = value.detach().clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """What an average is taken of, by name: trained parameters and buffers of floating point."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return trained | {name: value for name, value in model.named_buffers() if value.is_floating_point()}


def whole(value: Tensor) -> Tensor:
    """A tensor that may be divided among devices, in one piece."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def as_divided(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as `like` is."""
    value = value.to(like.device)
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)
