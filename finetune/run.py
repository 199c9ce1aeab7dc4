"""A fine-tuned run put together: read the labels, load or make the encoder, train, keep the best."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.data import default_num_workers, measure_images
from simmim.finetune.averaging import AverageWeights, whole
from simmim.finetune.early_stop import StopEarly
from simmim.finetune.freezing import KeepFrozen, frozen_parts
from simmim.finetune.settings import TransferSettings
from simmim.finetune.start import starting_point
from simmim.finetune.task import Labels, Task
from simmim.training.logs import LossNames
from simmim.training.progress import Throughput
from simmim.training.run import KEEP_DECODED_MIB, TrainingRun, check_before_start, run_training
from simmim.training.run_folder import CONFIG, as_yaml
from simmim.training.saving import SavePolicy
from simmim.training.streams import ValidatedStreamData
from simmim.training.trainer import default_precision, device_type, machine

TASKS = {
    "classification": ("simmim.finetune.classification.task", "Classification"),
    "segmentation": ("simmim.finetune.segmentation.task", "Segmentation"),
}


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        run: its folder.
        metrics: of the validation images at the last step, by the names under which they are logged.
        best: the best value of the metric by which the model in `run`/encoder was chosen, in [0, 1].
    """

    run: Path
    metrics: dict[str, float]
    best: float

    @property
    def accuracy(self) -> float:
        """Of the last step, in [0, 1]."""
        return self.metrics["accuracy"]


def task_of(settings: TransferSettings) -> Task:
    """The task that the settings are for; its libraries are loaded now."""
    module, name = TASKS[settings.task]
    return getattr(import_module(module), name)()


