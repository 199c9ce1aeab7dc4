"""What both versions of the Swin Transformer share of their computation.

Shape letters: B images, H W height and width of a feature map in tokens, C channels, h heads, D channels of a head,
M windows of one image, N tokens of one window. Sizes are (height, width). Images are (B, channels, height, width);
feature maps are (B, H, W, C) inside and (B, C, H, W) where they are returned.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.base import Encoder, EncoderOutput, Size
from simmim.encoders.layers import RowIndex, gather_rows, project_patches, recompute
from simmim.encoders.shifted_windows.config import ShiftedWindowConfig, as_pair
from simmim.encoders.shifted_windows.geometry import (
    additive_mask,
    merge_windows,
    partition,
    shift_mask,
    shift_regions,
    window_labels,
)

# The most logits of a piece of sequential attention, which computes fewer heads at a time to stay below: 64 MiB in float32.
PIECE_LOGITS = 2**24


def bias_of_pairs(table: Tensor, index: RowIndex) -> Tensor:
    """The position bias of each offset, (offsets, h), to that of each pair of tokens, (h, N, N)."""
    return rearrange(gather_rows(table, index), "(i j) h -> h i j", i=math.isqrt(len(index.row_of)))


def attention_weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax of logits, (B · M, h, N, N), to which a mask is added.

    Args:
        mask: as of `ShiftedWindowBlock.attend`.
    """
    if mask is not None:
        mask = additive_mask(mask) if mask.ndim == 2 else mask
        logits = rearrange(logits, "(b m) h i j -> b m h i j", m=len(mask))
        logits = (logits + mask.to(logits.dtype)[:, None]).flatten(0, 1)
    return logits.softmax(dim=-1)


