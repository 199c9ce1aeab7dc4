"""A fine-tuning run put together: read the labels, load or make the encoder, train, keep the best."""
from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl

from finetune.classification import ClassificationFinetuning, Classifier, save_classifier
from finetune.settings import FinetuneSettings, with_schedule
from simmim.checkpoint import Checkpoint, Preprocessing, build_encoder
from simmim.convert import read
from simmim.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CentreView,
    ImageSamples,
    LabeledImages,
    RandomView,
    labeled_images,
    survey,
    worker_count,
)
from simmim.defaults import (
    default_image_size,
    default_preset,
    default_window,
    encoder_channels,
    plain_size,
)
from simmim.run_folder import CONFIG, as_yaml, check_run_folder, taken_run_folder
from simmim.swinv2 import PRESETS, SwinV2, SwinV2Config
from simmim.training import (
    SaveRun,
    StopOnSignal,
    ValidatedStreamData,
    build_trainer,
    check_trainer_keys,
    default_precision,
    device_type,
    is_first_process,
    per_device_batch,
    usable_checkpoint,
    usual_callbacks,
)

KEEP_DECODED_MIB = 128


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run: its folder, the accuracy of the last step and the best validated one, in [0, 1]."""

    run: Path
    accuracy: float
    best_accuracy: float


def finetune(settings: FinetuneSettings, quiet: bool = False) -> FinetuneResult:
    """Fine-tune an encoder on class folders; the run folder's encoder/ holds the best classifier.

    Args:
        quiet: print nothing and show no progress, for runs in series.

    Raises:
        ValueError: for settings, labels or an encoder that cannot work, before anything is written.
    """
    if is_first_process():
        check_run_folder(settings.out, settings.resume, settings.overwrite)
    check_trainer_keys(settings.trainer)
    data = settings.data
    labels = labeled_images(data.path, settings.labels_per_class, settings.seed, data.column, data.label_column)
    device = device_type()
    images = survey(labels.train)
    kept = images.decoded_mib <= KEEP_DECODED_MIB

    pl.seed_everything(settings.seed, workers=True, verbose=False)
    encoder, preprocessing, settings, source = starting_point(settings, images, device, say=None if quiet else print)
    small = encoder.config.embed_dim < 96
    settings = with_schedule(settings, len(labels.train), device, small)
    crop = settings.data.evaluation_crop or (1.0 if min(settings.size) <= 64 else 0.875)
    settings = replace(
        settings,
        data=replace(settings.data, evaluation_crop=crop),
        workers=settings.workers
        if settings.workers is not None
        else (0 if kept and device == "cpu" else worker_count(device)),
        precision=settings.precision or default_precision(device, encoder.config),
    )
    accumulate = settings.optim.accumulate
    steps_per_epoch = len(labels.train) / settings.batch_size
    steps = max(1, round(settings.epochs * steps_per_epoch))
    schedule = settings.schedule().by_step(steps_per_epoch, settings.batch_size)

    preprocessing = replace(preprocessing, crop=crop)
    # What was read is in evaluation mode, which Lightning would leave as it is: without stochastic depth.
    model = Classifier(encoder, len(labels.classes)).train()
    take_head(model, source, labels.classes, settings, say=None if quiet else print)
    module = ClassificationFinetuning(
        model, preprocessing.mean, preprocessing.std, settings.data.affine, schedule, settings.optim, settings.freeze
    )
    train, validation = samples_of(labels, settings, encoder.config.in_channels, kept)

    run = Path(settings.out).expanduser()
    best = KeepBest(run, labels.classes, preprocessing, provenance(settings, len(labels.train), source))
    save = SaveRun(run, every_steps=max(50, round(steps / settings.validations)), keep_best=False)
    callbacks = [
        *usual_callbacks(run, settings, "fine-tuning", len(labels.train), quiet),
        best,
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
        validate_every_steps=max(1, -(-steps // settings.validations)),
        loggers=settings.loggers,
        loss="cross_entropy",
    )
    per_device_batch(settings.batch_size, trainer.world_size, accumulate)
    with taken_run_folder(settings) if is_first_process() else contextlib.nullcontext():
        checkpoint = usable_checkpoint(run, say=print if is_first_process() else None) if settings.resume else None
        if trainer.is_global_zero and not quiet:
            print(summary(settings, model, labels, steps, trainer, checkpoint), flush=True)
        stream = ValidatedStreamData(train, settings.batch_size, accumulate, settings.workers, validation)
        trainer.fit(module, datamodule=stream, ckpt_path=checkpoint, weights_only=True)
        # Steps rarely end on a validation: the last state is measured once more.
        last = trainer.validate(module, datamodule=stream, verbose=False)[0]["accuracy"]
        best.consider(module, last)
    if trainer.is_global_zero and not quiet:
        print(
            f"accuracy {last:.1%} at the end, {best.accuracy:.1%} best, on {len(validation):,} validation images\n"
            f"best classifier: {run / 'encoder'}\n"
            f"use it: simmim predict --run {run} --images PATH --out predictions.csv"
        )
    return FinetuneResult(run, float(last), float(best.accuracy))


def take_head(model: Classifier, source: Checkpoint | None, classes: tuple[str, ...], settings, say) -> None:
    """The source's head where it is for the same classes; else it is fresh, which is said."""
    if source is None or settings.init == "none" or not source.head:
        return
    if source.classes == tuple(classes):
        model.head.load_state_dict(source.head)
        text = f"head of the same {len(classes)} classes taken over"
    else:
        text = f"head of {len(source.classes)} classes replaced by a fresh one of {len(classes)}"
    if say:
        say(f"adapted    {text}")


