"""A fine-tuning run: prepare the task, train, keep the best model."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn

from simmim.checkpoints.own_files import update_provenance
from simmim.data.duplicates import report_shared
from simmim.encoders.base import Encoder
from simmim.finetune.averaging import AverageWeights, whole
from simmim.finetune.early_stop import StopEarly
from simmim.finetune.freezing import KeepFrozen, frozen_parts
from simmim.finetune.registry import task_named
from simmim.finetune.settings import TransferSettings
from simmim.finetune.task import PreparedTask
from simmim.messages import counted, notify, without_notices
from simmim.training.devices import device_type
from simmim.training.module import TrainingModule
from simmim.training.optim import REFERENCE_BATCH
from simmim.training.run import TrainingRun, check_before_start, run_training
from simmim.training.run_folder import CONFIG, as_yaml
from simmim.training.saving import SavePolicy
from simmim.training.shared_images import pretraining_images
from simmim.training.streams import ValidatedStreamData
from simmim.training.trainer import is_first_process, machine

MIN_STEPS_PER_CHECKPOINT = 50
NAMED_CLASSES = 8  # in the summary


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        run: the run folder.
        metrics: validation metrics after the last step, by the names under which they are logged.
        monitor: the metric by which the best model was chosen.
        best: its best value, that of the model in `run`/encoder, in [0, 1].
        num_validations: of which `best` is the best one. The best of many is higher than new images would give.
    """

    run: Path
    metrics: dict[str, float]
    monitor: str
    best: float
    num_validations: int = 1

    @property
    def score(self) -> float:
        """The value of `monitor` after the last step, in [0, 1]."""
        return self.metrics[self.monitor]

    @property
    def accuracy(self) -> float:
        """Accuracy after the last step, in [0, 1].

        Raises:
            AttributeError: when the task measures none, as segmentation.
        """
        if "accuracy" not in self.metrics:
            raise AttributeError(f"this task has no accuracy: take score, its {self.monitor}, or one of {[*self.metrics]}")
        return self.metrics["accuracy"]


def finetune(settings: TransferSettings, quiet: bool = False) -> FinetuneResult:
    """Fine-tune an encoder on labeled images; the run folder's encoder/ holds the best model.

    Args:
        settings: of any task.
        quiet: print nothing and show no progress, for runs in series.

    Raises:
        ValueError: for settings, labels or an encoder that cannot work, before anything is written.
    """
    check_before_start(settings)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    with without_notices() if quiet else contextlib.nullcontext():
        prepared = task_named(settings.task).prepare(settings, device_type(), None if quiet else print)
    if not quiet and is_first_process():
        report_shared_images(prepared)
        report_test_choice(prepared)
    best = KeepBest(prepared)
    run = training_run(prepared, best, quiet)
    finished = run_training(run)
    result = FinetuneResult(run.folder, finished.metrics, prepared.monitor, best.value, best.num_validations)
    if finished.trainer.is_global_zero and not quiet:
        print(closing_text(prepared, result))
    return result


def report_shared_images(prepared: PreparedTask) -> None:
    """Notices of validation images that are also among the training images, or among those that the encoder has seen."""
    init = prepared.settings.init
    # The labeled ones alone: from unlabeled images those that validate are left out.
    others = {"the training images": prepared.train.sources[0]}
    if init != "none":
        others[f"the pre-training images of {init}"] = pretraining_images(init)
    report_shared(prepared.validation.source, others)


def report_test_choice(prepared: PreparedTask) -> None:
    """A notice where a part that is called test chooses the model."""
    validations = prepared.settings.validations
    if prepared.test_validates and validations > 1:
        notify(
            f"the test part of {prepared.settings.data.path!r} validates, for there is no other, and chooses the best of "
            f"{validations} models: the best figure is higher than new images would give. Add a validation part, or give "
            "validations: 1 to keep the last model"
        )


