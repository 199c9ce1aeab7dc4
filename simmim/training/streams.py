"""Training data as one endless stream that can start at any step; validation data in order."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import Sampler

from simmim.data import ImageSamples, IndexedSamples, SequentialBatchSampler, StreamedSamples, build_loader
from simmim.messages import counted


class StreamData(pl.LightningDataModule):
    """The endless training stream, which starts at the trainer's current step.

    Args:
        batch_size: images of one optimizer step over all devices and accumulated batches.
    """

    def __init__(self, train: IndexedSamples | StreamedSamples, batch_size: int, accumulate: int, workers: int) -> None:
        super().__init__()
        self.train, self.batch_size = train, batch_size
        self.accumulate, self.workers = accumulate, workers
        self.positions: dict[int, tuple[int, int]] = {}  # worker to (epoch, images read); of streamed sources
        self.resumed: dict | None = None

    def train_dataloader(self):
        """Batches of this rank, beginning after those of the steps already taken."""
        trainer = self.trainer
        share = per_device_batch(self.batch_size, trainer.world_size, self.accumulate)
        start = trainer.global_step * self.accumulate
        if isinstance(self.train, StreamedSamples):
            self.positions = self.resumed_positions(start)
            part = self.train.part(trainer.global_rank, trainer.world_size, start, self.positions)
            return build_loader(part, self.workers, batch_size=share)
        return build_loader(self.train, self.workers, self.batches(start))

    def batches(self, start: int) -> Sampler:
        """The keys of this rank's batches, of indexed images.

        Args:
            start: batches to skip.
        """
        assert isinstance(self.train, IndexedSamples)
        trainer = self.trainer
        share = per_device_batch(self.batch_size, trainer.world_size, self.accumulate)
        return self.train.batches(share, trainer.global_rank, trainer.world_size, start)

    def resumed_positions(self, start: int) -> dict[int, tuple[int, int]]:
        """The position from which each of this rank's workers continues; empty for the start of a new epoch.

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
                f"{now[0]} × {now[1]}: resume with workers {workers} on as many devices"
            )
        places = self.resumed["places"][self.trainer.global_rank]
        return {int(worker): tuple(place) for worker, place in places.items()}

    def record_positions(self, batch: dict) -> None:
        """Record the position of the workers after this batch."""
        for worker, epoch, read in batch.get("stream_position", ()):
            self.positions[worker] = (epoch, read)

    def state_dict(self) -> dict:
        """The stream positions of every rank; nothing for indexed images, whose order follows from the step."""
        if not isinstance(self.train, StreamedSamples):
            return {}
        places = [{str(worker): list(place) for worker, place in self.positions.items()}]
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, places[0])
            places = gathered
        return {"places": places, "divided": [self.trainer.world_size, max(self.workers, 1)]}

    def load_state_dict(self, state: dict) -> None:
        """Keep the positions of a checkpoint until the stream is opened."""
        self.resumed = state or None


class TrackStreamPosition(pl.Callback):
    """Records the stream position after every batch, so that a checkpoint holds it."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, *_) -> None:
        """Before the callbacks that save."""
        trainer.datamodule.record_positions(batch)  # type: ignore[attr-defined]


class ValidatedStreamData(StreamData):
    """The training stream, and validation samples in order."""

    def __init__(
        self,
        train: IndexedSamples,
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
        order = SequentialBatchSampler(
            len(self.validation), self.validation_batch_size, trainer.global_rank, trainer.world_size
        )
        return build_loader(self.validation, self.workers, order)


def per_device_batch(batch_size: int, world: int, accumulate: int) -> int:
    """Images of one forward pass.

    Raises:
        ValueError: when the global batch does not divide evenly.
    """
    if batch_size % (world * accumulate):
        raise ValueError(
            f"a batch of {counted(batch_size, 'image')} does not divide into {world} device{'s' * (world != 1)} × "
            f"{accumulate} accumulated batches: give a multiple of {world * accumulate}"
        )
    return batch_size // (world * accumulate)
