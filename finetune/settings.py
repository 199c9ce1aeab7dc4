"""Settings that all tasks of stage 2 share, and how open ones follow from encoder, labels and machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from simmim.defaults import LEAST_STEPS, default_batch_size, default_ema, default_finetuning_epochs
from simmim.reading import AUTO, Reading
from simmim.training.optim import Schedule, lr_by_root
from simmim.training.settings import OptimizerSettings, RunSettings, check_positive

if TYPE_CHECKING:
    from simmim.data.scene_draws import SceneDraw


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder where it is changed or trained from scratch.

    Args:
        preset: size of an encoder from scratch, with init: none.
        like: run or encoder that lends architecture and preprocessing, but no weights, to an encoder from scratch.
        drop_path_rate: stochastic depth, in encoders that have it; by default 0 for fewer than 8 blocks, 0.2 from large on,
            else 0.1, as published.
        window_size: side of the attention windows in tokens, in encoders that have them; by default it grows with the image
            size. The position bias of pre-training is adapted.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.
        sequential_attention: windows that are attended to at a time, in encoders that have them: less memory where images or
            windows are large.
    """

    preset: str | None = None
    like: str | None = None
    drop_path_rate: float | None = None
    window_size: int | None = None
    checkpoint_activations: bool = False
    sequential_attention: int | None = None

    def __post_init__(self) -> None:
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"encoder.window_size is {self.window_size}: give tokens per side, 1 or more")


@dataclass(frozen=True)
class LabeledDataSettings:
    """The labeled images of any task.

    Args:
        path: the labeled images.
        column: holds the images, in sources with columns; detected by default.
        strict: stop at the first image that cannot be read.
        max_skipped_share: stop when a larger share of the training images cannot be read.
        range: of values deeper than 8 bits, as data.range of pretrain, from scratch. An encoder that was trained before
            brings its own.
        transform: of such values, as data.transform of pretrain, from scratch.
        pages: as data.pages of pretrain; as for the encoder by default.
        channel_files: as data.channel_files of pretrain; as for the encoder by default.
        channels_used: as data.channels_used of pretrain; those of the encoder by default.
        channel_names: as data.channel_names of pretrain; those of the encoder by default.
    """

    path: str
    column: str | None = None
    strict: bool = False
    max_skipped_share: float = 0.05
    range: tuple[tuple[float, float], ...] | str = "auto"
    transform: str = "none"
    pages: str | None = None
    channel_files: str | None = None
    channels_used: tuple[int | str, ...] | None = None
    channel_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in vars(self.reading).items():
            if hasattr(self, name):
                object.__setattr__(self, name, value)

    @property
    def reading(self) -> Reading:
        """How files become pictures, as far as it is given.

        Raises:
            ValueError: for settings that are none.
        """
        given = {field.name: getattr(self, field.name) for field in fields(Reading) if hasattr(self, field.name)}
        return replace(AUTO, **given)


@dataclass(frozen=True)
class ScenesSettings(LabeledDataSettings):
    """Labeled images of a task whose labels are places in the image.

    Args:
        fold: cross-validation, as (part, number of parts): train on the labeled images of all parts but this one, counted
            from 0, and validate with it. The validation images are not used.
        pool: (part, number of parts): draw labels from this part of the training images alone, so that runs of other parts
            share none. The parts are drawn once.
        validation_seed: draws the fifth of the images to validate with, where there is no validation part; by default seed
            draws it. A study holds one fifth out for all its runs.
    """

    fold: tuple[int, int] | None = None
    pool: tuple[int, int] | None = None
    validation_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fold", "pool"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
                part, parts = getattr(self, name)
                if not 0 <= part < parts or parts < 2:
                    raise ValueError(f"data.{name} is {(part, parts)}: give (part, parts), 0 <= part < parts, 2 or more")

    def draw(self) -> SceneDraw:
        """How images are drawn, beside their number and the seed."""
        from simmim.data.scene_draws import SceneDraw  # heavy libraries are loaded when used

        return SceneDraw(self.validation_seed, self.pool, self.fold)


