"""A pre-training run: train as prepared, watch, save, export the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.own_files import save_checkpoint
from simmim.data import (
    EvaluationView,
    ImageSamples,
)
from simmim.data.duplicates import report_shared
from simmim.data.label_map_sources import note_on_label_maps
from simmim.data.tiles import sample_tiles
from simmim.methods.base import Method
from simmim.pretrain.image_sizes import at_sizes, by_size
from simmim.pretrain.keeping import prepare
from simmim.pretrain.labeled_probe import LabeledProbe
from simmim.pretrain.model import build_method, load_initial_weights
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.pace import PlanWatch
from simmim.pretrain.preparation import Resolved, resolve_length, tile_plan
from simmim.pretrain.reconstructions import Reconstructions
from simmim.pretrain.samples import training_samples
from simmim.pretrain.settings import PretrainSettings
from simmim.pretrain.summary import closing_lines, provenance, size_reason, summary
from simmim.pretrain.validation import HeldOutLoss
from simmim.training.activations import ActivationMonitor
from simmim.training.devices import device_type
from simmim.training.empty_tiles import EmptyTiles
from simmim.training.loggers import LossNames
from simmim.training.run import TrainingRun, check_before_start, run_training
from simmim.training.saving import SavedModel, SavePolicy
from simmim.training.streams import StreamData
from simmim.training.trainer import is_first_process

VALIDATION_TILES = 1024  # of the images held out, at most: they are measured up to fifty times


def pretrain(settings: PretrainSettings) -> Path:
    """Pre-train an encoder and return its run folder.

    The folder holds config.yaml, checkpoints/last.ckpt, encoder/ (see `simmim.load_encoder`), tensorboard/,
    metrics.csv, reconstructions/ and, where images were skipped, skipped-images.txt.

    Raises:
        ValueError: for settings or images that cannot work, before anything is written.
    """
    given = settings
    check_before_start(settings)
    resolved, length = resolve_length(settings)
    settings = resolved.settings
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    method = build_method(settings)
    notes = [load_initial_weights(method, resolved.initial)] if resolved.initial else []
    length = [*size_reason(given, settings, resolved.short_side_px, device_type()), *length]
    run = training_run(resolved, method, notes, length)
    finished = run_training(run)
    if finished.trainer.is_global_zero:
        for line in closing_lines(run):
            print(line)
        print(f"encoder: {run.folder / 'encoder'}\nlook at it: tensorboard --logdir {run.folder / 'tensorboard'}")
    return run.folder


def training_run(resolved: Resolved, method: Method, notes: list[str], length: Sequence[str] = ()) -> TrainingRun:
    """The run as `simmim.training.run` takes it.

    Args:
        notes: lines to print before the summary.
        length: lines about the time that the run takes, to print after it.
    """
    settings, source = resolved.settings, resolved.source
    data, optim = settings.data, settings.optim
    preprocessing = Preprocessing(settings.size, data.mean, data.std, reading=data.reading)
    num_steps = resolved.steps_in(settings.epochs)
    probe, validation = labeled_probe(resolved, preprocessing), held_out_loss(resolved)
    schedule = settings.schedule().by_step(resolved.steps_per_epoch, settings.batch_size)

    def check(trainer: pl.Trainer) -> None:
        check_batch(settings, trainer.world_size)
        check_method(settings, method, trainer)
        if probe and (trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy)):
            probe.read()

    def text(trainer: pl.Trainer, resumed: Path | None) -> str:
        masks = note_on_label_maps(data.path)
        keeping = [prepare(resolved.kept, source, resolved.statistics)] if resolved.kept and resolved.statistics else []
        lines = [*notes, summary(settings, method, source.num_images, num_steps, trainer, resumed, probe, validation)]
        lines += [*length, *keeping, *([f"note     {masks}"] if masks else [])]
        return "\n".join(lines)

    return TrainingRun(
        settings=settings,
        module=PretrainingModule(method, data.mean, data.std, schedule, optim.weight_decay, optim.clip, by_size(settings)),
        data=StreamData(training_samples(resolved, num_steps), settings.batch_size, optim.accumulate, settings.workers),
        num_images=source.num_images,
        num_steps=num_steps,
        loss=LossNames(method.loss_name, method.loss_description),
        save=SavePolicy(
            settings.save_every_steps,
            settings.save_every_minutes,
            settings.keep_checkpoints,
            export=encoder_export(settings, method, preprocessing, source.num_images),
            judge=validation.loss_at if validation else None,
        ),
        summary=text,
        title="pre-training",
        callbacks=stage_callbacks(resolved, method, probe, validation),
        check=check,
        max_skipped_share=0.0 if data.strict else data.max_skipped_share,
        monitor="validation_loss" if validation else None,
        num_image_sizes=len(at_sizes(settings)),
    )


def check_batch(settings: PretrainSettings, world: int) -> None:
    """Check that every forward pass takes whole inputs of the encoder, the same ones on any number of devices.

    Raises:
        ValueError: when images that belong together would be on different devices or in different passes.
    """
    images, accumulate = settings.model.images_per_input, settings.optim.accumulate
    if settings.batch_size % (images * world * accumulate):
        raise ValueError(
            f"batch_size is {settings.batch_size} on {world} device{'s' * (world != 1)} × {accumulate} accumulated batches, "
            f"and the encoder takes {images} images as one: give a multiple of {images * world * accumulate}"
        )


def check_method(settings: PretrainSettings, method: Method, trainer: pl.Trainer) -> None:
    """Check that the method can train with this strategy and precision, and on as many images at once.

    Raises:
        ValueError: naming what it needs.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy) and not method.supports_sharding:
        raise ValueError(f"trainer.strategy divides the weights, which method {method.name} does not support: give ddp")
    at_once, needed = settings.batch_size // settings.optim.accumulate, settings.model.smallest_batch
    if at_once < needed:
        raise ValueError(
            f"batch_size is {settings.batch_size} in {settings.optim.accumulate} accumulated batches, and method "
            f"{method.name} compares images of one batch: give {needed * settings.optim.accumulate} images or more"
        )


