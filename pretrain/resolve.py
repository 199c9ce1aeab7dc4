"""How the settings of stage 1 that the user leaves open follow from the images, the machine and the initial encoder."""

from __future__ import annotations

import math
from dataclasses import replace

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.data import ImageStatistics
from simmim.defaults import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    default_batch_size,
    default_image_size,
    default_preset,
    default_pretraining_epochs,
    encoder_channels,
    plain_size,
)
from simmim.encoders import registry
from simmim.encoders.base import EncoderConfig, with_fields
from simmim.pretrain.image_sizes import resolve_growing
from simmim.pretrain.settings import DataSettings, OptimSettings, PretrainSettings
from simmim.training.optim import lr_by_root

# Pictures and measures of activations in a run. Each takes about as long as a step.
PICTURES_PER_RUN, MIN_STEPS_PER_PICTURE = 20, 20
MIN_STEPS_PER_CHECKPOINT, MAX_STEPS_PER_CHECKPOINT = 50, 1000
PROBES_PER_RUN = 10
PUBLISHED_LR = 1e-4  # per 512 images
# For encoders narrower than the published ones: searches on digits, garments and photographs ended at 4e-3 for 64 images.
SMALL_PEAK_LR, SMALL_BATCH = 4e-3, 64


def resolve_settings(
    settings: PretrainSettings,
    images: ImageStatistics,
    num_images: int,
    device: str,
    workers: int,
    initial: Checkpoint | None = None,
) -> PretrainSettings:
    """Fill in all settings that the user left open.

    Args:
        images: statistics of a sample of the images.
        num_images: images per epoch.
        device: cuda, mps or cpu.
        workers: loading processes that suit the machine.
        initial: the checkpoint that `settings.init` names; None for a fresh encoder, and for a run that is resumed, whose
            settings hold the architecture.

    Raises:
        ValueError: when the result cannot work: an unknown preset, a mask unit that does not divide the image, ….
    """
    data = resolve_data(settings.data, images, initial)
    check_channels(settings, data.channels)
    image_size = settings.image_size or default_size(images, initial, device, settings.preset)
    settings = replace(settings, data=data, image_size=image_size)
    settings, config = resolve_encoder(settings, device, initial)
    epochs = settings.epochs or default_pretraining_epochs(num_images)
    batch_size = settings.batch_size or default_batch_size(device, config.is_small, settings.model.images_per_input)
    between_pictures = max(epochs / PICTURES_PER_RUN, MIN_STEPS_PER_PICTURE * batch_size / num_images)
    steps_per_epoch = math.ceil(num_images / batch_size)
    resolved = replace(
        settings,
        optim=resolve_optim(settings.optim, epochs, batch_size, config.is_small),
        epochs=epochs,
        batch_size=batch_size,
        workers=workers if settings.workers is None else settings.workers,
        reconstruct_every_epochs=settings.reconstruct_every_epochs or between_pictures,
        activations_every_epochs=settings.activations_every_epochs or between_pictures,
        save_every_steps=settings.save_every_steps
        or min(max(steps_per_epoch, MIN_STEPS_PER_CHECKPOINT), MAX_STEPS_PER_CHECKPOINT),
        probe=replace(settings.probe, every_epochs=settings.probe.every_epochs or max(epochs / PROBES_PER_RUN, 1e-9)),
    )
    resolved.schedule()  # raises ValueError for a course that is impossible
    return resolved


def resolve_data(data: DataSettings, images: ImageStatistics, initial: Checkpoint | None) -> DataSettings:
    """Channels, mean and standard deviation: of the initial encoder, of ImageNet for color, else of the images.

    Raises:
        ValueError: when mean or standard deviation do not have a number for each channel.
    """
    found = encoder_channels(initial.config.in_channels, images.channels) if initial else images.channels
    channels = data.channels or found
    deep = images.reading.is_deep
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 and not deep else (images.mean, images.std)
    if initial and initial.config.in_channels == channels and not (deep and initial.preprocessing.reading != images.reading):
        mean, std = initial.preprocessing.mean, initial.preprocessing.std
    data = replace(data.with_reading(images.reading), channels=channels, mean=data.mean or mean, std=data.std or std)
    if len(data.mean) != channels or len(data.std) != channels:
        raise ValueError(f"data.mean {data.mean} and data.std {data.std} need one number for each of {channels} channels")
    return data


def check_channels(settings: PretrainSettings, channels: int) -> None:
    """Refuse an encoder of other channels than the images.

    Raises:
        ValueError: naming both.
    """
    given = settings.model.encoder.get("in_channels", channels)
    if given != channels:
        raise ValueError(f"model.encoder.in_channels is {given} and the images have {channels}: give data.channels")


def default_size(
    images: ImageStatistics, initial: Checkpoint | None, device: str, preset: str | None = None
) -> int | tuple[int, int]:
    """The image size of the initial encoder, or one that suits images, device and preset."""
    if initial:
        return plain_size(initial.preprocessing.image_size)
    return default_image_size(images.short_side_px, device, preset)


def resolve_encoder(
    settings: PretrainSettings, device: str, initial: Checkpoint | None
) -> tuple[PretrainSettings, EncoderConfig]:
    """The preset, the encoder's settings and those of the method, and the architecture that they name; where images grow of
    the last size, with what differs at the others."""
    if settings.image_sizes is not None:
        return resolve_growing(settings, lambda part: resolve_encoder(part, device, initial))
    model, size = settings.model, settings.size
    encoder, preset = dict(model.encoder), None
    if settings.init == "none":
        preset = settings.preset or default_preset(min(size), device)
        config = registry.preset_config(preset, **encoder)
        encoder = {**config.fields_for_size(size), **encoder}
        config = with_fields(config, **encoder)
    else:
        if initial:
            adapted = initial.config.adapt_to_size(initial.preprocessing.image_size, size)
            encoder = {**registry.config_as_dict(adapted), "in_channels": settings.data.channels, **encoder}
        config = registry.config_from_dict(encoder)
    model = replace(model.resolve(size, config), encoder=encoder)
    return replace(settings, model=model, preset=preset), config


def resolve_optim(optim: OptimSettings, epochs: float, batch_size: int, is_small: bool) -> OptimSettings:
    """Peak learning rate and warm-up."""
    lr = lr_by_root(SMALL_PEAK_LR, SMALL_BATCH, batch_size) if is_small else PUBLISHED_LR
    return replace(
        optim,
        lr=lr if optim.lr is None else optim.lr,
        warmup_epochs=min(10, epochs / 10) if optim.warmup_epochs is None else optim.warmup_epochs,
    )
