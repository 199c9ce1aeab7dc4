"""Lightning's Trainer as both stages use it, and what is asked of the machine before there is one."""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from simmim.encoders.base import Encoder, EncoderConfig
from simmim.messages import did_you_mean
from simmim.training.logs import DescribeRun, loggers_for
from simmim.training.saving import SaveRun
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
            raise ValueError(f"setting 'trainer.{key}' belongs to the run: see its own settings by --help")
        if key not in known:
            names = [f"trainer.{name}" for name in known]
            raise ValueError(f"unknown setting 'trainer.{key}'{did_you_mean(f'trainer.{key}', names)}")


def is_first_process() -> bool:
    """Whether this is the process that takes the run folder and speaks; of several, each of which runs the whole program."""
    return not getattr(rank_zero_only, "rank", 0)


def device_type() -> str:
    """The kind of device a run uses unless told otherwise: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_precision(device: str, encoder: EncoderConfig) -> str:
    """bf16-mixed where the hardware has it, else full precision; and that for nano, which is too small to gain by it."""
    small = max(encoder.channels) <= 96
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported()
    else:
        has = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        has_bf16 = (has.get("avx512_bf16") or has.get("amx_bf16")) and not small
    return "bf16-mixed" if has_bf16 else "32-true"


def build_trainer(
    run: Path,
    steps: int,
    *,
    devices: str | int,
    precision: str,
    accumulate: int,
    callbacks: list[pl.Callback],
    log_every_steps: int,
    extra: Mapping[str, Any],
    validate_every_steps: int | None = None,
    loggers: Sequence[str] = (),
    loss: str = "training",
) -> pl.Trainer:
    """A Lightning Trainer that runs `steps` optimizer steps and logs to TensorBoard and metrics.csv in `run`.

    Args:
        loggers: services to log to besides, see `simmim.training.logs.loggers_for`.
        loss: what the module's loss is, as it is to be called on the TensorBoard page: masked_l1, cross_entropy.

    Raises:
        ValueError: when Lightning refuses the devices, precision or one of the `extra` settings, and for a logger that is
            not known or not installed.
    """
    silence_libraries()
    settings = {
        "accelerator": "auto",
        **extra,
        "strategy": strategy_named(extra.get("strategy", "auto"), devices, extra.get("num_nodes", 1)),
        "devices": devices,
        "precision": precision,
        "max_steps": steps,
        "max_epochs": -1,
        "accumulate_grad_batches": accumulate,
        "logger": loggers_for(run, loggers, loss),
        "callbacks": [DescribeRun(run), *callbacks],
        "plugins": [
            *(extra.get("plugins") or ()),
            *(callback.writer for callback in callbacks if isinstance(callback, SaveRun)),
        ],
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
        first = str(error).strip().splitlines()[0]
        what = f"devices {devices!r}, precision {precision!r}" + (f", trainer {dict(extra)}" if extra else "")
        raise ValueError(f"{what} does not work here: {first}") from error


def machine(trainer: pl.Trainer, encoder: Encoder) -> str:
    """What a run is on: 8 × cuda, or 1 × cpu (compiled kernels)."""
    device = trainer.strategy.root_device
    note = encoder.describe_kernels(device)
    return f"{trainer.world_size} × {device.type}" + (f" ({note})" if note else "")


def thread_failed(failed, otherwise=threading.excepthook) -> None:
    """A thread that could not write, TensorBoard's for instance, needs no traceback: the main thread hears of it and ends
    the run with a line."""
    if not issubclass(failed.exc_type, OSError):
        otherwise(failed)


def feeding_failed(error: Exception, item, otherwise=Queue._on_queue_feeder_error) -> None:
    """Nor does a thread that feeds a loading process which has died: of that death the main thread hears too."""
    if not isinstance(error, BrokenPipeError):
        otherwise(error, item)


def silence_libraries() -> None:
    """Keep Lightning's advice on things that are decided here off the screen; errors and our own lines stay."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    threading.excepthook = thread_failed
    Queue._on_queue_feeder_error = staticmethod(feeding_failed)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    warnings.filterwarnings("ignore", message=".*is not a resumable dataloader.*|.*dataloader that is not resumable.*")
    warnings.filterwarnings("ignore", message=".*found in the `src` dir.*|.*treespec.*")
