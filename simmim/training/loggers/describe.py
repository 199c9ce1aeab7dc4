"""Tells the loggers what a run is and on what it runs."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from simmim.training.loggers.base import Session
from simmim.training.run_folder import CONFIG


class DescribeRun(pl.Callback):
    """Describes the run to its loggers as soon as the step at which training starts is known.

    Args:
        run: the run folder.
        monitor: as of `Session`.
    """

    def __init__(self, run: Path, monitor: str | None = None) -> None:
        self.run, self.monitor = run, monitor

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Describe it before anything is logged."""
        if not trainer.is_global_zero:
            return
        config = (self.run / CONFIG).read_text(encoding="utf-8") if (self.run / CONFIG).is_file() else ""
        session = Session(trainer.global_step, config, environment_of(trainer), self.monitor)
        for logger in trainer.loggers:
            logger.describe(session)  # type: ignore[attr-defined]


def environment_of(trainer: pl.Trainer) -> dict[str, str]:
    """Versions and devices, without names of users or machines."""
    from importlib.metadata import version

    from simmim import __version__

    device = trainer.strategy.root_device
    if device.type == "cuda":
        device_name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        device_name = f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
    libraries = ("torch", "pytorch-lightning", "torchmetrics", "datasets", "numpy", "pillow")
    return {
        "simmim": __version__,
        "Python": sys.version.split()[0],
        **{library: version(library) for library in libraries},
        "platform": platform.platform(terse=True),
        "devices": f"{trainer.world_size} × {device_name}",
        "precision": str(trainer.precision),
        "starts at step": f"{trainer.global_step:,} of {trainer.max_steps:,}",
    }
