"""What both stages put around Lightning: trainer, data module, progress line, metrics file, checkpoints.

Training is one loop over steps: batches come from one endless stream (`simmim.data.SampleStream`), an epoch is a number
of samples, and a run resumes at any step by taking the stream from there.
"""
from __future__ import annotations

import csv
import inspect
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from simmim.data import ImageSamples, InOrder, SampleStream, StreamSamples, batches
from simmim.files import whole_file
from simmim.run_folder import last_checkpoint
from simmim.swinv2 import SwinV2Config, nearest

# What the run itself decides; everything else of the Trainer is open to the user as --trainer.KEY.
OWN_TRAINER_KEYS = frozenset(
    (
        "self", "devices", "precision", "logger", "callbacks", "max_epochs", "min_epochs", "max_steps", "min_steps",
        "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "use_distributed_sampler",
        "default_root_dir", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "val_check_interval",
        "check_val_every_n_epoch", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs", "log_every_n_steps",
    )
)  # fmt: skip


def check_trainer_keys(extra: Mapping[str, Any]) -> None:
    """Refuse keys that Lightning's Trainer does not have or that the run sets itself.

    Raises:
        ValueError: naming the nearest known key.
    """
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - OWN_TRAINER_KEYS
    for key in extra:
        if key in OWN_TRAINER_KEYS:
            raise ValueError(f"setting 'trainer.{key}' belongs to the run: see its own settings by --help")
        if key not in known:
            names = [f"trainer.{name}" for name in known]
            raise ValueError(f"unknown setting 'trainer.{key}'{nearest(f'trainer.{key}', names)}")


def is_first_process() -> bool:
    """Whether this is the process that takes the run folder and speaks; of several, each of which runs the whole program."""
    return not getattr(rank_zero_only, "rank", 0)


def device_type() -> str:
    """The kind of device a run uses unless told otherwise: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_precision(device: str, encoder: SwinV2Config) -> str:
    """bf16-mixed where the hardware has it, else full precision; and that for nano, which is too small to gain by it."""
    small = max(encoder.dims) <= 96
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported()
    else:
        has = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        has_bf16 = (has.get("avx512_bf16") or has.get("amx_bf16")) and not small
    return "bf16-mixed" if has_bf16 else "32-true"


def build_trainer(
    run: Path,
    steps: int,
    *,
    devices: str | int,
    precision: str,
    accumulate: int,
    callbacks: list[pl.Callback],
    log_every_steps: int,
    extra: Mapping[str, Any],
    validate_every_steps: int | None = None,
) -> pl.Trainer:
    """A Lightning Trainer that runs `steps` optimiser steps and logs to TensorBoard and metrics.csv in `run`.

    Raises:
        ValueError: when Lightning refuses the devices, precision or one of the `extra` settings.
    """
    quieten()
    settings = {
        "accelerator": "auto",
        **extra,
        "devices": devices,
        "precision": precision,
        "max_steps": steps,
        "max_epochs": -1,
        "accumulate_grad_batches": accumulate,
        "logger": [TensorBoardLogger(run, name="tensorboard", version=""), MetricsCsv(run / "metrics.csv")],
        "callbacks": callbacks,
        "log_every_n_steps": log_every_steps,
        "use_distributed_sampler": False,
        "default_root_dir": run,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **(
            {"check_val_every_n_epoch": None, "val_check_interval": validate_every_steps * accumulate}
            if validate_every_steps
            else {"limit_val_batches": 0}
        ),
    }
    try:
        return pl.Trainer(**settings)
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        what = f"devices {devices!r}, precision {precision!r}" + (f", trainer {dict(extra)}" if extra else "")
        raise ValueError(f"{what} does not work here: {first}") from error


def quieten() -> None:
    """Keep Lightning's advice on things that are decided here off the screen; errors and our own lines stay."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    warnings.filterwarnings("ignore", message=".*is not a resumable dataloader.*|.*dataloader that is not resumable.*")
    warnings.filterwarnings("ignore", message=".*found in the `src` dir.*|.*treespec.*")