def attend_sequentially(
    attend: Callable[..., Tensor],
    qkv: Tensor,
    scale: Tensor,
    table: Tensor,
    index: RowIndex,
    regions: Tensor | None,
    windows_at_once: int,
) -> Tensor:
    """`attend` to one piece after another: the sequential self-attention computation of Swin V2, section 3.4.

    A piece has `windows_at_once` windows and as many heads as `PIECE_LOGITS` allows. The backward pass computes each
    piece again, so neither pass holds the logits or biases of more than one.

    Args:
        attend: attention within each window by qkv, scale, table, index and mask: (B · M, N, 3, h, D) to (B · M, N, h, D).
        scale: (h, 1, 1).
        table: (offsets, h), the position bias of each offset.
        index: as from `offset_index`.
        regions: (M, N) as from `shift_regions`, or (B · M, N) as from `window_labels`; None for none.
    """
    logits_per_head = min(windows_at_once, len(qkv)) * qkv.shape[1] ** 2
    heads_at_once = max(PIECE_LOGITS // logits_per_head, 1)
    # Splits and not slices: the gradient of each slice would be as large as the whole.
    groups, scales, tables = qkv.split(windows_at_once), scale.split(heads_at_once), table.split(heads_at_once, dim=1)
    region_groups = [None] * len(groups)
    if regions is not None:
        region_groups = regions.repeat(len(qkv) // len(regions), 1).split(windows_at_once)
    mixed = []
    for group, group_regions in zip(groups, region_groups):
        pieces = zip(group.split(heads_at_once, dim=3), scales, tables)
        mixed.append(torch.cat([recompute(attend, *piece, index, group_regions) for piece in pieces], dim=2))
    return torch.cat(mixed)


class ShiftedWindowBlock(nn.Module, ABC):
    """A block with attention inside windows, which are shifted or not.

    Maps that the window does not divide are padded with zeros at the bottom and right, and cropped afterwards. Padding
    tokens are attended to like any other. `shift_before_padding` is that of `ShiftedWindowConfig`.

    Attributes:
        products: names of the parts whose parameters products under autocast alone read. Each is called as a module, so that
            sharding may gather it in half precision.
    """

    products = "attn.qkv", "attn.proj", "mlp"

    def __init__(self, window_size: int | Size, shifted: bool, shift_before_padding: bool) -> None:
        super().__init__()
        self.window_size, self.shifted, self.shift_before_padding = window_size, shifted, shift_before_padding

    @abstractmethod
    def attend(self, windows: Tensor, window: Size, mask: Tensor | None, windows_at_once: int | None) -> Tensor:
        """Attention within windows, (B · M, N, C) to the same shape.

        Args:
            mask: (M, N, N) as from `shift_mask`, (M, N) as from `shift_regions`, or (B · M, N) as from `window_labels`;
                None where all tokens of a window attend to one another.
            windows_at_once: number of windows to attend to at a time (`attend_sequentially`); None for all.
        """

    def windowed_attention(self, x: Tensor, windows_at_once: int | None = None, groups: Tensor | None = None) -> Tensor:
        """Attention within the block's windows: pad, shift, partition, attend, and back."""
        size: Size = x.shape[1:3]  # type: ignore[assignment]
        window, shift, padded = self.geometry(size)
        windows = partition(x, window, shift, padded, self.shift_before_padding)
        # The mask of all windows has N times as many numbers as their regions. In sequential attention it would be the
        # largest tensor.
        make_mask = shift_mask if windows_at_once is None else shift_regions
        mask = make_mask(padded, window, shift, x.device) if any(shift) else None
        mask = mask if groups is None else window_labels(groups, window, shift)
        windows = self.attend(windows, window, mask, windows_at_once)
        return merge_windows(windows, window, shift, padded, size, self.shift_before_padding)

    def geometry(self, size: Size) -> tuple[Size, Size, Size]:
        """The window, its shift and the size padded to whole windows, for a map of `size`."""
        window = tuple(min(largest, side) for largest, side in zip(as_pair(self.window_size), size))
        # An axis that one window covers is not shifted.
        shift = tuple(w // 2 if side > w and self.shifted else 0 for side, w in zip(size, window))
        return window, shift, tuple(-(-side // w) * w for side, w in zip(size, window))  # type: ignore[return-value]


class PatchEmbed(nn.Module):
    """Patches to tokens by a linear layer and a norm. Images that the patch does not divide are padded with zeros."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) to (B, H, W, C)."""
        height, width = images.shape[-2:]
        pad_bottom, pad_right = -height % self.patch_size, -width % self.patch_size
        if pad_bottom or pad_right:
            images = F.pad(images, (0, pad_right, 0, pad_bottom))
        return self.norm(project_patches(self.proj, images, channels_last=True))


def concatenate_neighbors(x: Tensor) -> Tensor:
    """2 × 2 neighbors side by side: (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 4C). Odd sides are padded with zeros."""
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    # The four neighbors in column-major order, which published weights expect.
    return rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)


class ShiftedWindowEncoder(Encoder):
    """Patch embedding, stages of `ShiftedWindowBlock`s with a merging between any two, and a final norm.

    One encoder supports images of any height and width. At sizes that need no padding the result is that of the papers.

    Args:
        config: the architecture.
        checkpoint_activations, sequential_attention: those of `Encoder`.

    Raises:
        ValueError: when `sequential_attention` is not positive.
    """

    config: ShiftedWindowConfig
    supports_sequential_attention = True

    def __init__(
        self, config: ShiftedWindowConfig, checkpoint_activations: bool = False, sequential_attention: int | None = None
    ) -> None:
        super().__init__(config, checkpoint_activations, sequential_attention)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, config.embed_dim)
        blocks = config.num_blocks
        rates = [config.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
        self.layers = nn.ModuleList()
        for index, depth in enumerate(config.depths):
            self.layers.append(self.build_stage(index, rates[:depth]))
            rates = rates[depth:]
        self.norm = nn.LayerNorm(config.dims[-1])
        self.reset_parameters()

    @abstractmethod
    def build_stage(self, index: int, drop_paths: list[float]) -> nn.Module:
        """A module with `blocks`, and `downsample`, the merging to the next stage, or None."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialize as the reference does."""

    def embed(self, images: Tensor) -> Tensor:
        """Images, (B, channels, height, width), to the tokens of the first stage, (B, H, W, C)."""
        self.check_images(images)
        return self.patch_embed(images)

    def encode(self, tokens: Tensor, return_stages: bool = False, groups: Tensor | None = None) -> EncoderOutput:
        """Tokens of the first stage, (B, H, W, C), through all stages and the final norm.

        Args:
            groups: as in `Encoder.encode`. Stochastic depth drops a branch of a whole map, for all groups on it.
        """
        self.check_groups(tokens, groups)
        x, stages = tokens, []
        for index in range(len(self.layers)):
            x, groups = self.run_stage(index, x, groups)
            if return_stages:
                stages.append(rearrange(x, "b h w c -> b c h w"))
        return self.output(x, tuple(stages) if return_stages else None)

    def encode_first(self, tokens: Tensor, num_stages: int, groups: Tensor | None = None) -> Tensor:
        """As `Encoder.encode_first`. Stochastic depth drops a branch of a whole map, for all groups on it."""
        self.check_groups(tokens, groups, num_stages)
        for index in range(num_stages):
            tokens, groups = self.run_stage(index, tokens, groups)
        return tokens

    def encode_rest(self, tokens: Tensor, num_stages: int) -> EncoderOutput:
        """As `Encoder.encode_rest`."""
        for index in range(num_stages, len(self.layers)):
            tokens, _ = self.run_stage(index, tokens, None)
        return self.output(tokens, None)

    def run_stage(self, index: int, x: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The map of the stage before, or the embedded tokens, through the merging between both and the stage's blocks; and
        the groups of the result."""
        if index > 0:
            x = self.layers[index - 1].downsample(x)  # type: ignore[operator, union-attr]
            # The four tokens that a merging joins are of one group.
            groups = None if groups is None else groups[:, ::2, ::2]
        for block in self.layers[index].blocks:  # type: ignore[union-attr]
            x = self.run_block(block, x, self.sequential_attention, groups)
        return x, groups

    def output(self, x: Tensor, stages: tuple[Tensor, ...] | None) -> EncoderOutput:
        """The final norm of the last map."""
        x = self.norm(x)
        return EncoderOutput(rearrange(x, "b h w c -> b c h w"), x.mean(dim=(1, 2)), stages)

    # --- parts and parameters, for training --------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """All blocks in order."""
        return [block for stage in self.layers for block in stage.blocks]

    def named_stages(self) -> dict[str, nn.Module]:
        """stage0.block0, …, stage0.merging, stage1.block0, …."""
        modules: dict[str, nn.Module] = {}
        for number, stage in enumerate(cast(Iterable[Any], self.layers)):
            modules |= {f"stage{number}.block{index}": block for index, block in enumerate(stage.blocks)}
            if stage.downsample is not None:
                modules[f"stage{number}.merging"] = stage.downsample
        return modules

    def stage_modules(self) -> list[list[nn.Module]]:
        """Each stage with its merging. The patch embedding is with the first."""
        return [[self.patch_embed, self.layers[0]], *([stage] for stage in self.layers[1:])]

    def layer_of(self, name: str) -> int:
        """0 for the patch embedding, 1 … n for blocks, n + 1 for the final norm. A merging is of the layer of the block
        before it."""
        depths = self.config.depths
        match name.split("."):
            case ["patch_embed", *_]:
                return 0
            case ["layers", stage, "blocks", block, *_] if int(stage) < len(depths):
                return sum(depths[: int(stage)]) + int(block) + 1
            case ["layers", stage, "downsample", *_] if int(stage) < len(depths):
                return sum(depths[: int(stage) + 1])
            case ["norm", *_]:
                return self.num_layers + 1
        raise KeyError(f"{name} is no parameter of this encoder")
