"""What stage 1 shows while it runs: a fixed set of images, reconstructed again and again."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from pretrain.module import SimMIMPretraining
from simmim.data import ImageSamples, collate
from simmim.training.logs import log_picture
from simmim.visualise import COLUMNS, reconstruction_grid


class Reconstructions(pl.Callback):
    """A grid of original, masked, prediction pasted into the mask, and full prediction, of the same images and masks
    each time, to RUN/reconstructions and to the loggers that show pictures.

    Args:
        samples: evaluation views of the images; the first `count` that can be read, evenly spread, are shown.
    """

    def __init__(self, samples: ImageSamples, run: Path, every_steps: int, count: int = 8) -> None:
        self.folder, self.every_steps = run / "reconstructions", every_steps
        rows = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
        self.batch = collate([samples[0, int(row)] for row in rows])
        self.step = 0  # of the last picture; batches that are accumulated in one step end at the same one

    def on_train_batch_end(self, trainer: pl.Trainer, module: SimMIMPretraining, *_) -> None:
        """Draw at every `every_steps`-th step."""
        if trainer.global_step % self.every_steps == 0 and trainer.global_step != self.step:
            self.draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: SimMIMPretraining) -> None:
        """Draw the end."""
        if trainer.global_step % self.every_steps:
            self.draw(trainer, module)

    def draw(self, trainer: pl.Trainer, module: SimMIMPretraining) -> None:
        """Write one picture. A model that is divided among processes computes only when all of them do."""
        self.step = trainer.global_step
        if not trainer.is_global_zero and module.device_mesh is None:
            return
        model, training = module.model, module.model.training
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.eval()
            images, mask = module.inputs({**self.batch, "image": self.batch["image"].to(module.device)})
            prediction = model.reconstruct(images, mask)
            model.train(training)
        if not trainer.is_global_zero:
            return
        picture = reconstruction_grid(
            images, mask, prediction, module.mean, module.std, across=2 if len(images) > 4 else 1
        )
        self.folder.mkdir(exist_ok=True)
        picture.save(self.folder / f"step-{trainer.global_step:07d}.png")
        # Scalars of the n-th step stand at n - 1. There, a picture from right before a checkpoint is not taken back when the
        # run resumes at n, where it would not be drawn again.
        log_picture(trainer.loggers, "reconstructions", picture, trainer.global_step - 1, ", ".join(COLUMNS))
