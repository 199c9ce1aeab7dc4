"""Color images in a run that reads all images as gray."""

from __future__ import annotations

import pytorch_lightning as pl


class GrayCopies(pl.Callback):
    """Counts color images that are read as gray, beside the progress line and at the end of the run."""

    def __init__(self, quiet: bool = False) -> None:
        self.paths: dict[str, None] = {}  # in the order in which they were met
        self.quiet = quiet

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, *_) -> None:
        """Note those of this batch."""
        self.paths.update(dict.fromkeys(batch.get("gray_copies", ())))
        if self.paths:
            trainer.progress_bar_metrics["color as gray"] = len(self.paths)

    def on_train_end(self, trainer: pl.Trainer, *_) -> None:
        """Say how many, and name the first."""
        if self.paths and trainer.is_global_zero and not self.quiet:
            number = len(self.paths)
            images = "color image was" if number == 1 else "color images were"
            print(f"{number:,} {images} read as gray, the first {next(iter(self.paths))}")
