"""Checkpoints: written in a thread during training, atomically; the last few and the best are kept and verified before use.

RUN/checkpoints/ holds step-00001200.ckpt and others; last.ckpt and best.ckpt are second names of two of them. A checkpoint
is a zip archive; the CRC-32 of every tensor reveals a truncated or altered file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from simmim.checkpoints.weight_files import read_torch_file
from simmim.files import atomic_write
from simmim.messages import first_line
from simmim.training.run_folder import BEST, CONFIG, LAST, checkpoints_folder

STEP_FILE = re.compile(r"step-(\d+)\.ckpt$")


def step_file(run: Path, step: int) -> Path:
    """The checkpoint of one step."""
    return checkpoints_folder(run) / f"step-{step:08d}.ckpt"


def saved_steps(run: Path) -> dict[int, Path]:
    """Every step that has a checkpoint, the newest first."""
    paths = sorted(checkpoints_folder(run).glob("step-*.ckpt"), reverse=True)
    return {int(match[1]): path for path in paths if (match := STEP_FILE.search(path.name))}


def usable_checkpoint(run: Path, report_line: Callable[[str], None] | None = None) -> Path | None:
    """The newest whole checkpoint of a run; None when it has none yet.

    Args:
        report_line: called with a line for every newer checkpoint that is damaged.

    Raises:
        ValueError: when the run has checkpoints and none is whole; when one would run code while it is read, as no
            checkpoint of this toolkit does.
    """
    last = checkpoints_folder(run) / LAST
    newest = list(saved_steps(run).values())
    candidates = [*([last] if last.exists() else []), *newest]
    damaged: dict[Path, str] = {}
    for path in candidates:
        if any(path.samefile(other) for other in damaged):
            continue
        problem = damage(path)
        if problem is None:
            if report_line:
                for broken, why in damaged.items():
                    report_line(f"warning: {broken} is torn ({why}); going on from {path.name}")
            return path
        damaged[path] = problem
    if damaged:
        first, why = next(iter(damaged.items()))
        raise ValueError(
            f"run {str(run)!r} has no whole checkpoint: {first.name} is torn ({why}); overwrite: true starts the run again"
        )
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes; None for a whole one.

    Raises:
        ValueError: when it would run code as it is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    if broken:
        return f"its part {broken} does not fit its checksum"
    read_torch_file(path)
    return None


class SavedModel(NamedTuple):
    """What a checkpoint holds of the model, for an export beside it.

    Attributes:
        weights: by their names in the Lightning module, on the CPU; in one piece under every strategy.
        step: optimizer steps taken.
        mean_loss: over the steps since the checkpoint before; None where losses are not kept.
        validation_loss: as the policy's judge measured it at this step; None where it did not.
    """

    weights: dict[str, Tensor]
    step: int
    mean_loss: float | None
    validation_loss: float | None = None


@dataclass(frozen=True)
class SavePolicy:
    """When a run is saved, and what happens with each checkpoint.

    Args:
        every_steps, every_minutes: whichever comes first.
        keep: number of the newest checkpoints that stay, beside the best.
        keep_best: also keep, as best.ckpt, the checkpoint with the lowest mean loss since the one before it.
        export: called in the writing thread after each checkpoint, with a judge after the best one so far alone.
        judge: the validation loss after a step, None where it was not measured. With a judge, best.ckpt is the checkpoint of
            the lowest such loss, and there is one whenever it is lower than before.
    """

    every_steps: int
    every_minutes: float = 15.0
    keep: int = 2
    keep_best: bool = True
    export: Callable[[SavedModel], None] | None = None
    judge: Callable[[int], float | None] | None = None


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints beside the training. A copy of the state is taken at once, which costs a fraction of a step, and a
    thread writes it while training goes on.

    Args:
        run: the run folder.

    Attributes:
        mean_loss, validation_loss, is_best: of the next checkpoint; set before it is saved, and handed to the thread with
            it.
    """

    def __init__(self, run: Path, policy: SavePolicy) -> None:
        self.run, self.policy = run, policy
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        self.mean_loss: float | None = None
        self.validation_loss: float | None = None
        self.is_best = False

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        """Take a copy of `checkpoint` and begin to write it; waits for the one before."""
        self.wait()
        copied = on_the_cpu(checkpoint)
        saved = SavedModel(copied["state_dict"], copied["global_step"], self.mean_loss, self.validation_loss)
        self.pending = self.pool.submit(self.write, copied, Path(path), saved, self.is_best)

    def write(self, checkpoint: dict, path: Path, saved: SavedModel, is_best: bool) -> None:
        """Write the file and its other names, delete the oldest ones, export.

        Raises:
            OSError: when the disk is full or the run folder is gone; what was there before stays.
        """
        if not (self.run / CONFIG).is_file():
            raise FileNotFoundError(f"run folder {str(self.run)!r} is gone")
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)
        link_as(path, path.with_name(LAST))
        self.name_and_export(path, saved, is_best)

    def name_and_export(self, path: Path, saved: SavedModel, is_best: bool) -> None:
        """What follows once the file is there: best.ckpt, the deletion of the oldest files, the export."""
        if is_best:
            link_as(path, path.with_name(BEST))
        for old in list(saved_steps(self.run).values())[self.policy.keep :]:
            old.unlink(missing_ok=True)
        waits_for_best = self.policy.judge is not None and not is_best and path.with_name(BEST).exists()
        if self.policy.export and not waits_for_best:
            self.policy.export(saved)

    def repeat_for_best(self, saved: SavedModel) -> None:
        """Begin to do once more what follows the best checkpoint, with which a run goes on: the process that wrote it may
        have ended before."""
        self.wait()
        path = step_file(self.run, saved.step)
        path = path if path.is_file() else path.with_name(LAST)
        self.pending = self.pool.submit(self.name_and_export, path, on_the_cpu(saved), True)

    def wait(self) -> None:
        """Wait until the pending checkpoint is on the disk.

        Raises:
            OSError: when it could not be written, saying which checkpoint stands.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        error = pending.exception()
        if error is not None:
            standing = next(iter(saved_steps(self.run).values()), None)
            stands = f"{standing} stands" if standing else "there is none before it"
            raise OSError(
                f"a checkpoint could not be written ({first_line(error)}): {stands}; make room or mend the folder, "
                "and resume: true goes on"
            ) from error

    def teardown(self) -> None:
        """Wait for the pending checkpoint, whatever becomes of it."""
        if self.pending is not None:
            with contextlib.suppress(Exception):
                self.pending.result()


def on_the_cpu(values: Any) -> Any:
    """Nested values with copies of their tensors."""
    return apply_to_collection(values, Tensor, lambda value: value.detach().to("cpu", copy=True))


def in_model_order(state: dict, optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> dict:
    """An optimizer's state with parameters numbered as `module.parameters()` gives them, which is how sharded strategies
    number them, and not group after group. Loading goes by the groups' lists, so that either order will do there."""
    position = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = [position[id(parameter)] for parameter in parameters]
    return {
        "state": {number[key]: value for key, value in state["state"].items()},
        "param_groups": [{**group, "params": [number[key] for key in group["params"]]} for group in state["param_groups"]],
    }


