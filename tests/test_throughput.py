"""Throughput and the share of waiting for data, against known times of loading, training, validation and callbacks."""

import time

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch.utils.data import DataLoader

from simmim.training.progress import Throughput, WaitStart

LOAD_S, TRAIN_S, OTHER_S = 0.02, 0.04, 0.6  # a batch to load, a batch to train, a validation batch or a picture
BATCHES = 3


class SlowImages(torch.utils.data.Dataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        time.sleep(LOAD_S)
        return torch.ones(3)


class SlowModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(TRAIN_S)
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(OTHER_S)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Picture(pl.Callback):
    def on_train_batch_end(self, *_):
        time.sleep(OTHER_S)

    def on_validation_end(self, *_):
        time.sleep(OTHER_S)


class Recorder(Logger):
    name, version = "recorder", ""

    def __init__(self):
        super().__init__()
        self.values = []

    def log_metrics(self, metrics, step=None):
        if "images_per_s" in metrics:
            self.values.append(metrics)

    def log_hyperparams(self, *_):
        pass


@pytest.mark.parametrize("other_work", ["validation", "picture"])
def test_other_work_is_neither_training_nor_waiting(other_work, tmp_path):
    """Each step is 1/3 loading and 2/3 training, whatever is validated or drawn in between, for ten times as long."""
    recorder, throughput, validates = Recorder(), Throughput(batch_size=12), other_work == "validation"
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=1 if validates else None,
        limit_val_batches=1 if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=recorder,
        callbacks=[throughput, *([] if validates else [Picture()]), WaitStart(throughput)],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(SlowImages(), batch_size=1)
    trainer.fit(SlowModule(), batches, DataLoader([torch.ones(3)]))
    assert len(recorder.values) == BATCHES
    for values in recorder.values[1:]:
        seconds = 12 / values["images_per_s"]
        assert LOAD_S + TRAIN_S <= seconds < OTHER_S
        assert LOAD_S <= values["data_wait_share"] * seconds < OTHER_S / 2
