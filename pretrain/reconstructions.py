"""Pictures of reconstructions in the course of pre-training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from simmim.data import ImageSamples, collate
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.reconstruction_grid import COLUMNS, reconstruction_grid
from simmim.training.loggers import log_picture
from simmim.training.sharding import outside_a_step


class Reconstructions(pl.Callback):
    """Writes reconstructions of the same images and masks to RUN/reconstructions and to the loggers that show pictures.

    Each picture is a grid of original, masked, prediction pasted into the mask, and full prediction.

    Args:
        samples: evaluation views of the images, of which `count` are shown, evenly spread.
        run: the run folder.
    """

    def __init__(self, samples: ImageSamples, run: Path, every_steps: int, count: int = 8) -> None:
        self.folder, self.every_steps = run / "reconstructions", every_steps
        rows = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
        self.batch = collate([samples[0, int(row)] for row in rows])
        self.step = 0  # of the last picture; all batches that are accumulated in one step end at the same step

    def on_train_batch_end(self, trainer: pl.Trainer, module: PretrainingModule, *_) -> None:
        """Draw every `every_steps` steps."""
        if trainer.global_step % self.every_steps == 0 and trainer.global_step != self.step:
            self.draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Draw the last step, unless it is drawn already."""
        if trainer.global_step % self.every_steps:
            self.draw(trainer, module)

    def draw(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Write one picture. All processes compute where the model is sharded, as none can alone."""
        self.step = trainer.global_step
        if not trainer.is_global_zero and module.device_mesh is None:
            return
        model, training = module.model, module.model.training
        with torch.random.fork_rng(devices=[]), torch.no_grad(), outside_a_step(module):
            model.eval()
            images, drawn = module.inputs({**self.batch, "image": self.batch["image"].to(module.device)})
            mask, prediction = model.reconstruct(images, drawn)
            model.train(training)
        if not trainer.is_global_zero:
            return
        picture = reconstruction_grid(images, mask, prediction, module.mean, module.std, across=2 if len(images) > 4 else 1)
        self.folder.mkdir(exist_ok=True)
        picture.save(self.folder / f"step-{trainer.global_step:07d}.png")
        # Scalars of the n-th step are logged at n - 1. There, a picture from right before a checkpoint is not removed when
        # the run resumes at n, where it would not be drawn again.
        log_picture(trainer.loggers, "reconstructions", picture, trainer.global_step - 1, ", ".join(COLUMNS))
