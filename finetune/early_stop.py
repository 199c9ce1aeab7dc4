"""Early stopping by Lightning's callback, in the terms of this toolkit's runs."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.trainer.states import TrainerFn

from simmim.messages import counted


class StopEarly(EarlyStopping):
    """Stops a run when `patience` validations in a row were not better than the best one.

    Lightning's callback counts the validations in training alone and goes on counting in a resumed run. In addition a run
    that had stopped stays stopped when it is resumed, the state of runs of version 0.1 is read, and the first process prints
    one line.

    Args:
        monitor: the validation metric, as the module logs it; higher is better.
        patience: validations without a better one that end the run.
    """

    def __init__(self, monitor: str, patience: int) -> None:
        super().__init__(monitor, patience=patience, mode="max", check_finite=False, check_on_train_epoch_end=False)

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints, as in version 0.1."""
        return "StopEarly"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of Lightning's callback, or that of version 0.1: best, without."""
        if "without" in state_dict:
            self.best_score, self.wait_count = torch.tensor(state_dict["best"]), state_dict["without"]
        else:
            super().load_state_dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop at once where the run had stopped."""
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Count, and print a line when the run stops."""
        super().on_validation_end(trainer, module)
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero and self.wait_count >= self.patience:
            print(
                f"stopped early after {counted(trainer.global_step, 'step')}: {counted(self.wait_count, 'validation')} "
                f"without better {self.monitor} than {self.best_score.item():.1%}"
            )
