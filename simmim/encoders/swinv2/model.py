"""The Swin Transformer V2 encoder (arXiv 2111.09883).

It follows section 3 of the paper: scaled cosine attention and log-spaced continuous position bias (3.2, 3.3), blocks with
residual post-norm (3.2), patch embedding and merging, stages and variants (3.5).

Shape letters: B images, H W height and width of a feature map in tokens, C channels, h heads, D channels of a head,
M windows of one image, N tokens of one window. Sizes are (height, width). Images are (B, channels, height, width);
feature maps are (B, H, W, C) inside and (B, C, H, W) where they are returned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.base import EncoderConfig, Size
from simmim.encoders.layers import DropPath, Mlp, ProductWithBias, RowIndex
from simmim.encoders.shifted_windows.config import as_pair
from simmim.encoders.shifted_windows.geometry import offset_index
from simmim.encoders.shifted_windows.model import (
    ShiftedWindowBlock,
    ShiftedWindowEncoder,
    attend_sequentially,
    attention_weights,
    bias_of_pairs,
    concatenate_neighbors,
)
from simmim.encoders.swinv2.config import SwinV2Config
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.execution import at_least_float32, without_autocast

MAX_LOGIT_SCALE = math.log(100.0)  # temperature never below 0.01, section 3.2
INITIAL_LOGIT_SCALE = math.log(10.0)
MAX_BIAS = 16.0  # of the position bias, which is between 0 and this
CPB_HIDDEN = 512  # of the MLP of the continuous position bias, section 3.3
SMALLEST_NORM = 1e-12  # by which queries and keys are divided; torch's default


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows with log-spaced continuous position bias (sections 3.2 and 3.3).

    similarity(i, j) = cos(q_i, k_j) / τ + B_ij, with 1 / τ = exp(logit_scale) per head, at most 100, and
    B = 16 · sigmoid(MLP(log-spaced offset)). Queries and values have a bias, keys have none.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = ProductWithBias(dim, 3 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), INITIAL_LOGIT_SCALE))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, CPB_HIDDEN), nn.ReLU(), nn.Linear(CPB_HIDDEN, num_heads, bias=False))
        self.proj = nn.Linear(dim, dim)

    def position_table(self, window: Size, pretrained: Size) -> Tensor:
        """B of equation 3 for each offset between two tokens of a window, in the order of `log_spaced_coords`.

        Returns:
            ((2·height − 1) · (2·width − 1), h), at least float32.
        """
        weight: Tensor = self.cpb_mlp[0].weight  # type: ignore[assignment]
        coords = log_spaced_coords(window, pretrained, weight.device).to(weight.dtype)
        return MAX_BIAS * torch.sigmoid(at_least_float32(self.cpb_mlp(coords)))

    def position_bias(self, window: Size, pretrained: Size) -> Tensor:
        """B of equation 3 for each pair of tokens of a window: (h, N, N), at least float32."""
        table = self.position_table(window, pretrained)
        return bias_of_pairs(table, offset_index(window, table.device))

    def inverse_temperature(self) -> Tensor:
        """1 / τ of each head, (h, 1, 1), at least float32."""
        return at_least_float32(self.logit_scale).clamp(max=MAX_LOGIT_SCALE).exp()

    def forward(
        self, x: Tensor, window: Size, pretrained: Size, mask: Tensor | None, windows_at_once: int | None = None
    ) -> Tensor:
        """(B · M, N, C) to the same shape.

        Args:
            mask: (M, N, N) as from `shift_mask`, (M, N) as from `shift_regions`, or (B · M, N) as from `window_labels`;
                None where all tokens of a window attend to one another.
            windows_at_once: number of windows to attend to at a time (`attend_sequentially`); None for all.
        """
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = rearrange(self.qkv(x, qkv_bias), "b n (t h d) -> b n t h d", t=3, h=self.num_heads)
        with without_autocast(x.device):  # see `attend`
            scale, table = self.inverse_temperature(), self.position_table(window, pretrained)
        index = offset_index(window, x.device)
        if windows_at_once is None:
            mixed = attend(qkv, scale, table, index, mask)
        else:
            mixed = attend_sequentially(attend, qkv, scale, table, index, mask, windows_at_once)
        return self.proj(mixed.flatten(-2))


def attend(qkv: Tensor, scale: Tensor, table: Tensor, index: RowIndex, mask: Tensor | None) -> Tensor:
    """Scaled cosine attention within each window: (B · M, N, 3, h, D) to (B · M, N, h, D).

    Args:
        scale: (h, 1, 1), 1 / τ.
        table: (offsets, h), the position bias of each offset.
        index: the offset of each pair of tokens, as from `offset_index`.
        mask: as in `WindowAttention.forward`.
    """
    q, k, v = rearrange(qkv, "b n t h d -> t b h n d")
    # Logits reach 100 + 16, which bfloat16, with 8 bits, would round to multiples of 0.5. So logits, bias and softmax are
    # float32 under autocast. Values may be bfloat16.
    with without_autocast(qkv.device):
        q = F.normalize(at_least_float32(q), dim=-1, eps=SMALLEST_NORM)
        k = F.normalize(at_least_float32(k), dim=-1, eps=SMALLEST_NORM)
        logits = (q * scale) @ k.transpose(-2, -1) + bias_of_pairs(table, index)
        attention = attention_weights(logits, mask)
    return rearrange(attention.to(v.dtype) @ v, "b h n d -> b n h d")


class SwinV2Block(ShiftedWindowBlock):
    """Shifted-window attention and MLP, each normalized before it is added to the main path (residual post-norm)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shifted: bool,
        pretrained_window: int | Size | None,
        mlp_ratio: float,
        drop_path: float,
        extra_norm: bool,
        shift_before_padding: bool = False,
    ) -> None:
        super().__init__(window_size, shifted, shift_before_padding)
        self.pretrained_window = pretrained_window
        self.attn = WindowAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else nn.Identity()

    def forward(self, x: Tensor, windows_at_once: int | None = None, groups: Tensor | None = None) -> Tensor:
        """(B, H, W, C) to the same shape.

        Args:
            windows_at_once: that of `WindowAttention.forward`.
            groups: (B, H, W) uint8, groups of tokens that do not attend to one another; the window divides the map.
        """
        x = x + self.drop_path(self.norm1(self.windowed_attention(x, windows_at_once, groups)))
        x = x + self.drop_path(self.norm2(self.mlp(x)))
        return self.norm3(x)

    def attend(self, windows: Tensor, window: Size, mask: Tensor | None, windows_at_once: int | None) -> Tensor:
        """Attention within windows, (B · M, N, C) to the same shape."""
        return self.attn(windows, window, self.pretrained(window), mask, windows_at_once)

    def pretrained(self, window: Size) -> Size:
        """The window that scales the coordinates of the position bias."""
        return as_pair(self.pretrained_window) if self.pretrained_window else window


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels: 2 × 2 neighbors are concatenated, reduced and, as new in V2, normalized."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C). Odd sides are padded with zeros."""
        return self.norm(self.reduction(concatenate_neighbors(x)))


