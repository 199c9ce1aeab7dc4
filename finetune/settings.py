"""Settings that every task of stage 2 shares, and how what the user leaves open follows from encoder, labels and machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from simmim.defaults import check_common, default_batch_size, default_ema, default_finetuning_epochs
from simmim.training.optim import Schedule


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder where it is changed or trained from scratch.

    Args:
        preset: size of an encoder from scratch; with `--init none` alone.
        like: run or encoder whose architecture and preprocessing an encoder from scratch takes; its weights stay behind.
        drop_path_rate: stochastic depth; by default 0 for fewer than 8 blocks, 0.2 from large on, else 0.1, as published.
        window_size: other attention windows than the encoder was pre-trained with, whose position bias moves over; by
            default it grows with the image size.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.
        sequential_attention: attend to so many windows at a time: less memory where images or windows are large.
    """

    preset: str | None = None
    like: str | None = None
    drop_path_rate: float | None = None
    window_size: int | None = None
    checkpoint_activations: bool = False
    sequential_attention: int | None = None

    def __post_init__(self) -> None:
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"encoder.window_size is {self.window_size}: give tokens a side, 1 or more")


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with layer-wise decayed learning rates, given per 512 images of the batch.

    Args:
        lr: peak learning rate of the head; by default 1.25e-3 as published, and for nano and micro what is 4e-3 at the
            batch in use, up to 128 images.
        lr_factor: multiplies `lr`, or what it is by default.
        layer_decay: factor from each block to the one before it; by default 0.75 as published, and 0.65 in classification
            with up to 20 labels a class.
        label_smoothing: share of the target spread over all classes.
        warmup_epochs: by default 20, or a fifth of shorter runs.
        warmup_lr: where the warm-up starts.
        min_lr: where the cosine ends.
        weight_decay: for matrices alone.
        clip: largest norm of the gradient.
        accumulate: split each batch into so many forward passes, where memory is short.
        ema: decay of the average of the weights by which a run is validated and exported, 0 for none; by default one over
            the last twentieth of the steps, at most 0.9999.
    """

    lr: float | None = None
    lr_factor: float = 1.0
    layer_decay: float | None = None
    label_smoothing: float = 0.1
    warmup_epochs: float | None = None
    warmup_lr: float = 2.5e-7
    min_lr: float = 2.5e-7
    weight_decay: float = 0.05
    clip: float = 5.0
    accumulate: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"optim.label_smoothing is {self.label_smoothing}: give a share in [0, 1)")
        if self.lr_factor <= 0:
            raise ValueError(f"optim.lr_factor is {self.lr_factor}: give a positive number")
        if self.accumulate < 1:
            raise ValueError(f"optim.accumulate is {self.accumulate}: give 1 or more")
        if self.clip <= 0:
            raise ValueError(f"optim.clip is {self.clip}: give a positive norm")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema is {self.ema}: give a decay in [0, 1), 0 for no average")


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """One fine-tuning run, whatever the task.

    Args:
        out: run folder to make.
        init: pre-training run or exported encoder to start from, or none for the from-scratch twin.
        freeze: train the head alone.
        train_stages: train the head, the final norm and so many of the encoder's last stages; all by default.
        image_size: pixels, one number or height and width; the encoder's own by default.
        epochs: passes over the training images; by default 100, and for a few labels as many as make 500 steps.
        steps: length in optimizer steps, in place of epochs.
        batch_size: images an optimizer step, over all devices.
        seed: of everything random, the choice of labels included.
        workers: processes that load images, a device.
        devices: how many, or auto for all.
        precision: as Lightning names them.
        compile: torch.compile for the encoder's blocks, as in pre-training.
        resume: go on with the run in `out`, or start it if there is none.
        overwrite: delete the run in `out` and start it anew.
        validations: how often the validation images are looked at in the course of the run.
        patience: stop when so many validations in a row brought nothing better; by default the run goes on to its end.
        log_every_steps: metrics every so many steps.
        loggers: services to log to beside TensorBoard and metrics.csv: wandb, mlflow.
        encoder: changes to the encoder.
        optim: optimizer and schedule.
        trainer: further settings of Lightning's Trainer.
    """

    task: ClassVar[str]  # as it stands in the command, and where `simmim.finetune.run` finds it

    out: str
    init: str = "none"
    freeze: bool = False
    train_stages: int | None = None
    image_size: int | tuple[int, int] | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    seed: int = 0
    workers: int | None = None
    devices: str | int = "auto"
    precision: str | None = None
    compile: bool = False
    resume: bool = False
    overwrite: bool = False
    validations: int = 10
    patience: int | None = None
    log_every_steps: int = 10
    loggers: str | tuple[str, ...] = ()
    encoder: EncoderSettings = EncoderSettings()
    optim: OptimSettings = OptimSettings()
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.loggers.split(",") if isinstance(self.loggers, str) else self.loggers
        object.__setattr__(self, "loggers", tuple(name.strip() for name in names if name.strip()))
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for name in ("epochs", "steps", "batch_size", "log_every_steps", "validations", "patience", "train_stages"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        check_common(self)
        scratch = self.init == "none"
        if not scratch and (self.encoder.like or self.encoder.preset):
            raise ValueError("encoder.like and encoder.preset describe an encoder from scratch: use them with --init none")
        if self.freeze and scratch:
            raise ValueError("--freeze with --init none would train a head on random features: give an encoder by --init")
        if self.train_stages and scratch:
            raise ValueError("--train-stages with --init none would keep random features: give an encoder by --init")
        if self.train_stages and self.freeze:
            raise ValueError("--freeze trains the head alone and --train-stages more than that: give one of them")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images, once resolved."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    def label_provenance(self) -> dict:
        """What an exported model says of the choice of its labels."""
        return {}

    def schedule(self) -> Schedule:
        """The learning rate's course, once resolved."""
        optim = self.optim
        return Schedule(optim.lr, self.epochs, optim.warmup_epochs, optim.warmup_lr, min_lr=optim.min_lr)


