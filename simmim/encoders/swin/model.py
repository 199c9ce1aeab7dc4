"""The Swin Transformer encoder (arXiv 2103.14030).

It follows section 3 of the paper: attention with a table of relative position biases in shifted windows (3.2), blocks whose
norms come before their branches, and patch merging (3.1). There is no absolute position embedding, as in SimMIM.

Shape letters: B images, H W height and width of a feature map in tokens, C channels, h heads, D channels of a head,
M windows of one image, N tokens of one window. Sizes are (height, width). Images are (B, channels, height, width);
feature maps are (B, H, W, C) inside and (B, C, H, W) where they are returned.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.base import Size
from simmim.encoders.layers import DropPath, Mlp, RowIndex
from simmim.encoders.position_tables import move_table, num_offsets
from simmim.encoders.shifted_windows.geometry import offset_index
from simmim.encoders.shifted_windows.model import (
    ShiftedWindowBlock,
    ShiftedWindowEncoder,
    attend_sequentially,
    attention_weights,
    bias_of_pairs,
    concatenate_neighbors,
)
from simmim.encoders.swin.config import SwinConfig
from simmim.execution import at_least_float32


class WindowAttention(nn.Module):
    """Scaled dot-product attention inside windows with a table of relative position biases (equation 4 of the paper).

    similarity(i, j) = q_i · k_j / √D + B_ij.

    Args:
        window: of the table. In a smaller window B is that of the moved table.
    """

    def __init__(self, dim: int, num_heads: int, window: Size) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets(window), num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, window: Size, mask: Tensor | None, windows_at_once: int | None = None) -> Tensor:
        """(B · M, N, C) to the same shape.

        Args:
            mask, windows_at_once: as of `ShiftedWindowBlock.attend`.
        """
        qkv = rearrange(self.qkv(x), "b n (t h d) -> b n t h d", t=3, h=self.num_heads)
        scale = qkv.new_full((self.num_heads, 1, 1), qkv.shape[-1] ** -0.5)
        table = at_least_float32(move_table(self.relative_position_bias_table, self.window, window))
        index = offset_index(window, x.device)
        if windows_at_once is None:
            mixed = attend(qkv, scale, table, index, mask)
        else:
            mixed = attend_sequentially(attend, qkv, scale, table, index, mask, windows_at_once)
        return self.proj(mixed.flatten(-2))


def attend(qkv: Tensor, scale: Tensor, table: Tensor, index: RowIndex, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention within each window: (B · M, N, 3, h, D) to (B · M, N, h, D).

    Args:
        scale: (h, 1, 1), 1 / √D.
        table: (offsets, h), the position bias of each offset, at least float32; so are logits and weights.
        index: the offset of each pair of tokens, as from `offset_index`.
        mask: as of `ShiftedWindowBlock.attend`.
    """
    q, k, v = rearrange(qkv, "b n t h d -> t b h n d")
    attention = attention_weights((q * scale) @ k.transpose(-2, -1) + bias_of_pairs(table, index), mask)
    return rearrange(attention.to(v.dtype) @ v, "b h n d -> b n h d")


class SwinBlock(ShiftedWindowBlock):
    """Shifted-window attention and MLP, each after a norm (equation 3 of the paper)."""

    window_size: Size

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Size,
        shifted: bool,
        mlp_ratio: float,
        drop_path: float,
        shift_before_padding: bool = False,
    ) -> None:
        super().__init__(window, shifted, shift_before_padding)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, windows_at_once: int | None = None, groups: Tensor | None = None) -> Tensor:
        """(B, H, W, C) to the same shape.

        Args:
            windows_at_once: as of `attend`.
            groups: (B, H, W) uint8, groups of tokens that do not attend to one another; the window divides the map.
        """
        x = x + self.drop_path(self.windowed_attention(self.norm1(x), windows_at_once, groups))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, windows: Tensor, window: Size, mask: Tensor | None, windows_at_once: int | None) -> Tensor:
        """Attention within windows, (B · M, N, C) to the same shape."""
        return self.attn(windows, window, mask, windows_at_once)


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels: 2 × 2 neighbors are concatenated, normalized and reduced."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C). Odd sides are padded with zeros."""
        return self.reduction(self.norm(concatenate_neighbors(x)))


class Stage(nn.Module):
    """Blocks at one resolution, every second one with shifted windows, and the merging to the next stage."""

    def __init__(self, config: SwinConfig, index: int, drop_paths: list[float]) -> None:
        super().__init__()
        depth, dim = config.depths[index], config.dims[index]
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                config.num_heads[index],
                config.largest_windows[index],
                shifted=block % 2 == 1,
                mlp_ratio=config.mlp_ratio,
                drop_path=drop_paths[block],
                shift_before_padding=config.shift_before_padding,
            )
            for block in range(depth)
        )
        last = index == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(dim)


class Swin(ShiftedWindowEncoder):
    """The Swin Transformer encoder in plain PyTorch.

    One encoder supports images of any height and width. At sizes that need no padding the result is that of the paper.

    Args:
        config: the architecture, usually from a preset: `Swin(PRESETS["swin-base"])`.
        checkpoint_activations, sequential_attention: those of `Encoder`.

    Raises:
        ValueError: when `sequential_attention` is not positive.
    """

    config: SwinConfig

    def build_stage(self, index: int, drop_paths: list[float]) -> Stage:
        """`Stage` of this architecture."""
        return Stage(self.config, index, drop_paths)

    def reset_parameters(self) -> None:
        """Initialize as the reference does: linear weights and tables from a truncated normal distribution of standard
        deviation 0.02. The patch projection keeps PyTorch's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def no_decay(self) -> tuple[str, ...]:
        """The tables of position biases.

        The reference intends this. In its pre-training the pattern misses the encoder's prefix, so that they do decay; its
        fine-tuning is correct.
        """
        return ("relative_position_bias_table",)
