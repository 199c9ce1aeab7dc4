"""Checkpoints: whole or absent."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl

from simmim.run_folder import last_checkpoint


class SaveRun(pl.Callback):
    """Saves last.ckpt, whole or not at all, every so many steps, at the end, and when the run is interrupted.

    Args:
        also: called with the module after each save, to refresh what is exported beside the checkpoint.
    """

    def __init__(self, run: Path, every_steps: int, also: Callable[[pl.LightningModule], None] | None = None) -> None:
        self.path, self.every_steps, self.also = last_checkpoint(run), every_steps, also
        self.saved_step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Save at every `every_steps`-th step."""
        if trainer.global_step % self.every_steps == 0:
            self.save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the end."""
        self.save(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save where Ctrl-C came; after an error the last whole save stands."""
        if isinstance(exception, KeyboardInterrupt):
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the checkpoint aside and put it in place."""
        if trainer.global_step == self.saved_step:
            return
        self.saved_step = trainer.global_step
        aside = self.path.with_name(self.path.name + ".part")
        trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            aside.replace(self.path)
            for logger in trainer.loggers:
                logger.save()
            if self.also:
                self.also(module)
