"""The loss on images that are kept out of pre-training, and what its course says.

It tells how fine-tuning will do, and shows when an encoder is too large for its images (arXiv 2206.04664).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from simmim.data import ImageSamples, build_loader
from simmim.messages import counted, every, notify
from simmim.pretrain.module import PretrainingModule

BATCH = 32  # images, on any number of devices: a batch that changed with it would change the order of sums
KEEP_VIEWS_MIB = 512  # images that take less stay in memory as the encoder sees them, and are read once
# A measure is a forward pass of each image, a third of what training on it costs. Measures take at most a fiftieth of the
# time of training, and are fifty in all at most.
FORWARD_SHARE, MAX_TIME_SHARE, MAX_MEASURES = 1 / 3, 0.02, 50
LAST_PART, LEAST_CHANGE = 0.2, 0.01  # of `trend`


def default_steps_between(num_steps: int, num_images: int, batch_size: int) -> int:
    """Optimizer steps from one measure to the next.

    Args:
        num_steps: of the run.
        num_images: held out.
        batch_size: images per optimizer step.
    """
    by_time = num_images * FORWARD_SHARE / (batch_size * MAX_TIME_SHARE)
    return max(1, math.ceil(max(by_time, num_steps / MAX_MEASURES)))


class HeldOutLoss(pl.Callback):
    """The method's loss on held-out images, with the same views and the same random part (masks) each time.

    It is measured every `every_steps` steps and at the end, and logged as `validation_loss`. Training goes on as without it,
    bit for bit. A batch holds the same images on any number of devices, which divide the batches among themselves. The
    result is the mean over all images.

    Args:
        samples: of the held-out images.
        every_steps: steps from one measure to the next.
        images_per_input: as of `MethodSettings`: images of one input come into one batch.
        workers: processes that read images.
    """

    def __init__(self, samples: ImageSamples, every_steps: int, images_per_input: int, workers: int) -> None:
        self.samples, self.every_steps, self.workers = samples, every_steps, workers
        size = math.ceil(BATCH / images_per_input) * images_per_input
        rows = range(len(samples))
        self.order = [[(0, row) for row in rows[first : first + size]] for first in range(0, len(rows), size)]
        self.measures: list[tuple[int, float]] = []  # (step, loss)
        self.batches: list[dict] | DataLoader = []

    def __str__(self) -> str:
        """For the summary of a run."""
        images, verb = counted(len(self.samples), "image"), "is" if len(self.samples) == 1 else "are"
        return f"{images} that {verb} held out, {every(self.every_steps, 'step')} and at the end"

    def state_dict(self) -> dict:
        """All measures so far."""
        return {"measures": [list(measure) for measure in self.measures]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from them."""
        self.measures = [(step, loss) for step, loss in state["measures"]]

    def loss_at(self, step: int) -> float | None:
        """The loss that was measured right after `step`; None where there was no measure."""
        return self.measures[-1][1] if self.measures and self.measures[-1][0] == step else None

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open this process's batches, in memory where they fit. Every process has as many, since a sharded model computes
        on all at once; the last one of some is a repetition that does not count.

        Raises:
            ValueError: when images cannot be read.
        """
        world, rank = trainer.world_size, trainer.global_rank
        mine = [self.order[min(first + rank, len(self.order) - 1)] for first in range(0, len(self.order), world)]
        loader = build_loader(self.samples, self.workers, mine)  # type: ignore[arg-type]  # any sized iterable will do
        height, width = self.samples[0, 0]["image"].shape[-2:]
        num_bytes = len(self.samples) * self.samples.channels * height * width
        self.batches = loader if num_bytes > KEEP_VIEWS_MIB * 2**20 else list(loader)
        skipped = [entry for batch in self.batches for entry in batch["skipped"]] if self.batches is not loader else []
        if skipped and trainer.is_global_zero:
            path, why = skipped[0]
            notify(f"{len(skipped):,} of the images held out cannot be read, and others stand in; the first, {path}: {why}")

    def on_train_batch_end(self, trainer: pl.Trainer, module: PretrainingModule, *_) -> None:
        """Measure every `every_steps` steps."""
        if trainer.global_step % self.every_steps == 0:
            self.measure(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Measure the last step."""
        self.measure(trainer, module)

    def measure(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Measure and log, unless this step has been measured: accumulated batches end at the same step."""
        step = trainer.global_step
        if self.loss_at(step) is not None:
            return
        loss = self.loss(trainer, module)
        self.measures.append((step, loss))
        trainer.progress_bar_metrics["validation_loss"] = loss
        for logger in trainer.loggers:
            # Scalars of the n-th step are logged at n - 1.
            logger.log_metrics({"validation_loss": loss}, step=step - 1)

    def loss(self, trainer: pl.Trainer, module: PretrainingModule) -> float:
        """The mean loss over all held-out images, by the weights as they are now, in the precision of training."""
        model, training = module.model, module.model.training
        losses = torch.zeros(len(self.order), device=module.device)
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), trainer.precision_plugin.forward_context():
                for number, batch in enumerate(self.batches):
                    images = batch["image"].to(module.device)
                    loss = module.loss_of({**batch, "image": images}).float()
                    place = number * trainer.world_size + trainer.global_rank
                    if place < len(self.order):
                        losses[place] = loss
        finally:
            model.train(training)
        # Each process has filled in its own places, so that the sum is the same on any number of processes.
        losses = trainer.strategy.reduce(losses, reduce_op="sum")
        counts = torch.tensor([len(batch) for batch in self.order], dtype=torch.float64)
        return float((losses.cpu().double() * counts).sum() / counts.sum())


def trend(measures: Sequence[tuple[int, float]]) -> str:
    """What the course of the loss says about the length of a run and the size of the encoder, in a line.

    It is rising when the last loss is above the lowest one by more than a hundredth; still falling when it fell by more than
    a hundredth over the last fifth of the steps; else no longer falling.

    Args:
        measures: (step, loss), one or more, the last one of the last step.
    """
    last_step, last = measures[-1]
    best_step, best = min(measures, key=lambda measure: measure[1])
    if not math.isfinite(last):
        return f"validation loss {last} at the end"
    if last - best > LEAST_CHANGE * abs(best):
        return (
            f"validation loss {last:.4g} at the end and {best:.4g} at step {best_step:,}: rising. The encoder begins to "
            "know its images by heart; try more images, a smaller preset or fewer epochs"
        )
    before = [loss for step, loss in measures if step <= (1 - LAST_PART) * last_step]
    if not before:
        return f"validation loss {last:.4g} at the end; too few measures to say whether it was still falling"
    fall = (before[-1] - last) / abs(before[-1]) if before[-1] else 0.0
    course = (
        f"validation loss {last:.4g} at the end, {abs(fall):.1%} {'below' if fall >= 0 else 'above'} that at four fifths"
    )
    if fall > LEAST_CHANGE:
        return f"{course} of the run: still falling. More epochs would probably teach it more"
    # The learning rate ends too, so that a level end says nothing of a longer run, whose rate would still be high here.
    return f"{course} of the run: no longer falling, as is usual where the learning rate ends"