def samples_of(
    labels: LabeledImages, settings: FinetuneSettings, channels: int, keep_decoded: bool
) -> tuple[ImageSamples, ImageSamples]:
    """Training samples, cropped and flipped at random, and validation samples, cropped in the centre."""
    data = settings.data
    views = (
        RandomView(settings.size, data.crop_scale, data.crop_ratio, data.flip),
        CentreView(settings.size, data.evaluation_crop),
    )
    parts = zip((labels.train, labels.validation), views)
    train, validation = (ImageSamples(part, view, channels, settings.seed, keep_decoded) for part, view in parts)
    return train, validation


def starting_point(
    settings: FinetuneSettings, images, device: str, say
) -> tuple[SwinV2, Preprocessing, FinetuneSettings, Checkpoint | None]:
    """The encoder to train, the preprocessing it goes with, the settings with image size and window filled in, and what was
    read.

    Pre-trained weights, an architecture without its weights (`encoder.like`), or a preset from scratch.
    """
    source = settings.init if settings.init != "none" else settings.encoder.like
    chosen = settings.encoder
    if source is None:
        size = settings.image_size or default_image_size(images.short_side_px)
        side = size if isinstance(size, int) else min(size)
        preset = chosen.preset or default_preset(side, device)
        window = chosen.window_size or default_window(side, PRESETS[preset].patch_size if preset in PRESETS else 4)
        config = SwinV2Config.from_preset(
            preset, in_channels=images.channels, window_size=window, drop_path_rate=chosen.drop_path_rate
        )
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if images.channels == 3 else (images.mean, images.std)
        settings = replace(settings, image_size=size, encoder=replace(chosen, preset=preset, window_size=window))
        preprocessing = Preprocessing(settings.size, mean, std)
        encoder = SwinV2(config, chosen.checkpoint_activations, chosen.sequential_attention)
        return encoder, preprocessing, settings, None

    checkpoint = read(source, **({"window_size": chosen.window_size} if chosen.window_size else {}))
    pretrained_size = checkpoint.preprocessing.image_size
    size = settings.image_size or plain_size(pretrained_size)
    settings = replace(settings, image_size=size)
    # The window grows with the image, so that it sees the same share of it: 12 at 192 px, 14 at 224.
    window = chosen.window_size or max(1, round(checkpoint.config.window_size * min(settings.size) / min(pretrained_size)))
    settings = replace(settings, encoder=replace(chosen, window_size=window))
    channels = encoder_channels(checkpoint.config.in_channels, images.channels)
    overrides = {"window_size": window, "drop_path_rate": chosen.drop_path_rate, "in_channels": channels}
    saved = build_encoder(checkpoint, **overrides)
    encoder, preprocessing = saved.encoder, saved.preprocessing
    if settings.init == "none":
        encoder = SwinV2(replace(encoder.config, pretrained_window_sizes=None))
    elif say:
        say(str(saved.report))
    encoder.checkpoint_activations, encoder.sequential_attention = chosen.checkpoint_activations, chosen.sequential_attention
    # Views of training are bilinear, whatever the encoder saw before; so is the view that evaluates them.
    preprocessing = replace(preprocessing, image_size=settings.size, interpolation="bilinear", fit="crop")
    return encoder, preprocessing, settings, checkpoint


class KeepBest(pl.Callback):
    """Exports the classifier whenever its validation accuracy is the best so far; the first of equals stays."""

    def __init__(
        self, run: Path, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
    ) -> None:
        self.run, self.classes, self.preprocessing, self.provenance = run, classes, preprocessing, provenance
        self.accuracy = -1.0

    def state_dict(self) -> dict:
        """The best accuracy, for a resumed run."""
        return {"accuracy": self.accuracy}

    def load_state_dict(self, state: dict) -> None:
        """Take up the best accuracy so far."""
        self.accuracy = state["accuracy"]

    def on_validation_end(self, trainer: pl.Trainer, module: ClassificationFinetuning) -> None:
        """Consider what was just validated in the course of training."""
        if trainer.state.fn == "fit":
            self.consider(module, float(trainer.callback_metrics["accuracy"]))

    def consider(self, module: ClassificationFinetuning, accuracy: float) -> None:
        """Export if better than all before."""
        if accuracy <= self.accuracy:
            return
        self.accuracy = accuracy
        if module.trainer.is_global_zero:
            provenance = {**self.provenance, "steps": module.trainer.global_step, "accuracy": accuracy}
            save_classifier(self.run / "encoder", module.model, self.classes, self.preprocessing, provenance)


def provenance(settings: FinetuneSettings, count: int, source: Checkpoint | None) -> dict:
    """What an exported classifier says of where it comes from."""
    from simmim import __version__

    return {
        "toolkit": f"simmim {__version__}",
        "method": "classification",
        "data": Path(settings.data.path).name,
        "images": count,
        "encoder": "from scratch" if settings.init == "none" else (source.provenance or {"file": source.source.name}),
        "labels_per_class": settings.labels_per_class,
        "epochs": settings.epochs,
        "seed": settings.seed,
    }


def summary(
    settings: FinetuneSettings,
    model: Classifier,
    labels: LabeledImages,
    steps: int,
    trainer: pl.Trainer,
    resumed: Path | None,
) -> str:
    """What is about to happen, and the resolved configuration."""
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
        f"{', frozen' if settings.freeze else ''}, {parameters:.2f} M parameters trained",
        f"training {settings.epochs:g} epochs, {steps:,} steps of {settings.batch_size} images, peak learning rate "
        f"{peak:.3g}, layer decay {settings.optim.layer_decay:g}, {settings.precision} on "
        f"{trainer.world_size} × {trainer.strategy.root_device.type}",
    ]
    if resumed:
        lines.append(f"resuming from {resumed}")
    return "\n".join(lines)
