"""A pre-training run: look at the images, resolve the settings, train, export the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy

from simmim.checkpoints import read
from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import build_encoder
from simmim.checkpoints.own_files import save_checkpoint
from simmim.checkpoints.weight_files import read_torch_file
from simmim.data import (
    CenterView,
    ImageSamples,
    ImageStatistics,
    Source,
    default_num_workers,
    hold_out,
    measure_for_encoder,
    measure_images,
    open_source,
)
from simmim.data.kept_pictures import KeptPictures
from simmim.data.label_map_sources import note_on_label_maps
from simmim.data.tiles import TilePlan, measure_tiles, plan_tiles, sample_tiles
from simmim.encoders import registry
from simmim.methods.base import Method
from simmim.methods.registry import default_method, method_named
from simmim.pretrain.calibration import (
    DEFAULT_S,
    LONG_S,
    WARM_UP_STEPS,
    chosen_line,
    epochs_in,
    estimate_line,
    is_short,
    num_processes,
    parse_length,
    run_seconds,
    seconds_per_step,
)
from simmim.pretrain.image_sizes import at_sizes, by_size, step_shares
from simmim.pretrain.keeping import prepare, resolve_cache
from simmim.pretrain.labeled_probe import LabeledProbe
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.reconstructions import Reconstructions
from simmim.pretrain.resolve import resolve_settings
from simmim.pretrain.samples import random_views, training_samples
from simmim.pretrain.settings import DataSettings, OptimSettings, PretrainSettings, ProbeSettings, settings_class
from simmim.pretrain.summary import closing_lines, provenance, size_reason, summary
from simmim.pretrain.validation import HeldOutLoss, default_steps_between
from simmim.reading import AUTO, Reading
from simmim.training.activations import ActivationMonitor
from simmim.training.empty_tiles import EmptyTiles
from simmim.training.loggers import LossNames
from simmim.training.run import KEEP_DECODED_MIB, TrainingRun, check_before_start, run_training
from simmim.training.run_folder import CONFIG, checkpoints_folder
from simmim.training.saving import SavedModel, SavePolicy, usable_checkpoint
from simmim.training.shared_images import report_shared
from simmim.training.streams import StreamData
from simmim.training.trainer import default_precision, device_type, is_first_process

if TYPE_CHECKING:
    import datasets

VALIDATION_TILES = 1024  # of the images held out, at most: they are measured up to fifty times


class Resolved(NamedTuple):
    """What a run is made of, once everything that the user left open is filled in.

    Attributes:
        settings: complete.
        source: the images to train on.
        keep_decoded: whether images stay in memory once they are decoded.
        initial: the checkpoint that the weights start from; None for fresh ones.
        held_out: the images to validate with, which `source` does not have; None where there are none.
        short_side_px: of the images' files.
        tiles: those of the images, where they are read by tiles.
        kept: images that are kept shrunk on disk; None where none are.
        statistics: of a sample of the images.
    """

    settings: PretrainSettings
    source: Source
    keep_decoded: bool
    initial: Checkpoint | None
    held_out: datasets.Dataset | None = None
    short_side_px: int = 0
    tiles: TilePlan | None = None
    kept: KeptPictures | None = None
    statistics: ImageStatistics | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps that see each image once."""
        return self.source.num_images / self.settings.batch_size

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of some epochs, at least 1."""
        return max(1, round(epochs * self.steps_per_epoch))


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
    run = training_run(resolved, method, notes, [*size_reason(given, resolved.short_side_px, device_type()), *length])
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
        view, options = CenterView(settings.size), (False, data.max_pixels, data.reading)
        samples = ImageSamples(resolved.source.head, view, data.channels, settings.seed, *options)
        callbacks.append(Reconstructions(samples, folder, resolved.steps_in(settings.reconstruct_every_epochs)))
    if resolved.tiles is not None:
        callbacks.append(EmptyTiles(resolved.tiles.settings.max_background))
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


def resolve_length(settings: PretrainSettings) -> tuple[Resolved, list[str]]:
    """`resolve_run`, with as many epochs as fit into the time that is given, or on a CPU into an hour where neither time nor
    epochs are; and lines about the time that the run takes. A run that is resumed keeps its epochs.

    Raises:
        ValueError: for a time that is none, is given with epochs, or for several devices; as `resolve_run`.
    """
    seconds = None if settings.time is None else parse_length(settings.time)
    device = str(settings.trainer.get("accelerator", "auto"))
    device = device if device in WARM_UP_STEPS else device_type()
    if settings.resume and (Path(settings.out).expanduser() / CONFIG).is_file():
        if settings.epochs is None:
            settings = replace(settings, epochs=read_settings(settings.out).epochs)
        return resolve_run(settings), []
    if seconds is not None and settings.epochs is not None:
        raise ValueError(f"both time {settings.time} and epochs {settings.epochs:g} are given: give one of them")
    is_single = num_processes(settings, device) == 1
    if seconds is not None and not is_single:
        raise ValueError(f"time is {settings.time} and there are several devices, which it does not measure: give epochs")
    found = look(settings)
    resolved = fill_in(settings, found)
    num_images, batch_size = resolved.source.num_images, resolved.settings.batch_size
    if not is_single or (seconds is None and is_short(resolved.settings, num_images)):
        return resolved, []
    step_s = measure_step(resolved, device)
    by_default = seconds is None and settings.epochs is None and device == "cpu"
    if by_default and run_seconds(resolved.settings, num_images, step_s) > LONG_S:
        seconds = DEFAULT_S
    chosen = []
    if seconds is not None:
        epochs = epochs_in(seconds, step_s, batch_size, num_images)
        chosen = [chosen_line(resolved.settings, epochs, num_images, step_s)]
        resolved = fill_in(replace(settings, epochs=epochs), found)
    return resolved, [*chosen, f"time     {estimate_line(resolved.settings, num_images, step_s)}"]


def measure_step(resolved: Resolved, device: str) -> float:
    """Seconds of an optimizer step of a run, which draws nothing that the run would; the mean where images grow."""
    data, seconds = resolved.settings.data, []
    for settings in at_sizes(resolved.settings):
        with torch.random.fork_rng(devices=[]):
            method = build_method(settings)
            module = PretrainingModule(method, data.mean, data.std, lambda step: 0.0, 0.0, settings.optim.clip)
        view, *further = random_views(settings)
        options = (data.channels, settings.seed, resolved.keep_decoded, data.max_pixels, data.reading, further)
        seconds.append(seconds_per_step(module, ImageSamples(resolved.source.head, view, *options), settings, device))
    return sum(share * each for share, each in zip(step_shares(resolved.settings), seconds))


class Found(NamedTuple):
    """What a run finds: images, machine, and the encoder to start from. None of it depends on the run's length.

    Attributes:
        source, held_out, tiles, keep_decoded, statistics, initial: those of `Resolved`.
        device: cuda, mps or cpu.
    """

    source: Source
    held_out: datasets.Dataset | None
    tiles: TilePlan | None
    keep_decoded: bool
    statistics: ImageStatistics
    initial: Checkpoint | None
    device: str


def resolve_run(settings: PretrainSettings) -> Resolved:
    """Look at the images, the machine and the encoder to start from, and fill in what the user left open."""
    return fill_in(settings, look(settings))


def look(settings: PretrainSettings) -> Found:
    """Open the images, measure a sample of them, and read the encoder to start from."""
    # A run that is resumed no longer needs the encoder it started from, which may be gone.
    has_checkpoint = settings.resume and any(checkpoints_folder(Path(settings.out).expanduser()).glob("*.ckpt"))
    initial = read(settings.init) if settings.init != "none" and not has_checkpoint else None
    if initial is not None:
        initial.config.check_pretraining()
    data = settings.data
    reading = open_reading(settings, initial, resumes=has_checkpoint)
    source, held_out = open_source(data.path, data.column, data.streaming, data.count, reading), None
    if data.validation is not None:
        source, held_out = hold_out(source, data.validation, settings.seed)
    plan = tile_plan(data, source.images, reading)
    of_initial = data.range == "auto" and initial is not None
    source, images = measure_source(settings, source, plan, reading, measure_for_encoder if of_initial else measure_images)
    keep_decoded = images.decoded_mib <= KEEP_DECODED_MIB and not source.streaming and plan is None
    return Found(source, held_out, plan, keep_decoded, images, initial, device_type())


def fill_in(settings: PretrainSettings, found: Found) -> Resolved:
    """What a run is made of, by its settings and what it finds."""
    source, held_out, tiles, keep_decoded, images, initial, device = found
    # Images that are in memory already are cropped faster than they could be sent between processes.
    workers = 0 if keep_decoded and device == "cpu" else default_num_workers(device)
    settings = resolve_settings(settings, images, source.num_images, device, workers, initial)
    precision = settings.precision or default_precision(device, settings.encoder_config())
    settings = replace(settings, precision=precision)
    if held_out is not None and settings.validate_every_epochs is None:
        num_steps = max(1, round(settings.epochs * source.num_images / settings.batch_size))
        every_steps = default_steps_between(num_steps, len(held_out), settings.batch_size)
        settings = replace(settings, validate_every_epochs=every_steps * settings.batch_size / source.num_images)
    may_keep = not (source.streaming or keep_decoded or tiles)
    settings, kept = resolve_cache(settings, source, images, random_views(settings) if may_keep else [])
    return Resolved(settings, source, keep_decoded, initial, held_out, images.short_side_px, tiles, kept, images)


def tile_plan(data: DataSettings, images: datasets.Dataset, reading: Reading) -> TilePlan | None:
    """The tiles that the settings ask for; None where images are read whole."""
    if data.tiles is None:
        return None
    return plan_tiles(images, data.tiles, reading, data.max_pixels, 0.0 if data.strict else data.max_skipped_share)


def measure_source(
    settings: PretrainSettings,
    source: Source,
    plan: TilePlan | None,
    reading: Reading,
    measure: Callable[..., ImageStatistics],
) -> tuple[Source, ImageStatistics]:
    """The source of a run, of whose tiles there are some by number, and its statistics."""
    data = settings.data
    if plan is None:
        options = {"channels": data.channels, "max_pixels": data.max_pixels, "num_images": source.num_images}
        return source, measure(source.head, reading=reading, **options)
    measured = measure_tiles(source.images, plan, settings.seed, reading, data.channels, data.max_pixels, measure)
    return Source(source.images, len(plan), measured.tiles, streaming=False), measured.statistics


def open_reading(settings: PretrainSettings, initial: Checkpoint | None, resumes: bool) -> Reading:
    """How files become pictures as the settings say; what they leave open is as in the run that is resumed, or as in the
    encoder to start from."""
    reading, known = settings.data.reading, None
    if resumes and (Path(settings.out).expanduser() / CONFIG).is_file():
        known = read_settings(settings.out).data.reading
    elif initial and initial.preprocessing.reading:
        known = initial.preprocessing.reading
        known = known if known.is_deep else replace(known, range="auto")
    if known is None:
        return reading
    left_open = {name: value for name, value in vars(known).items() if getattr(reading, name) == getattr(AUTO, name)}
    return replace(reading, **left_open)


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
    view = CenterView(settings.size)
    samples = ImageSamples(images, view, data.channels, settings.seed, False, data.max_pixels, data.reading)
    every_steps = resolved.steps_in(settings.validate_every_epochs)
    return HeldOutLoss(samples, every_steps, settings.model.images_per_input, settings.workers)


def build_method(settings: PretrainSettings) -> Method:
    """The method of resolved settings with its encoder, freshly initialized."""
    model = settings.model
    encoder = registry.build(settings.encoder_config(), model.checkpoint_activations, model.sequential_attention)
    return method_named(settings.method).build(encoder, model)


def load_initial_weights(method: Method, source: Checkpoint) -> str:
    """Load the weights of `source` into `method`, those of the method among them where it has them and they fit.

    Returns:
        The report, with one line each for what was loaded, adapted, missing and unexpected.
    """
    config = method.encoder.config
    saved = build_encoder(source, **{name: getattr(config, name) for name in vars(config)})
    method.encoder.load_state_dict(saved.encoder.state_dict())
    report, shapes = str(saved.report), {name: tuple(value.shape) for name, value in source.pretraining.items()}
    if source.pretraining and source.method != method.name:
        report += f"\nadapted    {method.own_parts} are fresh: the source was trained by {source.method}"
    elif source.pretraining and shapes != {name: tuple(value.shape) for name, value in method.own_state().items()}:
        report += f"\nadapted    {method.own_parts} are fresh: those of the source are for other channels"
    elif source.pretraining:
        report += f"\nloaded     {method.load_own_state(source.pretraining, source.provenance)}"
    method.weights_loaded()
    return report


def load_pretrained(run: str | Path) -> tuple[Method, PretrainSettings]:
    """A run's whole model, with mask token and head, from its last checkpoint, and its settings.

    Raises:
        ValueError: when `run` holds no pre-training run or no checkpoint yet.
    """
    settings = read_settings(run)
    checkpoint = usable_checkpoint(Path(run).expanduser())
    if checkpoint is None:
        raise ValueError(f"run {str(run)!r} has no checkpoint yet: expected some in {checkpoints_folder(Path(run))}")
    model = build_method(settings)
    state = read_torch_file(checkpoint)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model.eval(), settings


def read_settings(run: str | Path) -> PretrainSettings:
    """The settings a run was started with.

    Raises:
        ValueError: when `run` holds no pre-training run.
    """
    import yaml

    path = Path(run).expanduser() / CONFIG
    if not path.is_file():
        raise ValueError(f"no run at {str(run)!r}: expected {path}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "model" not in values:
        raise ValueError(f"run {str(run)!r} is no pre-training run")
    method = values.get("method", default_method())
    groups = {
        "data": DataSettings,
        "model": method_named(method).settings_class,
        "optim": OptimSettings,
        "probe": ProbeSettings,
    }
    stored = {name: {**getattr(kind, "earlier", {}), **values.get(name, {})} for name, kind in groups.items()}
    given = {**values, **{name: kind(**stored[name]) for name, kind in groups.items()}}
    return settings_class(method)(**given)
