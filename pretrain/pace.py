"""Says once when a run that was to take a given time turns out to be much faster or slower."""

from __future__ import annotations

import time

import pytorch_lightning as pl
from tqdm import tqdm

from simmim.messages import counted, length_text

FIRST_SHARE, LAST_SHARE = 0.03, 0.5  # of the steps, between which it is worth saying
LEAST_S = 10.0  # of training, before which caches fill and workers start
FIRST_STEPS = 2  # which compile and allocate, and are not counted
MUCH = 1.5  # times as fast, or as slow, as planned


class PlanWatch(pl.Callback):
    """Compares a run's pace with the time for which its epochs were chosen. The length stays: the learning rate follows it.

    Args:
        planned_s: of all steps, with measures and pictures.
        epochs: that were chosen for it.
        given: the time as the user gave it; None for the default one.
    """

    def __init__(self, planned_s: float, epochs: float, given: str | None = None) -> None:
        self.planned_s, self.epochs, self.given = planned_s, epochs, given
        self.first_step: int | None = None
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Steps before are those of a run that was resumed."""
        self.first_step = trainer.global_step + FIRST_STEPS

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        """Look at the mean pace until now, and say so at most once."""
        step, of = trainer.global_step, trainer.max_steps
        if self.first_step is None or step < self.first_step:
            return
        now = time.monotonic()
        if step == self.first_step:
            self.started = self.started or now
            return
        passed_s, share = now - self.started, (step - self.first_step) / of
        if step / of > LAST_SHARE:
            self.first_step = None
        elif share >= FIRST_SHARE and passed_s >= LEAST_S:
            whole_s = passed_s / share
            if not 1 / MUCH < whole_s / self.planned_s < MUCH:
                tqdm.write(self.line(whole_s))  # beside the progress line
                self.first_step = None

    def line(self, whole_s: float) -> str:
        """What the pace is, and how many epochs would fit.

        Args:
            whole_s: that all steps take at this pace.
        """
        times = whole_s / self.planned_s
        pace = f"{times:.1f} times as slow" if times > 1 else f"{1 / times:.1f} times as fast"
        fitting = f"{float(f'{self.epochs / times:.3g}'):g}"
        again = f"--overwrite --epochs {fitting}" + (f" in place of --time {self.given}" if self.given else "")
        return (
            f"the run is {pace} as planned: it takes {length_text(whole_s)}, not {length_text(self.planned_s)}. "
            f"{counted(float(fitting), 'epoch')} would fit at this pace: begin again with {again}, or leave it as it is"
        )