def stage_callbacks(
    resolved: Resolved, method: Method, probe: LabeledProbe | None, validation: HeldOutLoss | None
) -> tuple[pl.Callback, ...]:
    """Pictures where the method predicts pixels, measures of activations, and where there are some probe and validation."""
    settings, folder = resolved.settings, Path(resolved.settings.out).expanduser()
    callbacks: list[pl.Callback] = []
    if method.predicts_pixels:
        data = settings.data
        view, options = EvaluationView(settings.size), (False, data.max_pixels, data.reading)
        samples = ImageSamples(resolved.source.head, view, data.channels, settings.seed, *options)
        callbacks.append(Reconstructions(samples, folder, resolved.steps_in(settings.reconstruct_every_epochs)))
    if resolved.tiles is not None:
        callbacks.append(EmptyTiles(resolved.tiles.settings.max_background))
    if resolved.planned_s is not None and settings.image_sizes is None:  # steps on small images are faster than the mean
        callbacks.append(PlanWatch(resolved.planned_s, settings.epochs, settings.time))
    callbacks.append(ActivationMonitor(folder, resolved.steps_in(settings.activations_every_epochs)))
    return (*callbacks, *(part for part in (probe, validation) if part))


def encoder_export(
    settings: PretrainSettings, method: Method, preprocessing: Preprocessing, num_images: int
) -> Callable[[SavedModel], None]:
    """A function that refreshes RUN/encoder from a checkpoint's weights."""
    folder, own_names = Path(settings.out).expanduser(), tuple(method.own_state())
    # Of the last size where images grow, whatever size the step has.
    config, of_method = method.encoder.config, method.provenance()

    def export(saved: SavedModel) -> None:
        weights = {name.removeprefix("model."): value for name, value in saved.weights.items()}
        own = {name: weights[name] for name in own_names}
        prefix = "encoder."
        encoder = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        origin = provenance(settings, of_method, num_images, saved.step)
        if saved.mean_loss is not None:
            origin["loss"] = round(saved.mean_loss, 5)
        if saved.validation_loss is not None:
            origin["validation_loss"] = round(saved.validation_loss, 5)
        trained = Checkpoint(config, encoder, preprocessing, folder, provenance=origin, method=method.name, pretraining=own)
        save_checkpoint(folder / "encoder", trained)

    return export


def labeled_probe(resolved: Resolved, preprocessing: Preprocessing) -> LabeledProbe | None:
    """The probe that resolved settings ask for; None where they do not."""
    settings = resolved.settings
    if settings.probe.data is None:
        return None
    every_steps, config = resolved.steps_in(settings.probe.every_epochs), settings.encoder_config()
    probe = LabeledProbe(settings.probe, settings.seed, preprocessing, config, every_steps, settings.workers)
    if is_first_process() and not resolved.source.streaming:
        others = {"the pre-training images": resolved.source.images}
        report_shared(probe.tested_images(), others, "images of the probe's test")  # type: ignore[arg-type]
    return probe


def held_out_loss(resolved: Resolved) -> HeldOutLoss | None:
    """The validation that resolved settings ask for; None where they do not."""
    settings, data = resolved.settings, resolved.settings.data
    if resolved.held_out is None:
        return None
    images = resolved.held_out
    if is_first_process():
        report_shared(images, {"the pre-training images": resolved.source.images})  # type: ignore[dict-item]
    if plan := tile_plan(data, images, data.reading):
        how = (data.channels, data.max_pixels, data.reading)
        images, _ = sample_tiles(images, plan, VALIDATION_TILES, settings.seed, how)
    view = EvaluationView(settings.size)
    samples = ImageSamples(images, view, data.channels, settings.seed, False, data.max_pixels, data.reading)
    every_steps = resolved.steps_in(settings.validate_every_epochs)
    return HeldOutLoss(samples, every_steps, settings.model.images_per_input, settings.workers)
