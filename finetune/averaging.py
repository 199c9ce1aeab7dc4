"""Exponential moving average of the weights, which a run validates and exports.

Lightning's own callback (`EMAWeightAveraging`) is not used: it swaps the weights back before `on_validation_end`, where the
best model is exported, it replaces the weights in checkpoints by the average, and it does not support sharded models.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from simmim.training.module import TrainingModule


def decay_at(num_updates: int, decay: float) -> float:
    """The decay of the update after `num_updates` earlier ones. It grows to `decay`, so that the initial weights, which a
    fresh head has, are soon forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class AverageWeights(pl.Callback):
    """Averages the trained weights after every optimizer step: average ← d · average + (1 − d) · weights.

    The average is in the model during validation, and from the end of training on. The callback must stand after those that
    export at `on_validation_end`. Frozen parameters are not averaged; the statistics of batch norms are.

    Args:
        decay: d, above 0 and below 1, once `decay_at` has reached it.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.num_updates, self.step = decay, 0, 0
        self.average: dict[str, Tensor] = {}
        self.loaded: Mapping[str, Tensor] = {}
        self.average_in_model = self.finished = False

    def state_dict(self) -> dict:
        """The average, undivided on every process."""
        return {"updates": self.num_updates, "average": {name: whole(value) for name, value in self.average.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Keep the state of a checkpoint until the model is on its device."""
        self.num_updates, self.loaded = state["updates"], state["average"]

    def on_fit_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Start with the current weights, or with the average of a checkpoint."""
        self.average = {name: value.detach().clone() for name, value in averaged(module.model).items()}
        for name, value in self.loaded.items():
            self.average[name].copy_(divided_like(value, self.average[name]))
        self.loaded = {}

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        """Remember the step at which training starts or resumes."""
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, *_) -> None:
        """Average once per optimizer step, not once per accumulated batch."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        update = get_ema_multi_avg_fn(decay_at(self.num_updates, self.decay))
        weights = averaged(module.model)
        update([self.average[name] for name in weights], [value.detach() for value in weights.values()], None)
        self.num_updates += 1

    def on_validation_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Put the average into the model."""
        self.swap(module.model, True)

    def on_validation_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Put the trained weights back."""
        self.swap(module.model, False)

    def on_exception(self, trainer: pl.Trainer, module: TrainingModule, exception: BaseException) -> None:
        """Put the trained weights back, so that no other callback saves the average in their place."""
        self.swap(module.model, False)

    def on_fit_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Leave the average in the model; the last checkpoint has been saved."""
        self.swap(module.model, True)
        self.finished = True

    @torch.no_grad()
    def swap(self, model: nn.Module, average_in_model: bool) -> None:
        """Exchange the model's weights and the average, unless they are already where they should be."""
        if self.finished or not self.average or self.average_in_model == average_in_model:
            return
        self.average_in_model = average_in_model
        for part in model.modules():
            # After a forward pass some parameters of a sharded model are still gathered.
            if hasattr(part, "reshard"):
                part.reshard()
        for name, value in averaged(model).items():
            previous = value.detach().clone()
            value.copy_(self.average[name])
            self.average[name].copy_(previous)


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are averaged, by name: trained parameters and floating-point buffers."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return trained | {name: value for name, value in model.named_buffers() if value.is_floating_point()}


def whole(value: Tensor) -> Tensor:
    """A tensor in one piece, gathered where it is divided among devices."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def divided_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided among devices as `like` is."""
    value = value.to(like.device)
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
