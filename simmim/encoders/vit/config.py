"""The configuration of a Vision Transformer, and the presets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from simmim.encoders.base import EncoderConfig, Size, State
from simmim.encoders.position_tables import move_table

HEAD_DIM = 32  # channels of a head of a decoder
CLASS_ROWS = 3  # of a table, after the offsets: from the class token to patches, from patches to it, and to itself
SHARED, BLOCKS = "shared", "blocks"
SHARED_TABLE, BLOCK_TABLE = "position_bias.table", "layers.{}.attn.position_bias.table"
SMALLEST_LARGE = 384  # channels of ViT-S; narrower ones are small


@dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """The architecture of one Vision Transformer with relative position biases.

    Args:
        embed_dim: C, channels of all blocks.
        depth: number of blocks.
        num_heads: number of attention heads. It divides `embed_dim`.
        patch_size: side of a patch in pixels.
        in_channels: channels of the images.
        mlp_ratio: hidden channels of a block's MLP per channel.
        drop_path_rate: stochastic-depth probability of the last block. It rises linearly from 0 at the first block.
        layer_scale: initial value of the learned factors of each channel of a block's branches; 0 for blocks without them.
        position_bias: shared, one table for all blocks, as in pre-training; or blocks, one each, as in fine-tuning.
        norm_after_pooling: whether pooled features are the norm of the mean, as in fine-tuning, instead of the mean of
            normalized tokens.
        image_size: (height, width) in pixels of the images that the tables are for. Other sizes work: their bias is that
            of moved tables (`simmim.encoders.position_tables`).

    Raises:
        ValueError: for a setting out of range, saying what was expected.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    in_channels: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    layer_scale: float = 0.1
    position_bias: str = SHARED
    norm_after_pooling: bool = False
    image_size: Size = (224, 224)

    input_projection: ClassVar[str] = "patch_embed.proj.weight"
    size_fields: ClassVar[tuple[str, ...]] = ("embed_dim", "depth", "num_heads", "mlp_ratio")
    supports_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "patch_size", "in_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a positive whole number")
        for name in ("mlp_ratio", "drop_path_rate", "layer_scale"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a number")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {self.embed_dim} channels: give another num_heads")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}: give a positive number")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}: give a probability in [0, 1)")
        if self.layer_scale < 0:
            raise ValueError(f"layer_scale is {self.layer_scale}: give 0 for none, or a positive number")
        if self.position_bias not in (SHARED, BLOCKS):
            raise ValueError(f"position_bias is {self.position_bias!r}: give {SHARED} or {BLOCKS}")
        size = self.image_size
        if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"image_size is {size!r}: give height and width in pixels")
        object.__setattr__(self, "image_size", tuple(size))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the one map."""
        return (self.embed_dim,)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token of the one map."""
        return (self.patch_size,)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.depth

    @property
    def is_small(self) -> bool:
        """Whether it is narrower than ViT-S."""
        return self.embed_dim < SMALLEST_LARGE

    @property
    def default_drop_path(self) -> float:
        """0.1 as published. 0 for fewer than 8 blocks, each of which matters."""
        return 0.1 if self.depth >= 8 else 0.0

    def describe(self) -> str:
        """Patch and position bias."""
        bias = "one position bias" if self.position_bias == SHARED else "a position bias per block"
        return f"{bias}, patch {self.patch_size} px"

    def grid(self, image_size: Size) -> Size:
        """(height, width) of the map in tokens, on images of `image_size`."""
        return -(-image_size[0] // self.patch_size), -(-image_size[1] // self.patch_size)

    # --- sizes and stages of training --------------------------------------------------------------------------------

    def fields_for_size(self, image_size: Size) -> dict[str, Any]:
        """Tables for these images."""
        return {"image_size": tuple(image_size)}

    def adapt_to_size(self, trained_size: Size, image_size: Size) -> ViTConfig:
        """A copy with tables for these images."""
        return replace(self, image_size=image_size)

    def for_fine_tuning(self) -> ViTConfig:
        """A copy with a table for each block and the norm after pooling, as the SimMIM repository fine-tunes."""
        return replace(self, position_bias=BLOCKS, norm_after_pooling=True)

    def check_groups(self, image_size: Size) -> None:
        """Groups are supported where patches divide the images.

        Raises:
            ValueError: naming the patch.
        """
        if any(side % self.patch_size for side in image_size):
            raise ValueError(
                f"images of {image_size[0]}×{image_size[1]} px on one canvas: give multiples of the patch, "
                f"{self.patch_size} px"
            )

    def decoder_config(self, dim: int, depth: int) -> ViTConfig:
        """Blocks on the map of `image_size`, with a table for it. Heads have 32 channels.

        Raises:
            ValueError: when heads of 32 channels do not divide `dim`.
        """
        if dim < 1 or dim % HEAD_DIM:
            raise ValueError(f"decoder_dim is {dim}: give a multiple of {HEAD_DIM}, the channels of a head")
        grid = self.grid(self.image_size)
        return ViTConfig(dim, depth, dim // HEAD_DIM, patch_size=1, in_channels=self.embed_dim, image_size=grid)

    # --- weights -----------------------------------------------------------------------------------------------------

    @classmethod
    def infer_fields(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields that follow from names and shapes of weights.

        Raises:
            ValueError: when a weight of every such encoder is missing, naming it.
        """
        shared, first = SHARED_TABLE in state, BLOCK_TABLE.format(0)
        for name in (cls.input_projection, "layers.0.mlp.fc1.weight", *(() if shared else (first,))):
            if name not in state:
                raise ValueError(f"these are not the weights of a whole ViT: there is no {name}")
        projection, hidden = state[cls.input_projection], state["layers.0.mlp.fc1.weight"]
        blocks = {match[1] for name in state if (match := re.match(r"layers\.(\d+)\.", name))}
        return {
            "embed_dim": projection.shape[0],
            "depth": len(blocks),
            "num_heads": state[SHARED_TABLE if shared else first].shape[1],
            "patch_size": projection.shape[2],
            "in_channels": projection.shape[1],
            "mlp_ratio": hidden.shape[0] / hidden.shape[1],
            "position_bias": SHARED if shared else BLOCKS,
        }

    def adapt_weights(self, state: State, config: ViTConfig) -> tuple[State, tuple[str, ...]]:
        """As `EncoderConfig.adapt_weights`; tables moved to another grid and from all blocks to each, as the SimMIM
        repository does; and a fresh norm where it moves behind the pooling."""
        state, notes = super().adapt_weights(state, config)
        state = dict(state)
        before, after = self.grid(self.image_size), config.grid(config.image_size)
        if before != after:
            for name in [name for name in state if name.endswith("position_bias.table")]:
                table, class_rows = state[name].split((len(state[name]) - CLASS_ROWS, CLASS_ROWS))
                state[name] = torch.cat((move_table(table, before, after), class_rows))
            grids = (f"{height}×{width}" for height, width in (before, after))
            notes += ("grid {} to {}, position biases interpolated".format(*grids),)
        if self.position_bias == SHARED and config.position_bias == BLOCKS and SHARED_TABLE in state:
            table = state.pop(SHARED_TABLE)
            state |= {BLOCK_TABLE.format(block): table.clone() for block in range(self.depth)}
            notes += ("the shared position bias to one for each block",)
        if config.norm_after_pooling and not self.norm_after_pooling and "norm.weight" in state:
            state |= {
                "norm.weight": torch.ones_like(state["norm.weight"]),
                "norm.bias": torch.zeros_like(state["norm.bias"]),
            }
            notes += ("a fresh norm, after pooling",)
        return state, notes


# Base: section 4 of arXiv 2111.09886. Tiny and small: widths of arXiv 2012.12877. Nano and micro are ours, for small images
# and laptops.
PRESETS = {
    "vit-nano": ViTConfig(96, 4, 3, patch_size=4),
    "vit-micro": ViTConfig(192, 6, 6, patch_size=8),
    "vit-tiny": ViTConfig(192, 12, 3),
    "vit-small": ViTConfig(384, 12, 6),
    "vit-base": ViTConfig(768, 12, 12),
}
