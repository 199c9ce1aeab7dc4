"""An end before the end: when the validation metric has not risen for some validations."""

from __future__ import annotations

import pytorch_lightning as pl


class StopEarly(pl.Callback):
    """Stops the run when so many validations in a row brought nothing better; a resumed run counts on.

    Args:
        monitor: the metric, as the module logs it; higher is better.
        patience: validations without a new best that end the run.
    """

    def __init__(self, monitor: str, patience: int) -> None:
        self.monitor, self.patience = monitor, patience
        self.best, self.without = -1.0, 0

    def state_dict(self) -> dict:
        """Best value and validations since."""
        return {"best": self.best, "without": self.without}

    def load_state_dict(self, state: dict) -> None:
        """Go on from them."""
        self.best, self.without = state["best"], state["without"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A run that had stopped stays so when it is resumed."""
        trainer.should_stop = trainer.should_stop or self.without >= self.patience

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Count, and stop when it is time to."""
        if trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics[self.monitor])
        self.without = 0 if value > self.best else self.without + 1
        self.best = max(self.best, value)
        if self.without >= self.patience:
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(
                    f"stopped early after {trainer.global_step:,} steps: {self.without} validations without better "
                    f"{self.monitor} than {self.best:.1%}"
                )