def loading_died(trainer: pl.Trainer, exception: BaseException) -> bool:
    """Whether this is how the death of a process that loads images is heard of, which is by a broken pipe at times."""
    broken_pipe = isinstance(exception, ConnectionError | EOFError) and trainer.datamodule.workers > 0  # type: ignore[attr-defined]
    return broken_pipe or "DataLoader worker" in str(exception)


def link_as(file: Path, name: Path) -> None:
    """Give `file` a second name, which replaces a file of that name: a link where the disk has them, else a copy."""
    temporary = name.with_name(f".{name.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:
        shutil.copyfile(file, temporary)
    temporary.replace(name)


class SaveRun(pl.Callback):
    """Saves the run as its policy says, at its end, and when it is asked to stop."""

    def __init__(self, run: Path, policy: SavePolicy) -> None:
        self.run, self.policy = run, policy
        self.writer = CheckpointWriter(run, policy)
        self.saved_step, self.best, self.best_step = -1, float("inf"), -1
        self.mean_loss: float | None = None
        self.losses: list[Tensor] = []
        self.between_steps = True

    def state_dict(self) -> dict:
        """The mean loss up to this checkpoint since the one before, and the loss and step of the best checkpoint."""
        return {"best": self.best, "best_step": self.best_step, "mean_loss": self.mean_loss}

    def load_state_dict(self, state: dict) -> None:
        """Go on from them."""
        self.best, self.mean_loss = state["best"], state["mean_loss"]
        self.best_step = state.get("best_step", -1)  # earlier checkpoints have none

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        """Start the clock. Where the run goes on with its best checkpoint, see that it is known as such."""
        self.saved_at, self.seen_step = time.monotonic(), trainer.global_step
        if trainer.global_step == self.best_step:
            weights = trainer.strategy.lightning_module_state_dict()  # by all processes, which hold parts of it
            if trainer.is_global_zero:
                validation_loss = self.best if self.policy.judge else None
                self.writer.repeat_for_best(SavedModel(weights, self.best_step, self.mean_loss, validation_loss))

    def on_train_batch_start(self, trainer: pl.Trainer, *_) -> None:
        """Save the step before this batch if it is time to. Not at that step's own end, where its metrics are not logged and
        its validation has not run. From here to the batch's end there is no state to save."""
        if trainer.global_step != self.seen_step:
            self.seen_step = trainer.global_step
            due = trainer.global_step % self.policy.every_steps == 0
            due = due or self.is_best(self.validation_loss(trainer.global_step))
            if not due and self.policy.every_minutes < float("inf"):
                late = time.monotonic() - self.saved_at > self.policy.every_minutes * 60
                due = trainer.strategy.reduce_boolean_decision(late, all=False)
            if due:
                self.save(trainer)
        self.between_steps = False

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, *_) -> None:
        """Note the loss."""
        self.between_steps = True
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if self.policy.keep_best and isinstance(loss, Tensor):
            self.losses.append(loss.detach())

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        """Make the checkpoint one that any strategy takes up: the optimizer's parameters numbered as in the model. And put
        the counters of Lightning's loops where it expects them: at the end of the batch before, whose validation it takes
        as done."""
        if getattr(module, "device_mesh", None) is None:
            states = zip(checkpoint.get("optimizer_states", ()), trainer.optimizers)
            checkpoint["optimizer_states"] = [in_model_order(state, optimizer, module) for state, optimizer in states]
        if trainer.global_step >= trainer.max_steps:
            return
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        for counters in ("total", "current"):
            for name in ("ready", "completed"):
                loop["epoch_loop.batch_progress"][counters][name] -= 1

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the end, and see it written."""
        self.save(trainer)
        self.writer.wait()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Where the data's processes died between two steps, the state is sound and is kept; after other errors the last
        checkpoint stands."""
        if self.between_steps and loading_died(trainer, exception) and trainer.world_size == 1:
            with contextlib.suppress(Exception):
                self.save(trainer)
                self.writer.wait()

    def save(self, trainer: pl.Trainer) -> None:
        """Begin to write the checkpoint of this step, unless it has one."""
        if trainer.global_step == self.saved_step:
            return
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        judged, validation_loss = self.pop_mean_loss(), self.validation_loss(trainer.global_step)
        self.mean_loss = self.mean_loss if judged is None else judged
        if self.policy.judge:
            judged = validation_loss
        self.writer.is_best = self.is_best(judged)
        if self.writer.is_best and judged is not None:
            self.best, self.best_step = judged, trainer.global_step
        self.writer.mean_loss, self.writer.validation_loss = self.mean_loss, validation_loss
        # First the metrics: a row of a step before the checkpoint would never be logged again.
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(step_file(self.run, trainer.global_step))

    def pop_mean_loss(self) -> float | None:
        """The mean loss since the checkpoint before; None without a finite one."""
        losses = torch.stack(self.losses).float() if self.losses else torch.empty(0)
        self.losses.clear()
        finite = losses[torch.isfinite(losses)]  # others belong to steps that were skipped
        return float(finite.mean()) if len(finite) else None

    def validation_loss(self, step: int) -> float | None:
        """As the policy's judge measured it."""
        return self.policy.judge(step) if self.policy.judge else None

    def is_best(self, loss: float | None) -> bool:
        """Whether a loss is lower than that of the best checkpoint."""
        return loss is not None and loss < self.best
