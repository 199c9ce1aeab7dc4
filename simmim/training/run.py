"""One assembly of a training run, for every stage.

A stage resolves its settings, builds what is trained, and describes the run as a `TrainingRun`; `run_training` does the
rest: callbacks in their order, the trainer, the locked run folder, the checkpoint to resume from, training, and the last
validation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl

from simmim.training.compiling import CompileBlocks
from simmim.training.gray_copies import GrayCopies
from simmim.training.interruption import StopOnSignal
from simmim.training.loggers import DescribeRun, LossNames, build_loggers
from simmim.training.module import TrainingModule
from simmim.training.numerical_guard import NumericalGuard
from simmim.training.progress import ProgressLine, SkippedImages, StepSeeds, Throughput, WaitStart
from simmim.training.quiet import quiet_libraries
from simmim.training.run_folder import check_run_folder, locked_run_folder
from simmim.training.same_images import SameImages
from simmim.training.saving import SavePolicy, SaveRun, usable_checkpoint
from simmim.training.settings import RunSettings
from simmim.training.streams import StreamData, TrackStreamPosition, per_device_batch
from simmim.training.threads import LeaveBusyCores
from simmim.training.trainer import build_trainer, check_trainer_keys, is_first_process


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a stage hands over to be trained.

    Args:
        settings: resolved.
        module: what is trained, and how.
        data: the endless stream of training images, and the validation images where there are some.
        num_images: training images, which make an epoch.
        num_steps: optimizer steps.
        loss: under which name and description loggers show the module's loss.
        save: when checkpoints are written, and what is exported beside them.
        summary: text to print before the first step, from the trainer and the checkpoint that the run resumes from.
        title: of the progress bar.
        callbacks: the stage's own, in their order.
        check: called once the trainer is built and before the run folder is written. Raises ValueError where the run
            cannot work.
        max_skipped_share: of the images seen; more unreadable ones stop the run. 0 stops it at the first.
        validate_every_steps: None where there are no validation images.
        monitor: validation metric by which the best model is chosen; None where there are no validation images. A stage may
            validate by a callback of its own.
        num_image_sizes: sizes that the images have in the course of the run.
        quiet: print nothing and show no progress.
    """

    settings: RunSettings
    module: TrainingModule
    data: StreamData
    num_images: int
    num_steps: int
    loss: LossNames
    save: SavePolicy
    summary: Callable[[pl.Trainer, Path | None], str]
    title: str
    callbacks: tuple[pl.Callback, ...]
    check: Callable[[pl.Trainer], None] = lambda trainer: None
    max_skipped_share: float = 0.05
    validate_every_steps: int | None = None
    monitor: str | None = None
    num_image_sizes: int = 1
    quiet: bool = False

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.out).expanduser()


@dataclass(frozen=True)
class FinishedRun:
    """A run that took its last step.

    Attributes:
        trainer: as it ended.
        metrics: of the validation after the last step, by the names under which they are logged; empty without validation.
    """

    trainer: pl.Trainer
    metrics: dict[str, float]


def check_before_start(settings: RunSettings) -> None:
    """Check what needs neither images nor an encoder: the run folder and the keys of `trainer`.

    Raises:
        ValueError: for a folder that is in use, or a key that Lightning's Trainer does not have.
    """
    if is_first_process():
        check_run_folder(settings.out, settings.resume, settings.overwrite)
    check_trainer_keys(settings.trainer)


def ordered_callbacks(run: TrainingRun, guard: NumericalGuard, save: SaveRun) -> list[pl.Callback]:
    """All callbacks of a run. Lightning calls them in this order, each hook from the first to the last."""
    settings = run.settings
    throughput = Throughput(settings.batch_size)
    optional = {
        "progress": () if run.quiet else (ProgressLine(run.title, settings.batch_size),),
        "compile": (CompileBlocks(run.quiet, run.num_image_sizes),) if settings.compile else (),
    }
    return [
        DescribeRun(run.folder, run.monitor),  # loggers learn what the run is before anything is logged
        LeaveBusyCores(run.quiet),
        StepSeeds(settings.seed),  # before anything that draws random numbers in a batch
        throughput,  # takes the time at a batch's end before callbacks that take long
        *optional["progress"],  # shows metrics that later callbacks of the step before have set
        SkippedImages(run.folder, run.num_images, run.max_skipped_share),  # may stop the run: before a state is saved
        SameImages(run.num_images, run.data.train),
        GrayCopies(run.quiet),
        guard,  # as SkippedImages, and it counts before its counts are saved
        *optional["compile"],  # in setup alone, before strategies divide the model
        TrackStreamPosition(),  # before a checkpoint is taken, which holds the position
        *run.callbacks,
        save,  # after all callbacks whose state it saves
        StopOnSignal(save),  # what a signal stops has been saved by then
        WaitStart(throughput),  # last: what follows is the wait for the next batch
    ]


def run_training(run: TrainingRun) -> FinishedRun:
    """Train as described, in a locked run folder.

    Raises:
        ValueError: when devices, batch size, folder or stored settings do not allow the run, before anything is written.
    """
    settings = run.settings
    accumulate = settings.optim.accumulate  # type: ignore[attr-defined]  # every stage's settings have `optim`
    with quiet_libraries():
        save = SaveRun(run.folder, run.save)
        guard = run.module.guard = NumericalGuard(run.folder)
        trainer = build_trainer(
            run.folder,
            run.num_steps,
            devices=settings.devices,
            precision=settings.precision,
            accumulate=accumulate,
            callbacks=ordered_callbacks(run, guard, save),
            checkpoint_io=save.writer,
            log_every_steps=min(settings.log_every_steps, run.num_steps),
            extra=settings.trainer,
            validate_every_steps=run.validate_every_steps,
            loggers=build_loggers(run.folder, settings.loggers, run.loss),
        )
        per_device_batch(settings.batch_size, trainer.world_size, accumulate)
        run.check(trainer)
        with locked_run_folder(settings) if is_first_process() else contextlib.nullcontext():
            report_line = print if is_first_process() else None
            checkpoint = usable_checkpoint(run.folder, report_line) if settings.resume else None
            if trainer.is_global_zero and not run.quiet:
                print(run.summary(trainer, checkpoint), flush=True)
            trainer.fit(run.module, datamodule=run.data, ckpt_path=checkpoint, weights_only=True)
            return FinishedRun(trainer, final_validation(run, trainer))


def final_validation(run: TrainingRun, trainer: pl.Trainer) -> dict[str, float]:
    """Metrics of the final weights, as the last step is rarely one that is validated; empty without validation images."""
    if run.validate_every_steps is None:
        return {}
    metrics = trainer.validate(run.module, datamodule=run.data, verbose=False)[0]
    for logger in trainer.loggers:
        logger.finalize("success")  # again: validation has opened the file once more, and a thread writes to it
    return {name: float(value) for name, value in metrics.items()}