class Stage(nn.Module):
    """Blocks at one resolution, every second one with shifted windows, and the merging to the next stage."""

    def __init__(self, config: SwinV2Config, index: int, drop_paths: list[float]) -> None:
        super().__init__()
        depth, dim = config.depths[index], config.dims[index]
        every = config.extra_norm_every if index == 2 else 0
        pretrained = config.pretrained_window_sizes
        self.blocks = nn.ModuleList(
            SwinV2Block(
                dim,
                config.num_heads[index],
                config.window_size,
                shifted=block % 2 == 1,
                pretrained_window=pretrained[index] if pretrained else None,
                mlp_ratio=config.mlp_ratio,
                drop_path=drop_paths[block],
                extra_norm=bool(every) and (block + 1) % every == 0,
                shift_before_padding=config.shift_before_padding,
            )
            for block in range(depth)
        )
        last = index == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(dim)


class SwinV2(ShiftedWindowEncoder):
    """The Swin Transformer V2 encoder in plain PyTorch. `simmim.encoders.swinv2.kernels.use` adds kernels to it.

    One encoder supports images of any height and width. At sizes that need no padding the result is that of the paper.

    Args:
        config: the architecture, usually from a preset: `SwinV2(SwinV2Config.from_preset("tiny", window_size=12))`.
        checkpoint_activations, sequential_attention: those of `Encoder`.

    Raises:
        ValueError: when `sequential_attention` is not positive.
    """

    config: SwinV2Config

    def build_stage(self, index: int, drop_paths: list[float]) -> Stage:
        """`Stage` of this architecture."""
        return Stage(self.config, index, drop_paths)

    def change_config(self, config: EncoderConfig) -> None:
        """As `Encoder.change_config`: other windows. The continuous position bias is scaled as before."""
        super().change_config(config)
        for block in self.blocks():
            block.window_size = self.config.window_size  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Initialize as the reference does.

        Linear weights are from a truncated normal distribution of standard deviation 0.02. The norms of both branches of a
        block have zero weight, so that each block is the identity. The patch projection keeps PyTorch's default.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SwinV2Block):
                nn.init.zeros_(module.norm1.weight)
                nn.init.zeros_(module.norm2.weight)

    def no_decay(self) -> tuple[str, ...]:
        """The MLPs of the position bias, and temperatures.

        The reference intends this for both. In its pre-training the pattern misses the encoder's prefix, so that the MLPs do
        decay; its fine-tuning is correct.
        """
        return ("cpb_mlp", "logit_scale")
