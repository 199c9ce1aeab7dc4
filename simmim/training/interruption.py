"""Being asked to stop: signals are answered at the end of the step, with a checkpoint and an exit code of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import SLURMEnvironment

from simmim.training.saving import SaveRun, loading_died, saved_steps

# What schedulers send before they take a machine away, and Ctrl-C.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(Exception):
    """A run that was asked to stop and has saved its state.

    Attributes:
        exit_code: 128 and the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1.
    """

    def __init__(self, number: int, step: int, requeued: bool) -> None:
        self.exit_code = 128 + number
        then = "SLURM starts it again" if requeued else "resume: true goes on"
        super().__init__(f"stopped by {signal.Signals(number).name}, saved up to step {step:,}; {then}")


class StopOnSignal(pl.Callback):
    """Ends the run at the end of the step in which a signal came, after a checkpoint. A second Ctrl-C leaves at once.

    Under SLURM, SIGUSR1 (`#SBATCH --signal=USR1@120`) also asks for the job to be queued again; the job's command says
    --resume. This takes the place of Lightning's own requeueing, which saves in the middle of a step.
    """

    def __init__(self, save: SaveRun) -> None:
        self.save = save
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen, after Lightning has set up handlers of its own."""
        self.seen_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}

    def note(self, number: int, frame) -> None:
        """Remember the signal until the step is over."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            print("\nsimmim: left at once; the last checkpoint stands", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.received = self.received or number

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Stop after the step before this batch if any process was asked to.

        Raises:
            Interrupted: after the checkpoint is on the disk.
        """
        if trainer.global_step == self.seen_step:
            return  # in the middle of accumulated batches, or nothing new since the start
        self.seen_step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        self.save.save(trainer)
        self.save.writer.wait()
        requeued = self.received == getattr(signal, "SIGUSR1", None) and trainer.is_global_zero and requeue(trainer)
        raise Interrupted(self.received or signal.SIGTERM, trainer.global_step, requeued)

    def on_train_end(self, *_) -> None:
        """Restore the signal handlers."""
        self.restore()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers. If a loading process has died, report that, or that the run was stopped if the same
        signal went to all processes.

        Raises:
            Interrupted, OSError: in these cases.
        """
        self.restore()
        if not loading_died(trainer, exception):
            return
        # Between two steps `SaveRun` has just saved.
        step = max(saved_steps(self.save.run), default=0)
        if self.received is not None:
            raise Interrupted(self.received, step, False) from None
        why = (str(exception).splitlines() or [type(exception).__name__])[0].rstrip(". ")
        raise OSError(
            f"a process that loads images died ({why}), for lack of memory perhaps: the run is saved up to step {step:,}; "
            "resume: true goes on, with fewer workers if it happens again"
        ) from exception

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def requeue(trainer: pl.Trainer) -> bool:
    """Ask SLURM to queue this job again; False where it is no SLURM job or SLURM refuses."""
    if not SLURMEnvironment.detect():
        return False
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        return subprocess.run(["scontrol", "requeue", job], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
