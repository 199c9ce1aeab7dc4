"""Where a fine-tuned run starts: pre-trained weights, an architecture without them, or a preset."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from finetune.settings import EncoderSettings, TransferSettings
from simmim.checkpoint import Checkpoint, Preprocessing, build_encoder
from simmim.convert import read
from simmim.data import IMAGENET_MEAN, IMAGENET_STD, Survey
from simmim.defaults import (
    default_drop_path,
    default_image_size,
    default_preset,
    default_window,
    encoder_channels,
    plain_size,
)
from simmim.swinv2 import PRESETS, SwinV2, SwinV2Config


class Start(NamedTuple):
    """What there is before the first step.

    Attributes:
        encoder: to train.
        preprocessing: that it goes with.
        settings: with image size and window filled in.
        source: what the weights were read from; None where they are random.
    """

    encoder: SwinV2
    preprocessing: Preprocessing
    settings: TransferSettings
    source: Checkpoint | None


def starting_point(
    settings: TransferSettings, images: Survey, device: str, say: Callable[[str], object] | None
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
        window = chosen.window_size or default_window(side, PRESETS[preset].patch_size if preset in PRESETS else 4)
        config = SwinV2Config.from_preset(preset, in_channels=images.channels, window_size=window)
        config = replace(config, drop_path_rate=drop_path_rate(chosen, config))
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if images.channels == 3 else (images.mean, images.std)
        resolved = replace(chosen, preset=preset, window_size=window, drop_path_rate=config.drop_path_rate)
        settings = replace(settings, image_size=size, encoder=resolved)
        check_size(settings, config.patch_size)
        preprocessing = Preprocessing(settings.size, mean, std)
        encoder = SwinV2(config, chosen.checkpoint_activations, chosen.sequential_attention)
        return Start(encoder, preprocessing, settings, None)

    checkpoint = read(source, **({"window_size": chosen.window_size} if chosen.window_size else {}))
    pretrained_size = checkpoint.preprocessing.image_size
    size = settings.image_size or plain_size(pretrained_size)
    settings = replace(settings, image_size=size)
    # The window grows with the image, so that it sees the same share of it: 12 at 192 px, 14 at 224.
    window = chosen.window_size or max(1, round(checkpoint.config.window_size * min(settings.size) / min(pretrained_size)))
    rate = drop_path_rate(chosen, checkpoint.config)
    settings = replace(settings, encoder=replace(chosen, window_size=window, drop_path_rate=rate))
    channels = encoder_channels(checkpoint.config.in_channels, images.channels)
    overrides = {"window_size": window, "drop_path_rate": rate, "in_channels": channels}
    saved = build_encoder(checkpoint, **overrides)
    encoder, preprocessing = saved.encoder, saved.preprocessing
    if settings.init == "none":
        encoder = SwinV2(replace(encoder.config, pretrained_window_sizes=None))
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


def drop_path_rate(chosen: EncoderSettings, config: SwinV2Config) -> float:
    """Stochastic depth as asked for, or what suits the depth."""
    if chosen.drop_path_rate is not None:
        return chosen.drop_path_rate
    return default_drop_path(config.embed_dim, config.depths)