def training_run(prepared: PreparedTask, best: KeepBest, quiet: bool) -> TrainingRun:
    """The run of a prepared task, ready to be trained. Freezes what is not to be trained.

    Raises:
        ValueError: when the encoder does not have the stages that are to be trained.
    """
    settings, encoder = prepared.settings, cast(Encoder, prepared.module.model.encoder)
    num_images = len(prepared.train)
    num_steps = settings.num_steps(num_images)
    steps_per_validation = num_steps / settings.validations
    return TrainingRun(
        settings=settings,
        module=prepared.module,
        data=ValidatedStreamData(
            prepared.train,
            settings.batch_size,
            settings.optim.accumulate,
            settings.workers,
            prepared.validation,
            prepared.validation_batch_size,
        ),
        num_images=prepared.train.num_images,
        num_steps=num_steps,
        loss=prepared.loss,
        save=SavePolicy(every_steps=max(MIN_STEPS_PER_CHECKPOINT, round(steps_per_validation)), keep_best=False),
        summary=partial(summary, prepared, num_steps),
        title="fine-tuning",
        callbacks=(
            KeepFrozen(frozen_parts(encoder, settings.freeze, settings.train_stages)),
            *prepared.callbacks,
            best,  # before the average leaves the model: what was validated is exported
            *averaging(prepared),
            *([StopEarly(prepared.monitor, settings.patience)] if settings.patience else []),
        ),
        max_skipped_share=0.0 if settings.data.strict else settings.data.max_skipped_share,
        # A single validation is the one after the last step.
        validate_every_steps=math.ceil(steps_per_validation) if settings.validations > 1 else num_steps + 1,
        monitor=prepared.monitor,
        quiet=quiet,
    )


def averaging(prepared: PreparedTask) -> list[AverageWeights]:
    """What averages the weights: the task's own, a plain average, or nothing."""
    if prepared.average is not None:
        return [prepared.average]
    decay = prepared.settings.optim.ema
    return [AverageWeights(decay)] if decay else []


