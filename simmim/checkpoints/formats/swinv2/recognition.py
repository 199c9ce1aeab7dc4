"""How the weights of a Swin Transformer V2 are recognized by their names, and what the formats have in common about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.encoders.base import Size
from simmim.encoders.swinv2.config import SwinV2Config

AUTHORS_PROJECTION = "patch_embed.proj.weight"
BLOCK = re.compile(r"layers[._]0\.blocks\.0\.(attn|attention\.self)\.")


def is_swinv2(names: Iterable[str], projection: str) -> bool:
    """Whether tensors are those of a Swin Transformer V2: blocks, cosine attention, and a patch projection whose name ends
    in `projection`."""
    names = list(names)
    return (
        any(BLOCK.search(name) for name in names)
        and any(name.endswith("logit_scale") for name in names)
        and any(name.endswith(projection) for name in names)
    )


def config_of(checkpoint: Checkpoint) -> SwinV2Config:
    """The configuration of a checkpoint that holds a SwinV2."""
    assert isinstance(checkpoint.config, SwinV2Config)
    return checkpoint.config


def with_pretrained_windows(config: SwinV2Config, sizes: Sequence[int | Size] | None, image_size: Size) -> SwinV2Config:
    """`config` with the windows of pre-training that another library states.

    Args:
        sizes: one window per stage; 0 stands for the window that the stage uses at `image_size`. None is 0 for all.
    """
    in_use = config.without_training_size().with_training_size(image_size).pretrained_window_sizes or ()
    return replace(config, pretrained_window_sizes=tuple(size or own for size, own in zip(sizes or in_use, in_use)))


def refuse_extra_norms(checkpoint: Checkpoint, title: str) -> None:
    """Refuse an encoder with norms on the main path, for formats that have no place for them.

    Raises:
        ValueError: naming the formats that do.
    """
    if config_of(checkpoint).extra_norm_every:
        raise ValueError(
            f"{title} has no place for the extra norms of huge and giants: export as official, safetensors or onnx"
        )


def padding_note(checkpoint: Checkpoint, title: str, shifts_before_padding: bool) -> tuple[str, ...]:
    """A note if windows do not divide the maps and the other library shifts and pads in another order."""
    config, (height, width) = config_of(checkpoint), checkpoint.preprocessing.image_size
    if config.windows_divide((height, width)) or config.shift_before_padding == shifts_before_padding:
        return ()
    order = "before" if shifts_before_padding else "after"
    return (
        f"windows do not divide the maps at {height}×{width} px; {title} shifts {order} it pads and this encoder does the "
        "opposite, so features differ there",
    )