@dataclass(frozen=True)
class OptimSettings(OptimizerSettings):
    """AdamW with layer-wise decayed learning rates, given per 512 images of the batch.

    Args:
        lr: peak learning rate of the head; by default 1.25e-3 as published, and for nano and micro a peak of 1.6e-2 at a
            batch of 128 images that grows with the root of the batch.
        lr_factor: factor of `lr`, or of its default.
        layer_decay: factor from each block to the one before it; by default 0.75 as published, 0.65 in classification with
            up to 20 labels per class, and 1 in detection.
        label_smoothing: share of the target spread over all classes.
        warmup_epochs: by default 20, or a fifth of shorter runs.
        ema: decay of the moving average of the weights that is validated and exported, 0 for none; by default an average
            over the last twentieth of the steps, at most 0.9999.
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
        data: the labeled images; in Python a path is enough.
        init: pre-training run or exported encoder to start from, or none for the from-scratch twin.
        freeze: train the head alone.
        train_stages: train the head, the final norm and the last `train_stages` stages of the encoder; all by default.
        image_size: pixels, one number or height and width; the encoder's own by default, in detection a larger one where
            objects would be too small in it.
        epochs: passes over the training images; by default 100, in detection 36, and for a few labels enough for 500 steps
            (1,200 steps of detection on a CPU).
        steps: length in optimizer steps, in place of epochs.
        seed: seed of everything random, the choice of labels included.
        validations: number of validations in the course of the run.
        patience: stop after `patience` validations in a row without a better result; by default the run goes to its end.
        encoder: changes to the encoder.
        optim: optimizer and schedule.
    """

    task: ClassVar[str]  # its name in `simmim.finetune.registry.TASKS`

    data: LabeledDataSettings
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
            raise ValueError("encoder.like and encoder.preset describe an encoder from scratch: use them with init: none")
        if self.freeze and scratch:
            raise ValueError("freeze: true with init: none would train a head on random features: give an encoder by init")
        if self.train_stages and scratch:
            raise ValueError("train_stages with init: none would keep random features: give an encoder by init")
        if self.train_stages and self.freeze:
            raise ValueError("freeze: true trains the head alone and train_stages more than that: give one of them")

    def schedule(self) -> Schedule:
        """The course of the learning rate, once resolved."""
        optim = self.optim
        return Schedule(optim.lr, self.epochs, optim.warmup_epochs, optim.warmup_lr, min_lr=optim.min_lr)

    def num_steps(self, num_images: int) -> int:
        """Optimizer steps of the run, once resolved.

        Args:
            num_images: training images.
        """
        return max(1, round(self.epochs * (num_images / self.batch_size)))

    def learning_rate(self, num_images: int) -> Callable[[int], float]:
        """Learning rate of the head by optimizer step, once resolved.

        Args:
            num_images: training images.
        """
        return self.schedule().by_step(num_images / self.batch_size, self.batch_size)


PUBLISHED_LAYER_DECAY = 0.75
PUBLISHED_LR = 1.25e-3  # per 512 images
SMALL_PEAK_LR, SMALL_BATCH = 1.6e-2, 128  # see `default_lr`
Settings = TypeVar("Settings", bound=TransferSettings)


def default_lr(small: bool, batch_size: int) -> float:
    """Learning rate of the head per 512 images.

    1.25e-3 as published. For encoders narrower than the published ones a peak of 1.6e-2 at a batch of 128 that grows with
    the root of the batch. On groceries with 8 labels per class (200 steps of 128 images, two draws) it was 3 and 8 points
    better than 4e-3 after pre-training, 1 and 3 from scratch, for an encoder of 32 channels at 64 px and micro at 96 px;
    3.2e-2 was 1 point better pre-trained and 2 worse from scratch. On garments, 32 per step, 1.5e-3 to 1.2e-2 were equal.
    """
    return lr_by_root(SMALL_PEAK_LR, SMALL_BATCH, batch_size) if small else PUBLISHED_LR


def resolve_schedule(
    settings: Settings,
    num_images: int,
    device: str,
    small: bool,
    batch_size: int | None = None,
    least_steps: int = LEAST_STEPS,
    layer_decay: float = PUBLISHED_LAYER_DECAY,
    usual_epochs: float | None = None,
) -> Settings:
    """Settings with length, batch size, peak learning rate, layer decay, warm-up and averaging resolved.

    Args:
        num_images: training images.
        device: cuda, mps or cpu.
        small: whether the encoder is of nano's or micro's width.
        batch_size, least_steps, layer_decay, usual_epochs: the task's own, where the user gave none; by default as
            `default_batch_size` and `default_finetuning_epochs` say.

    Raises:
        ValueError: when both epochs and steps are given and differ.
    """
    batch_size = settings.batch_size or min(batch_size or default_batch_size(device, small), num_images)
    epochs = settings.epochs or default_finetuning_epochs(num_images, batch_size, least_steps, usual_epochs)
    if settings.steps:
        epochs = settings.steps * batch_size / num_images
        if settings.epochs and round(settings.epochs * num_images / batch_size) != settings.steps:
            raise ValueError(
                f"both epochs {settings.epochs:g} and steps {settings.steps} are given and differ: give one of them"
            )
    optim = settings.optim
    optim = replace(
        optim,
        lr=(optim.lr if optim.lr is not None else default_lr(small, batch_size)) * optim.lr_factor,
        lr_factor=1.0,
        layer_decay=optim.layer_decay if optim.layer_decay is not None else layer_decay,
        warmup_epochs=optim.warmup_epochs if optim.warmup_epochs is not None else min(20, epochs / 5),
        ema=optim.ema if optim.ema is not None else default_ema(round(epochs * num_images / batch_size)),
    )
    return replace(settings, epochs=epochs, batch_size=batch_size, optim=optim)
