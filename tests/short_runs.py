"""Short pre-training runs of a small encoder, step by step under the eyes of a test."""

import copy

import pytorch_lightning as pl
import torch

from simmim.data import EndlessBatchSampler, ImageSamples, RandomView, dataset_from_paths, find_images
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.methods.masking import BlockMasking
from simmim.methods.simmim import SimMIM
from simmim.pretrain.module import PretrainingModule
from simmim.training.loggers import build_loggers
from simmim.training.numerical_guard import NumericalGuard
from simmim.training.optim import Schedule
from simmim.training.progress import StepSeeds
from simmim.training.quiet import quiet_libraries
from simmim.training.run_folder import CONFIG
from simmim.training.saving import SavePolicy, SaveRun
from simmim.training.streams import StreamData
from simmim.training.trainer import build_trainer

CONFIG_OF_ENCODER = SwinV2Config(16, (2, 1), (1, 2), window_size=4, in_channels=1, drop_path_rate=0.2)
BATCH, STEPS, SAVE_EVERY = 8, 12, 4


class Recorder(pl.Callback):
    """Copies of weights, optimizer state and rate after every step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, module, *_):
        state = trainer.optimizers[0].state_dict()
        self.after[trainer.global_step - 1] = copy.deepcopy(
            {"weights": module.state_dict(), "optimizer": state["state"], "lr": state["param_groups"][0]["lr"]}
        )


def run_folder(path):
    path.mkdir(exist_ok=True)
    (path / CONFIG).touch()
    (path / "checkpoints").mkdir(exist_ok=True)
    return path


def train(images, run, *callbacks, steps=STEPS, guard=True, resume=None, accumulate=1, precision="32-true", **more):
    """A short pre-training run as `pretrain` assembles it; the callbacks given run last but for saving."""
    run_folder(run)
    torch.manual_seed(0)
    encoder = SwinV2(CONFIG_OF_ENCODER, more.get("checkpoint_activations", False))
    model = SimMIM(encoder, masking=BlockMasking(8, 0.5))
    schedule = Schedule(2e-2, 10.0, 1.0, 1e-4).by_step(30, BATCH)
    module = PretrainingModule(model, (0.13,), (0.31,), schedule, 0.05, 5.0)
    samples = ImageSamples(dataset_from_paths(find_images(images)), RandomView((32, 32), flip=0.0), 1, seed=0)
    module.guard = guard if isinstance(guard, NumericalGuard) else NumericalGuard(run) if guard else None
    guards = [module.guard] if module.guard else []
    save = SaveRun(run, SavePolicy(more.get("save_every", SAVE_EVERY)))
    trainer = build_trainer(
        run,
        steps,
        devices=1,
        precision=precision,
        accumulate=accumulate,
        callbacks=[StepSeeds(0), *guards, *callbacks, save],
        checkpoint_io=save.writer,
        log_every_steps=more.get("log_every", 1),
        extra={"accelerator": "cpu"},
        loggers=build_loggers(run),
    )
    stream = StreamData(samples, BATCH, accumulate, workers=0)
    with quiet_libraries():
        trainer.fit(module, datamodule=stream, ckpt_path=resume, weights_only=True)
    return module


def lose(monkeypatch, factors, part=0):
    """Multiply the loss of some steps: {step: factor}, of their `part`-th accumulated batch."""
    whole = PretrainingModule.training_step

    def training_step(self, batch, batch_idx):
        loss = whole(self, batch, batch_idx)
        wanted = batch_idx % self.trainer.accumulate_grad_batches == part
        return loss * factors.get(self.global_step, 1.0) if wanted else loss

    monkeypatch.setattr(PretrainingModule, "training_step", training_step)


def equal(first, second):
    """Whether nested dicts and lists of tensors and numbers are the same bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())
    return first == second


def listed(run):
    """non-finite-steps.txt as {step: (event, values, files)}."""
    path = run / "non-finite-steps.txt"
    lines = [line.split("\t") for line in path.read_text().splitlines()] if path.is_file() else []
    return {int(step): (event, values, files) for step, event, values, *files in lines[1:]}


def metrics(run):
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return {name: [row[column] for row in rows] for column, name in enumerate(header)}


def files_of_step(images, step, batch=BATCH):
    paths = find_images(images)
    keys = next(iter(EndlessBatchSampler(len(paths), batch, 0, start=step)))
    return [str(paths[index]) for _, index in keys]
