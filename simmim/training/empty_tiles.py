"""Tiles without contents, which a run draws and leaves out."""

from __future__ import annotations

import pytorch_lightning as pl


class EmptyTiles(pl.Callback):
    """Counts tiles of background that were drawn and replaced by others, and says their share at the end of the run.

    Args:
        max_background: as of `TileSettings`.
    """

    def __init__(self, max_background: float) -> None:
        self.max_background = max_background
        self.num_empty = self.num_kept = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, *_) -> None:
        """Add those of this batch, on all devices that divide the batches alike."""
        self.num_empty += sum(batch.get("empty_tiles", ()))
        self.num_kept += len(batch["image"])
        if self.num_empty:
            trainer.progress_bar_metrics["empty tiles"] = self.num_empty

    def on_train_end(self, trainer: pl.Trainer, *_) -> None:
        """Say how many, and by which rule."""
        if self.num_empty and trainer.is_global_zero:
            drawn = self.num_empty + self.num_kept
            on_device = "" if trainer.world_size == 1 else ", on the first device"
            print(
                f"{self.num_empty:,} of {drawn:,} tiles drawn were left out{on_device}: more than {self.max_background:.0%} "
                "background (data.max_background)"
            )
