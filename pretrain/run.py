"""A pre-training run put together: survey the images, settle what is open, train, leave an encoder behind."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor

from simmim.checkpoints import read
from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing, build_encoder, save_checkpoint
from simmim.checkpoints.weight_files import unpickled
from simmim.data import (
    CenterView,
    ImageSamples,
    RandomView,
    Source,
    StreamedSamples,
    default_num_workers,
    measure_images,
    open_source,
)
from simmim.data.label_map_sources import note_on_label_maps
from simmim.encoders import registry
from simmim.methods.base import Method
from simmim.methods.registry import default_method, method_named
from simmim.pretrain.callbacks import LabeledProbe, Reconstructions
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.settings import DataSettings, OptimSettings, PretrainSettings, ProbeSettings, resolve, settings_class
from simmim.training import (
    ActivationMonitor,
    SaveRun,
    StopOnSignal,
    StreamData,
    TrackStreamPosition,
    build_trainer,
    check_trainer_keys,
    default_precision,
    device_type,
    is_first_process,
    machine,
    per_device_batch,
    shared_callbacks,
    usable_checkpoint,
)
from simmim.training.run_folder import CONFIG, as_yaml, check_run_folder, checkpoints_folder, locked_run_folder

KEEP_DECODED_MIB = 128  # sets that decode to less stay in memory, in each loading process


def pretrain(settings: PretrainSettings) -> Path:
    """Pre-train an encoder and return its run folder.

    The folder holds config.yaml, checkpoints/last.ckpt, encoder/ (see `simmim.load_encoder`), tensorboard/,
    metrics.csv, reconstructions/ and, where images were skipped, skipped-images.txt.

    Raises:
        ValueError: for settings or images that cannot work, before anything is written.
    """
    if is_first_process():
        check_run_folder(settings.out, settings.resume, settings.overwrite)
    check_trainer_keys(settings.trainer)
    settings, source, kept, initial = settled(settings)
    data, accumulate = settings.data, settings.optim.accumulate

    steps_per_epoch = source.num_images / settings.batch_size
    steps = max(1, round(settings.epochs * steps_per_epoch))
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    model = build_model(settings)
    if initial:
        lines = take_weights(model, initial)
    schedule = settings.schedule().by_step(steps_per_epoch, settings.batch_size)
    module = PretrainingModule(model, data.mean, data.std, schedule, settings.optim.weight_decay, settings.optim.clip)
    samples = training_samples(settings, source, kept)
    shown = ImageSamples(source.head, CenterView(settings.size), data.channels, settings.seed)

    run = Path(settings.out).expanduser()
    preprocessing = Preprocessing(settings.size, data.mean, data.std)
    probe = labeled_probe(settings, preprocessing, steps_per_epoch)

    def export(state: dict[str, Tensor], step: int) -> None:
        """Refresh RUN/encoder from a checkpoint's weights, which are whole whatever the strategy."""
        state = {name.removeprefix("model."): value for name, value in state.items()}
        parts = {name: value for name, value in state.items() if not name.startswith("encoder.")}
        encoder = {name.removeprefix("encoder."): value for name, value in state.items() if name not in parts}
        said = provenance(settings, model.provenance(), source.num_images, step)
        said |= {"loss": round(save.mean_loss, 5)} if save.mean_loss is not None else {}
        trained = Checkpoint(
            model.encoder.config, encoder, preprocessing, run, provenance=said, method=model.name, pretraining=parts
        )
        save_checkpoint(run / "encoder", trained)

    save = SaveRun(run, settings.save_every_steps, settings.save_every_minutes, settings.keep_checkpoints, export)
    callbacks = [
        *shared_callbacks(run, settings, "pre-training", source.num_images),
        TrackStreamPosition(),
        Reconstructions(shown, run, every_steps=max(1, round(settings.reconstruct_every_epochs * steps_per_epoch))),
        ActivationMonitor(run, every_steps=max(1, round(settings.activations_every_epochs * steps_per_epoch))),
        *([probe] if probe else []),
        save,
        StopOnSignal(save),
    ]
    trainer = build_trainer(
        run,
        steps,
        devices=settings.devices,
        precision=settings.precision,
        accumulate=accumulate,
        callbacks=callbacks,
        log_every_steps=min(settings.log_every_steps, steps),
        extra=settings.trainer,
        loggers=settings.loggers,
        loss=model.loss_name,
    )
    per_device_batch(settings.batch_size, trainer.world_size, accumulate)
    if probe and (trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy)):
        probe.read()
    with locked_run_folder(settings) if is_first_process() else contextlib.nullcontext():
        checkpoint = usable_checkpoint(run, say=print if is_first_process() else None) if settings.resume else None
        if trainer.is_global_zero:
            if initial:
                print(lines)
            print(summary(settings, model, source.num_images, steps, trainer, checkpoint, probe), flush=True)
            if masks := note_on_label_maps(data.path):
                print(f"note     {masks}", flush=True)
        stream = StreamData(samples, settings.batch_size, accumulate, settings.workers)
        trainer.fit(module, datamodule=stream, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        print(f"encoder: {run / 'encoder'}\nlook at it: tensorboard --logdir {run / 'tensorboard'}")
    return run


def settled(settings: PretrainSettings) -> tuple[PretrainSettings, Source, bool, Checkpoint | None]:
    """Look at images, machine and the encoder to begin from, and fill in what the user left open.

    Returns:
        The settings, the images, whether they are kept in memory once decoded, and what the run begins from.
    """
    data = settings.data
    source = open_source(data.path, data.column, data.streaming, data.count)
    images = measure_images(source.head, data.channels, max_pixels=data.max_pixels)
    device = device_type()
    kept = images.decoded_mib <= KEEP_DECODED_MIB and not source.streaming
    # A run that is resumed no longer needs what it began from, which may be gone by then.
    begun = settings.resume and any(checkpoints_folder(Path(settings.out).expanduser()).glob("*.ckpt"))
    initial = read(settings.init) if settings.init != "none" and not begun else None
    # Images that are in memory already are cropped faster than they could be sent between processes.
    workers = 0 if kept and device == "cpu" else default_num_workers(device)
    settings = resolve(settings, images, source.num_images, device, workers, initial)
    precision = settings.precision or default_precision(device, settings.encoder_config())
    return replace(settings, precision=precision), source, kept, initial


def training_samples(settings: PretrainSettings, source: Source, kept: bool) -> ImageSamples | StreamedSamples:
    """The images in their endless order, cropped and flipped as settings say."""
    data = settings.data
    view = RandomView(settings.size, data.crop_scale, data.crop_ratio, data.flip)
    how = (view, data.channels, settings.seed)
    if source.streaming:
        return StreamedSamples(source.images, *how, data.shuffle_buffer, data.max_pixels)
    return ImageSamples(source.images, *how, kept, data.max_pixels)


def labeled_probe(settings: PretrainSettings, preprocessing: Preprocessing, steps_per_epoch: float) -> LabeledProbe | None:
    """The look at labeled images that resolved settings ask for; None where they do not."""
    if settings.probe.data is None:
        return None
    every_steps = max(1, round(settings.probe.every_epochs * steps_per_epoch))
    config = settings.encoder_config()
    return LabeledProbe(settings.probe, settings.seed, preprocessing, config, every_steps, settings.workers)


def build_model(settings: PretrainSettings) -> Method:
    """The method of resolved settings with its encoder, freshly initialized."""
    model = settings.model
    encoder = registry.build(settings.encoder_config(), model.checkpoint_activations, model.sequential_attention)
    return method_named(settings.method).build(encoder, model)


def take_weights(model: Method, source: Checkpoint) -> str:
    """Give `model` the weights of `source`, those of the method among them where it has them and they fit.

    Returns:
        The report, a line each of what was loaded, adapted, missing and unexpected.
    """
    config = model.encoder.config
    saved = build_encoder(source, **{name: getattr(config, name) for name in vars(config)})
    model.encoder.load_state_dict(saved.encoder.state_dict())
    report, shapes = str(saved.report), {name: tuple(value.shape) for name, value in source.pretraining.items()}
    if source.pretraining and source.method != model.name:
        report += f"\nadapted    the parts of {model.title} are fresh: the source was trained by {source.method}"
    elif source.pretraining and shapes != dict(model.expected_state(config)):
        report += f"\nadapted    the parts of {model.title} are fresh: those of the source are for other channels"
    elif source.pretraining:
        report += f"\nloaded     {model.load_own_state(source.pretraining, source.provenance)}"
    return report


def provenance(settings: PretrainSettings, method: dict, count: int, steps: int) -> dict:
    """What an exported encoder says of where it comes from."""
    from simmim import __version__

    return {
        "toolkit": f"simmim {__version__}",
        "method": method_named(settings.method).title,
        "data": data_name(settings.data.path),
        "images": count,
        "preset": registry.preset_name(settings.encoder_config()),
        **({"init": Path(settings.init).name} if settings.init != "none" else {}),
        "steps": steps,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        **method,
    }


def data_name(path: str | list[str]) -> str:
    """What a model card calls the images: their folders' names without the way there, which is nobody's business."""
    paths = [path] if isinstance(path, str) else path
    return ", ".join(Path(part).name for part in paths)


def summary(
    settings: PretrainSettings,
    model: Method,
    count: int,
    steps: int,
    trainer: pl.Trainer,
    resumed: Path | None,
    probe: LabeledProbe | None = None,
) -> str:
    """What is about to happen, and the resolved configuration."""
    encoder = model.encoder
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    height, width = settings.size
    peak = settings.optim.lr * settings.batch_size / 512
    kind = {1: "gray", 3: "color"}.get(settings.data.channels, f"{settings.data.channels} channels")
    lines = [
        f"# {settings.out}/{CONFIG}",
        as_yaml(settings).rstrip(),
        "",
        f"images   {count:,}, {kind}, as {height}×{width} px",
        f"encoder  {registry.family_of(encoder.config).title} {registry.preset_name(encoder.config) or 'of its own size'}, "
        f"{parameters:.2f} M parameters, {encoder.config.describe()}",
        f"method   {', '.join(filter(None, (model.title, model.describe(settings.size))))}",
        f"training {settings.epochs:g} epochs, {steps:,} steps of {settings.batch_size} images, peak learning rate "
        f"{peak:.3g}, {settings.precision} on {machine(trainer, encoder)}",
    ]
    if probe:
        lines.append(f"probe    {probe}")
    if resumed:
        lines.append(f"resuming from {resumed}")
    return "\n".join(lines)


def load_pretrained(run: str | Path) -> tuple[Method, PretrainSettings]:
    """A run's whole model, with mask token and head, from its last checkpoint, and its settings.

    Raises:
        ValueError: when `run` holds no pre-training run or no checkpoint yet.
    """
    settings = read_settings(run)
    checkpoint = usable_checkpoint(Path(run).expanduser())
    if checkpoint is None:
        raise ValueError(f"run {str(run)!r} has no checkpoint yet: expected some in {checkpoints_folder(Path(run))}")
    model = build_model(settings)
    state = unpickled(checkpoint)["state_dict"]
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
    given = {**values, **{name: kind(**values.get(name, {})) for name, kind in groups.items()}}
    return settings_class(method)(**given)
