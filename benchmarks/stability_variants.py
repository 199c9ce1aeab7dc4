"""Variants of the Swin V2 encoder for benchmarks/stability.py, with the parts that the Swin V2 paper replaced.

These are pre-normalization, dot-product attention, a table of position biases and linearly spaced coordinates. They exist in
this file only. The default `Variant` computes what `simmim.encoders.swinv2` computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.shifted_windows.geometry import offset_index
from simmim.encoders.shifted_windows.model import bias_of_pairs
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.encoders.swinv2.model import MAX_LOGIT_SCALE, PatchMerging, SwinV2Block, WindowAttention
from simmim.methods.simmim import SimMIM

PATCH_PX, WINDOW = 4, 4
HEAD_CHANNELS = 16


@dataclass(frozen=True)
class Variant:
    """One way to build the encoder. The defaults are Swin V2.

    Args:
        norm: "post", residual post-normalization whose weights start at 0; "post from 1", the same with weights that start
            at 1; "pre", pre-normalization as in Swin V1, with weights that start at 1.
        attention: "cosine" or "dot".
        bias: "log" or "linear" coordinates for the bias network, or "table", one parameter per offset.
    """

    norm: str = "post"
    attention: str = "cosine"
    bias: str = "log"


def build_model(variant: Variant, width: int, depths: tuple[int, ...], channels: int, seed: int = 0) -> SimMIM:
    """SimMIM around a freshly initialized encoder of `variant`.

    Args:
        width: channels of the first stage.
        channels: channels of the images.
    """
    torch.manual_seed(seed)
    heads = tuple(max(1, width * 2**stage // HEAD_CHANNELS) for stage in range(len(depths)))
    config = SwinV2Config(width, depths, heads, window_size=WINDOW, patch_size=PATCH_PX, in_channels=channels)
    return SimMIM(build_encoder(config, variant))


def build_encoder(config: SwinV2Config, variant: Variant) -> SwinV2:
    """An encoder of `variant`, freshly initialized, without kernels."""
    encoder = SwinV2(config)
    for number, stage in enumerate(encoder.layers):
        dim, heads = config.dims[number], config.num_heads[number]
        for index, block in enumerate(stage.blocks):
            if variant.norm == "pre":
                block = PreNormBlock(
                    dim, heads, config.window_size, block.shifted, block.pretrained_window, config.mlp_ratio, 0.0, False
                )
                stage.blocks[index] = block
            block.attn = VariantAttention(dim, heads, config.window_size, variant)
        if variant.norm == "pre" and stage.downsample is not None:
            stage.downsample = PreNormMerging(dim)
    encoder.reset_parameters()
    if variant.norm != "post":
        for block in encoder.blocks():
            nn.init.ones_(block.norm1.weight)
            nn.init.ones_(block.norm2.weight)
    return encoder


class VariantAttention(WindowAttention):
    """Window attention with either similarity and any of the three position biases.

    Args:
        window: side of the windows in training, in tokens.

    Attributes:
        keep_map: whether the next call keeps its attention map.
        last_map: (B · M, h, N, N) attention, and the similarities that it was computed from; None if not kept.
    """

    def __init__(self, dim: int, num_heads: int, window: int, variant: Variant) -> None:
        super().__init__(dim, num_heads)
        self.variant, self.window = variant, window
        self.keep_map = False
        self.last_map: tuple[Tensor, Tensor] | None = None
        if variant.bias == "table":
            self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.table, std=0.02)
            self.cpb_mlp.requires_grad_(False)

    def position_table(self, window, pretrained) -> Tensor:
        """The bias of each offset between two tokens of a window: (offsets, h)."""
        if self.variant.bias == "log":
            return super().position_table(window, pretrained)
        if self.variant.bias == "linear":
            # ±1 over the window of training, where the log-spaced coordinates reach ±1.06.
            axes = [torch.arange(1.0 - side, side) / (self.window - 1) for side in window]
            coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
            return 16 * torch.sigmoid(self.cpb_mlp(coords))
        side = 2 * self.window - 1
        table = rearrange(self.table, "(p q) h -> 1 h p q", p=side)
        size = tuple(2 * length - 1 for length in window)
        if size != (side, side):  # as the paper brings a table to other windows
            table = F.interpolate(table, size, mode="bicubic", align_corners=True)
        return rearrange(table, "1 h p q -> (p q) h")

    def forward(self, x, window, pretrained, mask, windows_at_once=None) -> Tensor:
        """(B · M, N, C) to the same shape; for the default variant the same values as `WindowAttention.forward`."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        if self.variant.attention == "dot":
            similarity = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        else:
            scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
            similarity = (F.normalize(q, dim=-1) * scale) @ F.normalize(k, dim=-1).transpose(-2, -1)
        index = offset_index(window, x.device)
        logits = similarity + bias_of_pairs(self.position_table(window, pretrained), index)
        if mask is not None:
            logits = (rearrange(logits, "(b m) h i j -> b m h i j", m=len(mask)) + mask[:, None]).flatten(0, 1)
        attention = logits.softmax(dim=-1)
        if self.keep_map:
            self.last_map = attention.detach(), similarity.detach()
        return self.proj(rearrange(attention @ v, "b h n d -> b n (h d)"))


class PreNormBlock(SwinV2Block):
    """Swin V1's block: each branch normalizes its input, and its output is added to the main path as it is."""

    def forward(self, x: Tensor, windows_at_once: int | None = None, groups: Tensor | None = None) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.windowed_attention(self.norm1(x), windows_at_once, groups))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PreNormMerging(PatchMerging):
    """Swin V1's merging: the four neighbors are normalized before the reduction, and nothing after it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H/2, W/2, 2C)."""
        return self.reduction(self.norm(rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)))