class StreamData(pl.LightningDataModule):
    """The endless training stream, taken up where the trainer's step counter stands.

    Args:
        batch_size: images of one optimiser step over all devices and accumulated batches.
    """

    def __init__(self, train: ImageSamples | StreamSamples, batch_size: int, accumulate: int, workers: int) -> None:
        super().__init__()
        self.train, self.batch_size = train, batch_size
        self.accumulate, self.workers = accumulate, workers
        self.places: dict[int, tuple[int, int]] = {}  # of a stream: how far each of this rank's workers is
        self.resumed: dict | None = None

    def train_dataloader(self):
        """Batches of this rank, beginning after those of the steps already taken."""
        trainer = self.trainer
        share = per_device_batch(self.batch_size, trainer.world_size, self.accumulate)
        start = trainer.global_step * self.accumulate
        if isinstance(self.train, StreamSamples):
            self.places = self.resumed_places(start)
            part = self.train.part(trainer.global_rank, trainer.world_size, start, self.places)
            return batches(part, self.workers, batch_size=share)
        order = SampleStream(len(self.train), share, self.train.seed, trainer.global_rank, trainer.world_size, start)
        return batches(self.train, self.workers, order)


    def resumed_places(self, start: int) -> dict[int, tuple[int, int]]:
        """Where this rank's workers go on; where that cannot be told, at the beginning of a fresh epoch.

        Raises:
            ValueError: when the run was stopped with other numbers of devices or workers, among which a stream is divided.
        """
        if not start or self.resumed is None:
            return {}
        now = [self.trainer.world_size, max(self.workers, 1)]
        if self.resumed["divided"] != now:
            devices, workers = self.resumed["divided"]
            raise ValueError(
                f"the stream was divided among {devices} devices × {workers} workers and would be among "
                f"{now[0]} × {now[1]}: resume with --workers {workers} on as many devices"
            )
        places = self.resumed["places"][self.trainer.global_rank]
        return {int(worker): tuple(place) for worker, place in places.items()}

    def note_places(self, batch: dict) -> None:
        """Take notice of how far the workers are with this batch."""
        for worker, epoch, taken in batch.get("place", ()):
            self.places[worker] = (epoch, taken)

    def state_dict(self) -> dict:
        """Every rank's places in its stream; nothing for images by number, whose order follows from the step."""
        if not isinstance(self.train, StreamSamples):
            return {}
        places = [{str(worker): list(place) for worker, place in self.places.items()}]
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, places[0])
            places = gathered
        return {"places": places, "divided": [self.trainer.world_size, max(self.workers, 1)]}

    def load_state_dict(self, state: dict) -> None:
        """Keep what a checkpoint says until the stream is opened."""
        self.resumed = state or None


class NotePlaces(pl.Callback):
    """Tells the data of every batch that was trained on, so that a checkpoint knows the place in a stream."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, *_) -> None:
        """Before the callbacks that save."""
        trainer.datamodule.note_places(batch)


class ValidatedStreamData(StreamData):
    """The training stream, and validation samples in order."""

    def __init__(
        self,
        train: ImageSamples,
        batch_size: int,
        accumulate: int,
        workers: int,
        validation: ImageSamples,
        validation_batch_size: int = 64,
    ) -> None:
        super().__init__(train, batch_size, accumulate, workers)
        self.validation, self.validation_batch_size = validation, validation_batch_size

    def val_dataloader(self):
        """Every validation sample once."""
        trainer = self.trainer
        order = InOrder(len(self.validation), self.validation_batch_size, trainer.global_rank, trainer.world_size)
        return batches(self.validation, self.workers, order)


def per_device_batch(batch_size: int, world: int, accumulate: int) -> int:
    """Images of one forward pass.

    Raises:
        ValueError: when the global batch does not divide evenly.
    """
    if batch_size % (world * accumulate):
        raise ValueError(
            f"a batch of {batch_size} images does not divide into {world} device{'s' * (world != 1)} × "
            f"{accumulate} accumulated batches: give a multiple of {world * accumulate}"
        )
    return batch_size // (world * accumulate)


class MetricsCsv(Logger):
    """metrics.csv: a row a logged step, a column a metric. A resumed run drops rows from beyond its checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.columns = path, ["step"]
        self.rows: list[dict] = []  # not yet final: the last of them may still get columns after it was written
        self.offset: int | None = None  # where in the file the first of them belongs

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: the run folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; metrics of one step share it."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
            if len(self.rows) > 100:
                self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what has come since the last call; rewrites the file only for a new column or after a resume."""
        if not self.rows:
            return
        known = list(dict.fromkeys([*self.columns, *(key for row in self.rows for key in row)]))
        if self.offset is None or known != self.columns:
            old = []
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    old = [row for row in csv.DictReader(file) if int(row["step"]) < self.rows[0]["step"]]
            self.columns = list(dict.fromkeys([*known, *(key for row in old for key in row)]))
            with whole_file(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(old)
            self.offset = self.path.stat().st_size
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            file.truncate(self.offset)
            file.seek(self.offset)
            writer = csv.DictWriter(file, self.columns)
            writer.writerows(self.rows[:-1])
            self.offset = file.tell()
            writer.writerow(self.rows[-1])
        self.rows = self.rows[-1:]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The last rows."""
        self.save()


def usual_callbacks(run: Path, settings, title: str, count: int, quiet: bool = False) -> list[pl.Callback]:
    """What both stages run with: seeds by step, throughput, the progress line, and account of unreadable images.

    Args:
        settings: of either stage, resolved.
        title: of the progress line.
        count: images of an epoch.
        quiet: show no progress.
    """
    return [
        StepSeeds(settings.seed),
        Throughput(settings.batch_size),
        *([] if quiet else [ProgressLine(title, settings.batch_size)]),
        SkippedImages(run, count, 0.0 if settings.data.strict else settings.data.max_skipped_share),
    ]


