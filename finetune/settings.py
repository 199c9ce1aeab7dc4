"""Settings that every task of stage 2 shares, and how what the user leaves open follows from encoder, labels and machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simmim.defaults import default_batch_size, default_ema, default_finetuning_epochs
from simmim.training.optim import Schedule
from simmim.training.settings import OptimizerSettings, RunSettings, check_positive


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
class OptimSettings(OptimizerSettings):
    """AdamW with layer-wise decayed learning rates, given per 512 images of the batch.

    Args:
        lr: peak learning rate of the head; by default 1.25e-3 as published, and for nano and micro what is 4e-3 at the
            batch in use, up to 128 images.
        lr_factor: multiplies `lr`, or what it is by default.
        layer_decay: factor from each block to the one before it; by default 0.75 as published, and 0.65 in classification
            with up to 20 labels per class.
        label_smoothing: share of the target spread over all classes.
        warmup_epochs: by default 20, or a fifth of shorter runs.
        ema: decay of the average of the weights by which a run is validated and exported, 0 for none; by default one over
            the last twentieth of the steps, at most 0.9999.
    """

    warmup_lr: float = 2.5e-7
    min_lr: float = 2.5e-7
    lr_factor: float = 1.0
    layer_decay: float | None = None
    label_smoothing: float = 0.1
    ema: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"optim.label_smoothing is {self.label_smoothing}: give a share in [0, 1)")
        if self.lr_factor <= 0:
            raise ValueError(f"optim.lr_factor is {self.lr_factor}: give a positive number")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema is {self.ema}: give a decay in [0, 1), 0 for no average")


@dataclass(frozen=True, kw_only=True)
class TransferSettings(RunSettings):
    """One fine-tuning run, whatever the task.

    Args:
        init: pre-training run or exported encoder to start from, or none for the from-scratch twin.
        freeze: train the head alone.
        train_stages: train the head, the final norm and the last `train_stages` stages of the encoder; all by default.
        image_size: pixels, one number or height and width; the encoder's own by default.
        epochs: passes over the training images; by default 100, and for a few labels enough for 500 steps.
        steps: length in optimizer steps, in place of epochs.
        seed: seed of everything random, the choice of labels included.
        validations: number of validations in the course of the run.
        patience: stop after `patience` validations in a row without a better result; by default the run goes to its end.
        encoder: changes to the encoder.
        optim: optimizer and schedule.
    """

    task: ClassVar[str]  # as it stands in the command, and where `simmim.finetune.run` finds it

    freeze: bool = False
    train_stages: int | None = None
    steps: int | None = None
    validations: int = 10
    patience: int | None = None
    encoder: EncoderSettings = EncoderSettings()
    optim: OptimSettings = OptimSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("steps", "validations", "patience", "train_stages"))
        scratch = self.init == "none"
        if not scratch and (self.encoder.like or self.encoder.preset):
            raise ValueError("encoder.like and encoder.preset describe an encoder from scratch: use them with --init none")
        if self.freeze and scratch:
            raise ValueError("--freeze with --init none would train a head on random features: give an encoder by --init")
        if self.train_stages and scratch:
            raise ValueError("--train-stages with --init none would keep random features: give an encoder by --init")
        if self.train_stages and self.freeze:
            raise ValueError("--freeze trains the head alone and --train-stages more than that: give one of them")

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