class KeepBest(pl.Callback):
    """Exports the model whenever its validation metric is the best so far; of equal ones the first is kept. The export
    records of how many validations it is the best."""

    def __init__(self, prepared: PreparedTask) -> None:
        self.prepared, self.folder = prepared, Path(prepared.settings.out).expanduser()
        self.value = -1.0
        self.num_validations, self.last_step = 0, -1
        self.whole_model: nn.Module | None = None  # receives the weights of a model that is divided among devices

    def setup(self, trainer: pl.Trainer, module: TrainingModule, stage: str) -> None:
        """Copy the model's structure before the model is divided."""
        if stage == "fit" and isinstance(trainer.strategy, ModelParallelStrategy):
            self.whole_model = copy.deepcopy(module.model)

    def state_dict(self) -> dict:
        """The best value, and how many validations there were, for a resumed run."""
        return {"value": self.value, "num_validations": self.num_validations, "last_step": self.last_step}

    def load_state_dict(self, state: dict) -> None:
        """Restore them; runs of earlier versions have not counted, and count from here on."""
        self.value = state["value"]
        self.num_validations, self.last_step = state.get("num_validations"), state.get("last_step", -1)

    def count(self, step: int) -> None:
        """Count the validation after `step`; a second one of the same weights is no further look."""
        if self.num_validations is None:  # at even distances before
            settings = self.prepared.settings
            self.num_validations = math.ceil(step * settings.validations / settings.num_steps(len(self.prepared.train)))
        elif step != self.last_step:
            self.num_validations += 1
        self.last_step = step

    def on_validation_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Export the model if it is better than all before, in training and after it."""
        self.count(trainer.global_step)
        validation = {"validation": f"{best_of(self.num_validations)}, on {counted(len(self.prepared.validation), 'image')}"}
        value = float(trainer.callback_metrics[self.prepared.monitor])
        if value <= self.value:
            if trainer.is_global_zero:
                update_provenance(self.folder / "encoder", validation)
            return
        self.value = value
        model = module.model
        if self.whole_model is not None:
            # On every process, as each has a part.
            self.whole_model.load_state_dict({name: whole(part) for name, part in model.state_dict().items()})
            model = self.whole_model
        if trainer.is_global_zero:
            origin = {**provenance(self.prepared), "steps": trainer.global_step, self.prepared.monitor: self.value}
            origin |= validation
            self.prepared.save(self.folder / "encoder", model, provenance=origin)
            self.prepared.report(self.folder, module)


def validations_of(num_steps: int, validations: int) -> int:
    """How many validations a run has: those asked for, fewer where there are not as many steps, or where even distances
    between them leave some out."""
    return math.ceil(num_steps / math.ceil(num_steps / validations))


def best_of(num_validations: int) -> str:
    """Of which validation a figure is."""
    return f"best of {num_validations} validations" if num_validations > 1 else "the only validation"


def provenance(prepared: PreparedTask) -> dict:
    """Where an exported model comes from."""
    from simmim import __version__

    settings, source = prepared.settings, prepared.source
    return {
        "toolkit": f"simmim {__version__}",
        "method": settings.task,
        "data": Path(settings.data.path).name,
        "images": len(prepared.train),
        "encoder": "from scratch" if settings.init == "none" else (source.provenance or {"file": source.source.name}),
        **prepared.provenance,
        "epochs": settings.epochs,
        "weights": f"moving average of decay {settings.optim.ema:g}" if settings.optim.ema else "as trained",
        "seed": settings.seed,
    }


def trained_text(stages: int | None) -> str:
    """For the summary, where a part of the encoder is trained: of the stages the last ones."""
    return f", the last {'stage' if stages == 1 else counted(stages, 'stage')} trained" if stages else ""


def summary(prepared: PreparedTask, num_steps: int, trainer: pl.Trainer, checkpoint: Path | None) -> str:
    """The resolved configuration, the run in a few lines, and the reasons of what was chosen.

    Args:
        num_steps: optimizer steps.
        checkpoint: that the run resumes from; None for a fresh start.
    """
    settings, model, classes = prepared.settings, prepared.module.model, prepared.classes
    encoder = cast(Encoder, model.encoder)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    names = ", ".join(classes[:NAMED_CLASSES]) + (", …" if len(classes) > NAMED_CLASSES else "")
    peak = settings.optim.lr * settings.batch_size / REFERENCE_BATCH
    planned = validations_of(num_steps, settings.validations)
    kind, _, values = prepared.validation.reading.describe().partition(" ")
    lines = [
        f"# {settings.out}/{CONFIG}",
        as_yaml(settings).rstrip(),
        "",
        f"labels   {counted(len(prepared.train), 'image')} to train on, {len(prepared.validation):,} to validate with, "
        f"{counted(len(classes), 'class')}: {names}",
        *([f"{kind:<8} {values}"] if values else []),
        *([f"keeps    the {best_of(planned)}"] if planned > 1 else []),
        f"encoder  {'from scratch' if settings.init == 'none' else settings.init}"
        f"{', frozen' if settings.freeze else ''}"
        f"{trained_text(settings.train_stages)}"
        f", {parameters:.2f} M parameters trained",
        f"training {counted(settings.epochs, 'epoch')}, {counted(num_steps, 'step')} of "
        f"{counted(settings.batch_size, 'image')}, peak learning rate {peak:.3g}, "
        f"layer decay {settings.optim.layer_decay:g}, {settings.precision} on {machine(trainer, encoder)}",
        *(f"chosen   {reason}" for reason in prepared.reasons),
    ]
    if checkpoint:
        lines.append(f"resuming from {checkpoint}")
    return "\n".join(lines)


def closing_text(prepared: PreparedTask, result: FinetuneResult) -> str:
    """The result, what the task says of its best model, and where that model is."""
    look, table = best_of(result.num_validations), prepared.closing_text(result.run)
    heading = f"of the {look}, which is higher than new images would give:\n" if result.num_validations > 1 and table else ""
    return (
        f"{result.monitor} {result.score:.1%} at the end, {result.best:.1%} {look}, on "
        f"{counted(len(prepared.validation), 'validation image')}\n{heading}{table}best model: {result.run / 'encoder'}\n"
        f"use it: simmim predict --run {result.run} --images PATH --out PREDICTIONS"
    )
