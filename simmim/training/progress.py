"""Callbacks that watch a run: seeds by step, the progress line, throughput, images that could not be read."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from simmim.messages import counted

UNLABELED = ("weak", "box")  # of a batch, what only its unlabeled images have: a weak view, or a part to paste another into


class StepSeeds(pl.Callback):
    """Seeds torch before every batch from (seed, step, rank), so that stochastic depth does not depend on interruptions."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.part = seed, -1, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_) -> None:
        """Seed this batch; of the batches accumulated in one step, each differently."""
        self.part = self.part + 1 if trainer.global_step == self.step else 0
        self.step = trainer.global_step
        key = f"{self.seed}/{self.step}/{self.part}/{trainer.global_rank}"
        torch.manual_seed(random.Random(key).getrandbits(62))


def count_unlabeled(trainer: pl.Trainer, batch: Any) -> int:
    """Unlabeled images of a batch, over all devices, that labeled ones are accompanied by."""
    named = [name for name in UNLABELED if name in batch] if isinstance(batch, dict) else []
    return trainer.world_size * len(batch[named[0]]) if named else 0


class ProgressLine(pl.Callback):
    """One line: share done, time left, images a second, and the metrics that the module puts on the progress bar.

    On a terminal it is redrawn; in a file or pipe a line is printed every `quiet_s` seconds.
    """

    def __init__(self, title: str, batch_size: int, quiet_s: float = 30.0) -> None:
        self.title, self.batch_size, self.quiet_s = title, batch_size, quiet_s
        self.bar: tqdm | None = None
        self.told, self.unlabeled = 0.0, 0

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

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, *_) -> None:
        """Move on; the numbers beside the bar follow when it is redrawn."""
        self.unlabeled += count_unlabeled(trainer, batch)
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        if time.monotonic() - self.told > self.bar.mininterval:
            self.told = time.monotonic()
            self.bar.set_postfix(self.numbers(trainer), refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def numbers(self, trainer: pl.Trainer) -> dict[str, str]:
        """The metrics beside the bar, and the mean rate since training started or resumed."""
        shown = {name: f"{float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()}
        steps, seconds = trainer.global_step - self.bar.initial, self.bar.format_dict["elapsed"]
        images = steps * self.batch_size + self.unlabeled
        return shown | {"images/s": f"{images / max(seconds, 1e-9):,.0f}"}

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
    """Logs images a second, and the share of the time that training waited for data. Where unlabeled images accompany the
    labeled ones, the rate is that of all, and the rates of both are logged beside it.

    The time is that of training batches and of waiting for the next one. Validation, probes and pictures are left out: the
    wait for the next batch begins after all other callbacks, when `WaitStart` says so.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clocks."""
        self.start_counting(trainer)
        self.start_waiting()

    def start_counting(self, trainer: pl.Trainer) -> None:
        """All counts begin at this step."""
        self.step, self.trained_s, self.waited_s, self.unlabeled = trainer.global_step, 0.0, 0.0, 0

    def start_waiting(self) -> None:
        """All that follows until the next batch starts is spent fetching it."""
        self.wait_started = time.perf_counter()

    def on_train_batch_start(self, *_) -> None:
        """The batch has been fetched."""
        self.batch_started = time.perf_counter()
        self.waited_s += self.batch_started - self.wait_started

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, *_) -> None:
        """Log the means since the last logged step."""
        self.trained_s += time.perf_counter() - self.batch_started
        self.unlabeled += count_unlabeled(trainer, batch)
        if trainer.global_step > self.step and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            labeled, seconds = (trainer.global_step - self.step) * self.batch_size, self.trained_s + self.waited_s
            values = {"images_per_s": (labeled + self.unlabeled) / seconds, "data_wait_share": self.waited_s / seconds}
            if self.unlabeled:
                values |= {
                    "labeled_images_per_s": labeled / seconds,
                    "unlabeled_images_per_s": self.unlabeled / seconds,
                }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)
            self.start_counting(trainer)


class WaitStart(pl.Callback):
    """Tells a `Throughput` that all work after a batch is done. To be the last callback."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def on_train_batch_end(self, *_) -> None:
        """Other callbacks have drawn, probed and counted."""
        self.throughput.start_waiting()

    def on_validation_end(self, *_) -> None:
        """Validation, where there was one after the batch, is over too."""
        self.throughput.start_waiting()


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

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        """A resumed run has its list already, of the images that it has seen."""
        self.seen = trainer.global_step * trainer.datamodule.batch_size  # type: ignore[attr-defined]
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
        """Say so once more at the end, for all processes, which share the list."""
        if trainer.is_global_zero and self.path.is_file():
            count = len({line.split("\t", 1)[0] for line in self.path.read_text(encoding="utf-8").splitlines()})
            verb = "was" if count == 1 else "were"
            print(f"{counted(count, 'image')} could not be read and {verb} replaced; see {self.path}")