def finetune(settings: TransferSettings, quiet: bool = False) -> FinetuneResult:
    """Fine-tune an encoder on labeled images; the run folder's encoder/ holds the best model.

    Args:
        quiet: print nothing and show no progress, for runs in series.

    Raises:
        ValueError: for settings, labels or an encoder that cannot work, before anything is written.
    """
    check_before_start(settings)
    say = None if quiet else print
    task = task_of(settings)
    labels = task.read(settings)
    device = device_type()
    images = measure_images(labels.train)
    kept = images.decoded_mib <= KEEP_DECODED_MIB

    pl.seed_everything(settings.seed, workers=True, verbose=False)
    start = starting_point(settings, images, device, say)
    settings, reasons = task.completed(start.settings, labels, start.encoder.config, device)
    settings = replace(
        settings,
        workers=settings.workers
        if settings.workers is not None
        else (0 if kept and device == "cpu" else default_num_workers(device)),
        precision=settings.precision or default_precision(device, start.encoder.config),
    )
    accumulate = settings.optim.accumulate
    steps_per_epoch = len(labels.train) / settings.batch_size
    steps = max(1, round(settings.epochs * steps_per_epoch))
    schedule = settings.schedule().by_step(steps_per_epoch, settings.batch_size)
    start = start._replace(settings=settings)
    frozen = frozen_parts(start.encoder, settings.freeze, settings.train_stages)
    module = task.module(settings, start, labels, schedule, say)
    keep_frozen = KeepFrozen(frozen)
    train, validation = task.samples(settings, labels, start.encoder.config.in_channels, kept)

    folder = Path(settings.out).expanduser()
    origin = provenance(settings, len(labels.train), start.source)
    best = KeepBest(folder, task, labels.classes, module.preprocessing, origin)
    run = TrainingRun(
        settings=settings,
        module=module,
        data=ValidatedStreamData(
            train, settings.batch_size, accumulate, settings.workers, validation, task.validation_batch
        ),
        num_images=len(labels.train),
        num_steps=steps,
        loss=LossNames("cross_entropy", "in nats; ln(classes) is a guess"),
        save=SavePolicy(every_steps=max(50, round(steps / settings.validations)), keep_best=False),
        summary=lambda trainer, resumed: summary(settings, module.model, labels, steps, reasons, trainer, resumed),
        title="fine-tuning",
        callbacks=(
            keep_frozen,
            *task.callbacks(settings, folder),
            best,
            *([AverageWeights(settings.optim.ema)] if settings.optim.ema else []),
            *([StopEarly(task.monitor, settings.patience)] if settings.patience else []),
        ),
        throughput=Throughput(settings.batch_size),
        max_skipped_share=0.0 if settings.data.strict else settings.data.max_skipped_share,
        # A single validation is the one after the last step.
        validate_every_steps=-(-steps // settings.validations) if settings.validations > 1 else steps + 1,
        quiet=quiet,
    )
    finished = run_training(run)
    metrics = finished.metrics
    if finished.trainer.is_global_zero and not quiet:
        print(
            f"{task.monitor} {metrics[task.monitor]:.1%} at the end, {best.value:.1%} best, on {len(validation):,} "
            f"validation images\n{task.closing(folder)}best model: {folder / 'encoder'}\n"
            f"use it: simmim predict --run {folder} --images PATH --out PREDICTIONS"
        )
    return FinetuneResult(folder, metrics, best.value)


class KeepBest(pl.Callback):
    """Exports the model whenever its validation metric is the best so far; the first of equals stays."""

    def __init__(
        self, run: Path, task: Task, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
    ) -> None:
        self.run, self.task, self.classes = run, task, classes
        self.preprocessing, self.provenance = preprocessing, provenance
        self.value = -1.0
        self.twin: nn.Module | None = None  # takes the weights of a model that is divided among devices

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Keep a copy of the model's structure while it is in one piece."""
        if stage == "fit" and isinstance(trainer.strategy, ModelParallelStrategy):
            self.twin = copy.deepcopy(module.model)

    def state_dict(self) -> dict:
        """The best value, for a resumed run."""
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        """Take up the best value so far."""
        self.value = state["value"]

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Consider what was just validated, in the course of training or after it."""
        self.consider(module, float(trainer.callback_metrics[self.task.monitor]))

    def consider(self, module: pl.LightningModule, value: float) -> None:
        """Export if better than all before."""
        if value <= self.value:
            return
        self.value = float(value)
        model = module.model
        if self.twin is not None:
            # On every process, as each has a part.
            self.twin.load_state_dict({name: whole(part) for name, part in model.state_dict().items()})
            model = self.twin
        if module.trainer.is_global_zero:
            provenance = {**self.provenance, "steps": module.trainer.global_step, self.task.monitor: self.value}
            self.task.save(self.run / "encoder", model, self.classes, self.preprocessing, provenance)
            self.task.report(self.run, module)


def provenance(settings: TransferSettings, count: int, source: Checkpoint | None) -> dict:
    """What an exported model says of where it comes from."""
    from simmim import __version__

    return {
        "toolkit": f"simmim {__version__}",
        "method": settings.task,
        "data": Path(settings.data.path).name,
        "images": count,
        "encoder": "from scratch" if settings.init == "none" else (source.provenance or {"file": source.source.name}),
        **settings.label_provenance(),
        "epochs": settings.epochs,
        "weights": f"moving average of decay {settings.optim.ema:g}" if settings.optim.ema else "as trained",
        "seed": settings.seed,
    }


def summary(
    settings: TransferSettings,
    model: nn.Module,
    labels: Labels,
    steps: int,
    reasons: list[str],
    trainer: pl.Trainer,
    resumed: Path | None,
) -> str:
    """What is about to happen, why it was so chosen, and the resolved configuration."""
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    names = ", ".join(labels.classes[:8]) + (", …" if len(labels.classes) > 8 else "")
    peak = settings.optim.lr * settings.batch_size / 512
    lines = [
        f"# {settings.out}/{CONFIG}",
        as_yaml(settings).rstrip(),
        "",
        f"labels   {len(labels.train):,} images to train on, {len(labels.validation):,} to validate with, "
        f"{len(labels.classes)} classes: {names}",
        f"encoder  {'from scratch' if settings.init == 'none' else settings.init}"
        f"{', frozen' if settings.freeze else ''}"
        f"{f', the last {settings.train_stages} stages trained' if settings.train_stages else ''}"
        f", {parameters:.2f} M parameters trained",
        f"training {settings.epochs:g} epochs, {steps:,} steps of {settings.batch_size} images, peak learning rate "
        f"{peak:.3g}, layer decay {settings.optim.layer_decay:g}, {settings.precision} on {machine(trainer, model.encoder)}",
        *(f"chosen   {reason}" for reason in reasons),
    ]
    if resumed:
        lines.append(f"resuming from {resumed}")
    return "\n".join(lines)
