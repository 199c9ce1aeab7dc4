"""Where a fine-tuned run starts: pre-trained weights, an architecture without them, or a preset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from simmim.checkpoints import read
from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing, build_encoder
from simmim.data import ImageStatistics
from simmim.defaults import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    default_image_size,
    default_preset,
    encoder_channels,
    plain_size,
)
from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig, with_fields
from simmim.finetune.settings import EncoderSettings, TransferSettings


class Start(NamedTuple):
    """What there is before the first step.

    Attributes:
        encoder: to train.
        preprocessing: that it goes with.
        settings: with image size and window filled in.
        source: what the weights were read from; None where they are random.
    """

    encoder: Encoder
    preprocessing: Preprocessing
    settings: TransferSettings
    source: Checkpoint | None


def starting_point(
    settings: TransferSettings, images: ImageStatistics, device: str, say: Callable[[str], object] | None
) -> Start:
    """Pre-trained weights, an architecture without its weights (`encoder.like`), or a preset from scratch.

    Args:
        images: what the training images are like.
        say: is told how the weights were loaded.
    """
    source = settings.init if settings.init != "none" else settings.encoder.like
    chosen = settings.encoder
    if source is None:
        size = settings.image_size or default_image_size(images.short_side_px)
        side = size if isinstance(size, int) else min(size)
        preset = chosen.preset or default_preset(side, device)
        square = (size, size) if isinstance(size, int) else size
        config = registry.preset_config(preset, in_channels=images.channels)
        config = with_fields(config, **{**config.for_image_size(square), **changes_of(chosen, config)})
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if images.channels == 3 else (images.mean, images.std)
        resolved = replace(chosen, preset=preset, **resolved_changes(config))
        settings = replace(settings, image_size=size, encoder=resolved)
        check_size(settings, config.patch_size)
        preprocessing = Preprocessing(settings.size, mean, std)
        encoder = registry.build(config, chosen.checkpoint_activations, chosen.sequential_attention)
        return Start(encoder, preprocessing, settings, None)

    checkpoint = read(source, **({"window_size": chosen.window_size} if chosen.window_size else {}))
    pretrained_size = checkpoint.preprocessing.image_size
    size = settings.image_size or plain_size(pretrained_size)
    settings = replace(settings, image_size=size)
    channels = encoder_channels(checkpoint.config.in_channels, images.channels)
    config = with_fields(checkpoint.config.moved(pretrained_size, settings.size), in_channels=channels)
    config = with_fields(config, **changes_of(chosen, config))
    settings = replace(settings, encoder=replace(chosen, **resolved_changes(config)))
    saved = build_encoder(checkpoint, **{name: getattr(config, name) for name in vars(config)})
    encoder, preprocessing = saved.encoder, saved.preprocessing
    if settings.init == "none":
        encoder = registry.build(encoder.config.untrained())
    elif say:
        say(str(saved.report))
    encoder.checkpoint_activations, encoder.sequential_attention = chosen.checkpoint_activations, chosen.sequential_attention
    # Views of training are bilinear, whatever the encoder saw before; so is the view that evaluates them.
    preprocessing = replace(preprocessing, image_size=settings.size, interpolation="bilinear", fit="crop")
    check_size(settings, encoder.config.patch_size)
    return Start(encoder, preprocessing, settings, checkpoint)


def check_size(settings: TransferSettings, patch_size: int) -> None:
    """Refuse images that are smaller than one patch.

    Raises:
        ValueError: naming the least size.
    """
    if min(settings.size) < patch_size:
        raise ValueError(f"image_size is {settings.image_size}, less than a patch of the encoder: give {patch_size} or more")


# Settings of an encoder that fine-tuning may change, where the encoder has them.
CHANGEABLE = ("window_size", "drop_path_rate")


def changes_of(chosen: EncoderSettings, config: EncoderConfig) -> dict:
    """What the user changes of `config`, and stochastic depth where that is left open.

    Raises:
        ValueError: for a setting that the encoder does not have.
    """
    known = vars(config)
    changes = {name: getattr(chosen, name) for name in CHANGEABLE if getattr(chosen, name) is not None}
    for name in changes:
        if name not in known:
            raise ValueError(f"encoder.{name} is {changes[name]}: this encoder has no such setting, leave it out")
    if "drop_path_rate" in known:
        changes.setdefault("drop_path_rate", config.default_drop_path)
    return changes


def resolved_changes(config: EncoderConfig) -> dict:
    """The settings of `EncoderSettings` that say what `config` says; None for those that the encoder does not have."""
    return {name: getattr(config, name, None) for name in CHANGEABLE}