PUBLISHED_LAYER_DECAY = 0.75


def default_lr(small: bool, batch_size: int) -> float:
    """Peak learning rate of the head per 512 images: 1.25e-3 as published. For encoders of nano's or micro's width 4e-3 at
    any batch of up to 128 images, and in proportion beyond: with a few labels batches are small, and rates of 1.5e-3 to
    1.6e-2 at 25 and 32 images were the best on digits and garments (the searches that configs/finetune tells of)."""
    return 4e-3 * 512 / min(batch_size, 128) if small else 1.25e-3


def with_schedule(settings: TransferSettings, count: int, device: str, small: bool) -> TransferSettings:
    """Settings with length, batch, peak learning rate and warm-up filled in where they are open.

    Args:
        count: training images.
        small: whether the encoder is of nano's or micro's width.

    Raises:
        ValueError: when both epochs and steps are given and differ.
    """
    batch_size = settings.batch_size or min(default_batch_size(device, small), count)
    epochs = settings.epochs or default_finetuning_epochs(count, batch_size)
    if settings.steps:
        epochs = settings.steps * batch_size / count
        if settings.epochs and round(settings.epochs * count / batch_size) != settings.steps:
            raise ValueError(
                f"both --epochs {settings.epochs:g} and --steps {settings.steps} are given and differ: give one of them"
            )
    optim = settings.optim
    optim = replace(
        optim,
        lr=(optim.lr if optim.lr is not None else default_lr(small, batch_size)) * optim.lr_factor,
        lr_factor=1.0,
        layer_decay=optim.layer_decay if optim.layer_decay is not None else PUBLISHED_LAYER_DECAY,
        warmup_epochs=optim.warmup_epochs if optim.warmup_epochs is not None else min(20, epochs / 5),
        ema=optim.ema if optim.ema is not None else default_ema(round(epochs * count / batch_size)),
    )
    return replace(settings, epochs=epochs, batch_size=batch_size, optim=optim)
