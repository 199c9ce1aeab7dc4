"""Lightning's Trainer as both stages use it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from simmim.encoders.base import Encoder
from simmim.messages import did_you_mean, first_line
from simmim.training.sharding import strategy_named

# What the run itself decides; everything else of the Trainer is open to the user as --trainer.KEY.
OWN_TRAINER_KEYS = frozenset(
    (
        "self",
        "devices",
        "precision",
        "logger",
        "callbacks",
        "max_epochs",
        "min_epochs",
        "max_steps",
        "min_steps",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "use_distributed_sampler",
        "default_root_dir",
        "enable_checkpointing",
        "enable_progress_bar",
        "enable_model_summary",
        "val_check_interval",
        "check_val_every_n_epoch",
        "num_sanity_val_steps",
        "reload_dataloaders_every_n_epochs",
        "log_every_n_steps",
    )
)


def check_trainer_keys(extra: Mapping[str, Any]) -> None:
    """Refuse keys that Lightning's Trainer does not have or that the run sets itself.

    Raises:
        ValueError: naming the nearest known key.
    """
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - OWN_TRAINER_KEYS
    for key in extra:
        if key in OWN_TRAINER_KEYS:
            raise ValueError(f"setting 'trainer.{key}' is set by the run: use the run's own settings")
        if key not in known:
            names = [f"trainer.{name}" for name in known]
            raise ValueError(f"unknown setting 'trainer.{key}'{did_you_mean(f'trainer.{key}', names)}")


def is_first_process() -> bool:
    """Whether this is the process that takes the run folder and speaks; of several, each of which runs the whole program."""
    return not getattr(rank_zero_only, "rank", 0)


def build_trainer(
    run: Path,
    num_steps: int,
    *,
    devices: str | int,
    precision: str,
    accumulate: int,
    callbacks: Sequence[pl.Callback],
    log_every_steps: int,
    extra: Mapping[str, Any],
    validate_every_steps: int | None = None,
    loggers: Sequence[Logger] = (),
    checkpoint_io: CheckpointIO | None = None,
) -> pl.Trainer:
    """A Lightning Trainer that takes `num_steps` optimizer steps in the run folder `run`.

    Args:
        accumulate: forward passes per optimizer step.
        extra: settings of the Trainer that the user gives.
        validate_every_steps: None for no validation.
        checkpoint_io: writes the checkpoints; Lightning's own by default.

    Raises:
        ValueError: when Lightning refuses the devices, the precision or one of the `extra` settings.
    """
    settings = {
        "accelerator": "auto",
        **extra,
        "strategy": strategy_named(extra.get("strategy", "auto"), devices, extra.get("num_nodes", 1)),
        "devices": devices,
        "precision": precision,
        "max_steps": num_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": accumulate,
        "logger": list(loggers),
        "callbacks": list(callbacks),
        "plugins": [*(extra.get("plugins") or ()), *([checkpoint_io] if checkpoint_io else [])],
        "log_every_n_steps": log_every_steps,
        "use_distributed_sampler": False,
        "default_root_dir": run,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **(
            {"check_val_every_n_epoch": None, "val_check_interval": validate_every_steps * accumulate}
            if validate_every_steps
            else {"limit_val_batches": 0}
        ),
    }
    try:
        return pl.Trainer(**settings)
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        what = f"devices {devices!r}, precision {precision!r}" + (f", trainer {dict(extra)}" if extra else "")
        raise ValueError(f"{what} does not work here: {first_line(error)}") from error


def machine(trainer: pl.Trainer, encoder: Encoder) -> str:
    """What a run is on: 8 × cuda, or 1 × cpu (compiled kernels)."""
    device = trainer.strategy.root_device
    note = encoder.describe_kernels(device)
    return f"{trainer.world_size} × {device.type}" + (f" ({note})" if note else "")