class StepSeeds(pl.Callback):
    """Seeds torch anew at every batch from (seed, step, rank), so that stochastic depth in a resumed run is what it would
    have been without the interruption."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.part = seed, -1, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_) -> None:
        """Seed this batch; of the batches accumulated in one step, each differently."""
        self.part = self.part + 1 if trainer.global_step == self.step else 0
        self.step = trainer.global_step
        key = f"{self.seed}/{self.step}/{self.part}/{trainer.global_rank}"
        torch.manual_seed(random.Random(key).getrandbits(62))


class ProgressLine(pl.Callback):
    """One line: share done, time left, images a second, and the metrics that the module puts on the progress bar.

    On a terminal it is redrawn; in a file or pipe a line is printed every `quiet_s` seconds.
    """

    def __init__(self, title: str, batch_size: int, quiet_s: float = 30.0) -> None:
        self.title, self.batch_size, self.quiet_s = title, batch_size, quiet_s
        self.bar: tqdm | None = None
        self.told = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the line at the step where the run stands."""
        if not trainer.is_global_zero:
            return
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=self.title,
            unit="step",
            smoothing=0.1,
            mininterval=0.2 if terminal else self.quiet_s,
            maxinterval=1.0 if terminal else self.quiet_s,
            dynamic_ncols=terminal,
            ncols=None if terminal else 110,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {elapsed} so far, {remaining} left"
            "{postfix}",
        )

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Move on; the numbers beside the bar follow when it is redrawn."""
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        if time.monotonic() - self.told > self.bar.mininterval:
            self.told = time.monotonic()
            self.bar.set_postfix(self.numbers(trainer), refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def numbers(self, trainer: pl.Trainer) -> dict[str, str]:
        """The metrics beside the bar, and the mean rate of this sitting."""
        shown = {name: f"{float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()}
        steps, seconds = trainer.global_step - self.bar.initial, self.bar.format_dict["elapsed"]
        return shown | {"images/s": f"{steps * self.batch_size / max(seconds, 1e-9):,.0f}"}

    def on_train_end(self, trainer: pl.Trainer, *_) -> None:
        """Leave the finished line on the screen."""
        if self.bar is not None:
            self.bar.set_postfix(self.numbers(trainer))
        self.close()

    def on_exception(self, *_) -> None:
        """Leave the line as it is, so that what follows starts on its own."""
        self.close()

    def close(self) -> None:
        """Close the line; again does nothing."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Throughput(pl.Callback):
    """Logs images a second, and the share of the time that training waited for data."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clocks."""
        self.since = self.ended = time.perf_counter()
        self.step, self.waited_s = trainer.global_step, 0.0

    def on_train_batch_start(self, *_) -> None:
        """What has passed since the last batch ended was spent fetching this one."""
        self.waited_s += time.perf_counter() - self.ended

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Log the means since the last logged step."""
        now = self.ended = time.perf_counter()
        if trainer.global_step > self.step and trainer.global_step % trainer.log_every_n_steps == 0:
            images = (trainer.global_step - self.step) * self.batch_size
            values = {"images_per_s": images / (now - self.since), "data_wait_share": self.waited_s / (now - self.since)}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)
            self.since, self.step, self.waited_s = now, trainer.global_step, 0.0


SEEN_AT_LEAST = 500


class SkippedImages(pl.Callback):
    """Counts images that could not be read and lists them with their reason in skipped-images.txt.

    Args:
        count: images of an epoch.
        max_share: of the images seen so far; more of them unreadable stop the run. 0 stops at the first.
    """

    def __init__(self, run: Path, count: int, max_share: float) -> None:
        self.path, self.count, self.max_share = run / "skipped-images.txt", count, max_share
        self.reasons: dict[str, str] = {}
        self.seen = 0

    def on_train_start(self, *_) -> None:
        """A resumed run has its list already."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.reasons = dict(line.split("\t", 1) for line in lines if "\t" in line)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, *_) -> None:
        """Note what this batch had to replace."""
        for path, reason in batch["skipped"]:
            if path not in self.reasons:
                self.reasons[path] = reason
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{path}\t{reason}\n")
        self.seen += len(batch["image"])
        if self.reasons:
            trainer.progress_bar_metrics["skipped images"] = len(self.reasons)
        if not self.max_share and self.reasons:
            path, reason = next(iter(self.reasons.items()))
            raise ValueError(f"image {path} cannot be read ({reason}), and data.strict stops at the first such image")
        # By chance alone the first few images may hold more bad ones than the whole.
        seen = max(min(self.seen, self.count), min(SEEN_AT_LEAST, self.count))
        if len(self.reasons) > self.max_share * seen:
            raise ValueError(
                f"{len(self.reasons)} of the first {seen:,} images cannot be read, more than data.max_skipped_share of "
                f"{self.max_share:.0%}: see {self.path}, mend or remove them, or allow more"
            )

    def on_train_end(self, trainer: pl.Trainer, *_) -> None:
        """Say so once more at the end."""
        if self.reasons:
            print(f"{len(self.reasons)} images could not be read and were replaced by others; see {self.path}")


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
