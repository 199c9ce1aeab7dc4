"""How the weights of SimMIM's ViT are recognized by their names, and what the formats have in common about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER
from simmim.checkpoints.formats.key_tables import KeyTable, Row, weight_and_bias
from simmim.checkpoints.formats.parts import SIMMIM
from simmim.encoders.base import Size, State
from simmim.encoders.position_tables import num_offsets, side_of_table
from simmim.encoders.vit.config import BLOCKS, CLASS_ROWS, SHARED, ViTConfig

PROJECTION, CLASS_TOKEN = "patch_embed.proj.weight", "cls_token"
SHARED_ROW, BLOCK_ROW = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
OURS, THEIRS = "layers.{i}.", "blocks.{i}."
# The names of BEiT's code, which the authors' ViT and timm's Beit are made of. The final norm is fc_norm after pooling.
NAMES: tuple[Row, ...] = (
    *weight_and_bias("patch_embed.proj", "patch_embed.proj"),
    ("patch_embed.class_token", CLASS_TOKEN),
    ("position_bias.table", SHARED_ROW),
    (OURS + "attn.qkv.weight", THEIRS + "attn.qkv.weight"),
    (OURS + "attn.q_bias", THEIRS + "attn.q_bias"),
    (OURS + "attn.v_bias", THEIRS + "attn.v_bias"),
    (OURS + "attn.position_bias.table", THEIRS + "attn.relative_position_bias_table"),
    *(
        row
        for name in ("attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
        for row in weight_and_bias(OURS + name, THEIRS + name)
    ),
    (OURS + "gamma_1", THEIRS + "gamma_1"),
    (OURS + "gamma_2", THEIRS + "gamma_2"),
)


def table_for(config: ViTConfig, names: tuple[Row, ...], head: tuple[Row, ...], pretraining: tuple[Row, ...]) -> KeyTable:
    """A key table in which the final norm has the name that it has where it stands."""
    norm = "fc_norm" if config.norm_after_pooling else "norm"
    return KeyTable((*names, *weight_and_bias("norm", norm)), pretraining, head)


def is_vit(names: Iterable[str]) -> bool:
    """Whether tensors are those of a ViT with relative position biases, under BEiT's names."""
    names = list(names)
    required = (PROJECTION, CLASS_TOKEN, "blocks.0.attn.q_bias")
    return all(any(name.endswith(end) for name in names) for end in required) and any(
        name.endswith((SHARED_ROW, BLOCK_ROW)) for name in names
    )


def config_of(checkpoint: Checkpoint) -> ViTConfig:
    """The configuration of a checkpoint that holds a ViT."""
    assert isinstance(checkpoint.config, ViTConfig)
    return checkpoint.config


def infer_fields(state: Mapping[str, Tensor], image_size: Size | None = None) -> dict[str, Any]:
    """The fields of `ViTConfig` that follow from an encoder's weights under BEiT's names, without drop path.

    Args:
        image_size: what the file says; believed where the tables are for it. Else the tables are for a square grid.

    Raises:
        ValueError: when a weight of every such encoder is missing, naming it, or a table is of no square grid.
    """
    for name in (PROJECTION, "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise ValueError(f"these are not the weights of a whole ViT: there is no {name}")
    projection, hidden = state[PROJECTION], state["blocks.0.mlp.fc1.weight"]
    if projection.ndim != 4:
        raise ValueError(
            f"{PROJECTION} has shape {tuple(projection.shape)}: a ViT has (channels, image channels, patch, patch)"
        )
    shared = SHARED_ROW in state
    table = state[SHARED_ROW if shared else BLOCK_ROW]
    patch = projection.shape[2]
    side = side_of_table(len(table) - CLASS_ROWS)
    if image_size and num_offsets((-(-image_size[0] // patch), -(-image_size[1] // patch))) == len(table) - CLASS_ROWS:
        size = image_size
    elif side is not None:
        size = (side * patch, side * patch)
    else:
        raise ValueError(f"a position bias has {len(table)} rows: expected (2s − 1)² + 3 for a square grid of s × s tokens")
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "embed_dim": projection.shape[0],
        "depth": len(blocks),
        "num_heads": table.shape[1],
        "patch_size": projection.shape[2],
        "in_channels": projection.shape[1],
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
        "layer_scale": 0.1 if "blocks.0.gamma_1" in state else 0.0,
        "position_bias": SHARED if shared else BLOCKS,
        "norm_after_pooling": "fc_norm.weight" in state,
        "image_size": size,
    }


def our_shapes(state: State) -> State:
    """Tensors under our names in our shapes: the class token is a vector."""
    name = "patch_embed.class_token"
    return {**state, name: state[name].flatten()} if name in state else state


def their_shapes(state: State, name: str = CLASS_TOKEN) -> State:
    """Tensors under their names in their shapes: the class token is (1, 1, C)."""
    return {**state, name: state[name].view(1, 1, -1)}


def fitted(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tables are for its image size, as other libraries build them. It computes the same there."""
    config, size = config_of(checkpoint), checkpoint.preprocessing.image_size
    adapted = replace(config, image_size=size)
    return replace(checkpoint, config=adapted, encoder=config.adapt_weights(dict(checkpoint.encoder), adapted)[0])


def check_size(checkpoint: Checkpoint, title: str) -> None:
    """Refuse image sizes that another library's ViT does not take.

    Raises:
        ValueError: naming the size.
    """
    height, width = checkpoint.preprocessing.image_size
    patch = config_of(checkpoint).patch_size
    if height % patch or width % patch:
        raise ValueError(
            f"the ViT of {title} takes images that patches of {patch} px divide, which {height}×{width} px are not: export "
            "as safetensors"
        )


def pooling_note(checkpoint: Checkpoint, title: str, form: str) -> tuple[str, ...]:
    """A note if the other library pools the class token where this encoder pools the mean of the patches.

    Raises:
        ValueError: for a classifier that this would make another one.
    """
    if config_of(checkpoint).norm_after_pooling or form == SIMMIM:
        return ()
    if form == CLASSIFIER:
        raise ValueError(
            f"the ViT of {title} with its norm before pooling classifies by the class token, this one by the mean of the "
            "patches: export as safetensors"
        )
    return (f"the ViT of {title} pools the class token, this one the mean of normalized patches; the map is the same",)
