"""Settings that every stage's runs share, with their checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

KEEP_DECODED_MIB = 128  # images that decode to less stay in memory, in each loading process


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, its warm-up, and gradient clipping. Learning rates are given per 512 images of the global batch.

    Args:
        lr: peak learning rate.
        warmup_epochs: length of the linear warm-up.
        warmup_lr: learning rate at which the warm-up starts.
        min_lr: learning rate at which the cosine ends.
        weight_decay: for matrices; never for biases, norms, tokens, temperatures and position MLPs.
        clip: largest norm of the gradient.
        accumulate: forward passes per optimizer step, where memory is short; each sees an equal part of the batch.
    """

    lr: float | None = None
    warmup_epochs: float | None = None
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    weight_decay: float = 0.05
    clip: float = 5.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"optim.accumulate is {self.accumulate}: give 1 or more")
        if self.clip <= 0:
            raise ValueError(f"optim.clip is {self.clip}: give a positive norm")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One training run. Only the run folder has no default.

    Args:
        out: run folder to make.
        init: encoder to start from, or none.
        image_size: pixels, one number or height and width.
        epochs: passes over the training images.
        batch_size: images per optimizer step, over all devices.
        seed: seed of everything random.
        workers: processes per device that load images.
        devices: number of devices, their indices as in 0,1, or auto for all.
        precision: as Lightning names it, for example 32-true or bf16-mixed.
        compile: torch.compile for the encoder's blocks. On a GPU the first step takes minutes longer. A CPU has kernels of
            the encoder's own, which are faster.
        resume: continue the run in `out`, or start it if there is none.
        overwrite: delete the run in `out` and start it again.
        log_every_steps: metrics every `log_every_steps` steps.
        loggers: services to log to beside TensorBoard and metrics.csv: wandb, mlflow.
        trainer: further settings of Lightning's Trainer.
    """

    # Beyond `simmim.training.run_folder.MAY_CHANGE_ON_RESUME`.
    may_change_on_resume: ClassVar[tuple[str, ...]] = ()

    out: str
    init: str = "none"
    image_size: int | tuple[int, int] | None = None
    epochs: float | None = None
    batch_size: int | None = None
    seed: int = 0
    workers: int | None = None
    devices: str | int = "auto"
    precision: str | None = None
    compile: bool = False
    resume: bool = False
    overwrite: bool = False
    log_every_steps: int = 10
    loggers: str | tuple[str, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.loggers.split(",") if isinstance(self.loggers, str) else self.loggers
        object.__setattr__(self, "loggers", tuple(name.strip() for name in names if name.strip()))
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        size = self.image_size
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError(f"image_size is {size}: give pixels, one number or height and width")
        check_positive(self, ("epochs", "batch_size", "log_every_steps"))
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give 0 to load in the main process, or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: give a whole number from 0 to {2**32 - 1}")
        devices = str(self.devices)
        listed = "," in devices and all(part.strip().isdecimal() for part in devices.split(","))
        if devices != "auto" and not listed and not (devices.isdecimal() and int(devices) > 0):
            raise ValueError(f"devices is {devices!r}: give a number of devices, their indices as in 0,1, or auto")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels, once resolved."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size


def check_positive(settings, names: Iterable[str]) -> None:
    """Refuse settings that are neither open nor positive.

    Raises:
        ValueError: naming the first such setting.
    """
    for name in names:
        if getattr(settings, name) is not None and getattr(settings, name) <= 0:
            raise ValueError(f"{name} is {getattr(settings, name)}: give a positive number")
