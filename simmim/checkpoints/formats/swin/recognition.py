"""How the weights of a Swin Transformer are recognized by their names, and what the formats have in common about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.encoders.base import Size
from simmim.encoders.position_tables import side_of_table
from simmim.encoders.swin.config import SwinConfig

AUTHORS_PROJECTION = "patch_embed.proj.weight"
TABLE = re.compile(r"layers[._]0\.blocks\.0\.(attn|attention\.self)\.relative_position_bias_table$")


def is_swin(names: Iterable[str], projection: str) -> bool:
    """Whether tensors are those of a Swin Transformer: blocks with a table of position biases, no cosine attention, and a
    patch projection whose name ends in `projection`."""
    names = list(names)
    return (
        any(TABLE.search(name) for name in names)
        and not any(name.endswith("logit_scale") for name in names)
        and any(name.endswith(projection) for name in names)
    )


def config_of(checkpoint: Checkpoint) -> SwinConfig:
    """The configuration of a checkpoint that holds a Swin."""
    assert isinstance(checkpoint.config, SwinConfig)
    return checkpoint.config


def table_windows(state: Mapping[str, Tensor], num_stages: int) -> tuple[int, ...]:
    """The side of the window that the tables of each stage are for. Names are this toolkit's.

    Raises:
        ValueError: if a table is of no square window.
    """
    sides = []
    for stage in range(num_stages):
        name = f"layers.{stage}.blocks.0.attn.relative_position_bias_table"
        if name not in state:
            raise ValueError(f"these are not the weights of a whole Swin Transformer: there is no {name}")
        side = side_of_table(len(state[name]))
        if side is None:
            raise ValueError(f"{name} has {len(state[name])} rows: expected (2w − 1)² for a square window of w × w tokens")
        sides.append(side)
    return tuple(sides)


def swin_config(sizes: Mapping[str, Any], windows: tuple[int, ...], image_size: Size) -> SwinConfig:
    """The configuration whose tables are for these windows.

    Tables as large as the first stage's in every stage may come from a map that is smaller: `image_size` is then open.
    """
    config = SwinConfig(**{**sizes, "window_size": max(windows), "image_size": image_size})
    whole = replace(config, image_size=None)
    expected = tuple((side, side) for side in windows)
    return whole if config.largest_windows != expected == whole.largest_windows else config


def fitted(checkpoint: Checkpoint, title: str) -> Checkpoint:
    """A checkpoint whose tables are for the windows in use at the checkpoint's image size, as other libraries build them.

    Raises:
        ValueError: if this encoder has smaller windows there than another library would have.
    """
    config, size = config_of(checkpoint), checkpoint.preprocessing.image_size
    adapted = replace(config, image_size=size)
    if config.windows(size) != adapted.largest_windows:
        raise ValueError(
            f"{title} has windows {list(adapted.largest_windows)} at {size[0]}×{size[1]} px where this encoder has "
            f"{list(config.windows(size))}: export as safetensors, or at the image size of its tables"
        )
    return replace(checkpoint, config=adapted, encoder=config.adapt_weights(dict(checkpoint.encoder), adapted)[0])


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
