"""The Swin Transformer V2 encoder (arXiv 2111.09883).

It follows section 3 of the paper: scaled cosine attention and log-spaced continuous position bias (3.2, 3.3), blocks with
residual post-norm (3.2), patch embedding and merging, stages and variants (3.5).

Shape letters: B images, H W height and width of a feature map in tokens, C channels, h heads, D channels of a head,
M windows of one image, N tokens of one window. Sizes are (height, width). Images are (B, channels, height, width);
feature maps are (B, H, W, C) inside and (B, C, H, W) where they are returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simmim.encoders.base import Encoder, EncoderOutput, Size
from simmim.encoders.swinv2.config import SwinV2Config, as_pair
from simmim.encoders.swinv2.geometry import (
    additive_mask,
    log_spaced_coords,
    merge_windows,
    partition,
    relative_position_index,
    shift_mask,
    shift_regions,
    window_labels,
)
from simmim.execution import at_least_float32, without_autocast

MAX_LOGIT_SCALE = math.log(100.0)  # temperature never below 0.01, section 3.2
INITIAL_LOGIT_SCALE = math.log(10.0)
MAX_BIAS = 16.0  # of the position bias, which is between 0 and this
CPB_HIDDEN = 512  # of the MLP of the continuous position bias, section 3.3
SMALLEST_NORM = 1e-12  # by which queries and keys are divided; torch's default
# The most logits of a piece of sequential attention, which computes fewer heads at a time to stay below: 64 MiB in float32.
PIECE_LOGITS = 2**24


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows with log-spaced continuous position bias (sections 3.2 and 3.3).

    similarity(i, j) = cos(q_i, k_j) / τ + B_ij, with 1 / τ = exp(logit_scale) per head, at most 100, and
    B = 16 · sigmoid(MLP(log-spaced offset)). Queries and values have a bias, keys have none.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
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
        return bias_of_pairs(table, relative_position_index(window, table.device))

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
        qkv = rearrange(F.linear(x, self.qkv.weight, qkv_bias), "b n (t h d) -> b n t h d", t=3, h=self.num_heads)
        with without_autocast(x.device):  # see `attend`
            scale, table = self.inverse_temperature(), self.position_table(window, pretrained)
        index = relative_position_index(window, x.device)
        if windows_at_once is None:
            mixed = attend(qkv, scale, table, index, mask)
        else:
            mixed = attend_sequentially(qkv, scale, table, index, mask, windows_at_once)
        return self.proj(mixed.flatten(-2))


def attend(qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled cosine attention within each window: (B · M, N, 3, h, D) to (B · M, N, h, D).

    Args:
        scale: (h, 1, 1), 1 / τ.
        table: (offsets, h), the position bias of each offset.
        index: (N · N,), the offset of each pair of tokens, as from `relative_position_index`.
        mask: as in `WindowAttention.forward`.
    """
    q, k, v = rearrange(qkv, "b n t h d -> t b h n d")
    # Logits reach 100 + 16, which bfloat16, with 8 bits, would round to multiples of 0.5. So logits, bias and softmax are
    # float32 under autocast. Values may be bfloat16.
    with without_autocast(qkv.device):
        q = F.normalize(at_least_float32(q), dim=-1, eps=SMALLEST_NORM)
        k = F.normalize(at_least_float32(k), dim=-1, eps=SMALLEST_NORM)
        logits = (q * scale) @ k.transpose(-2, -1) + bias_of_pairs(table, index)
        if mask is not None:
            mask = additive_mask(mask) if mask.ndim == 2 else mask
            logits = rearrange(logits, "(b m) h i j -> b m h i j", m=len(mask))
            logits = (logits + mask.to(logits.dtype)[:, None]).flatten(0, 1)
        attention = logits.softmax(dim=-1)
    return rearrange(attention.to(v.dtype) @ v, "b h n d -> b n h d")


def attend_sequentially(
    qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, regions: Tensor | None, windows_at_once: int
) -> Tensor:
    """`attend` to one piece after another: the sequential self-attention computation of section 3.4.

    A piece has `windows_at_once` windows and as many heads as `PIECE_LOGITS` allows. The backward pass computes each
    piece again, so neither pass holds the logits or biases of more than one.

    Args:
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


def recompute(function, *arguments):
    """function(*arguments), computed again in the backward pass, so that only `arguments` are kept. Nothing random in it."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def bias_of_pairs(table: Tensor, index: Tensor) -> Tensor:
    """The position bias of each offset, (offsets, h), to that of each pair of tokens, (h, N, N)."""
    return rearrange(table.index_select(0, index), "(i j) h -> h i j", i=math.isqrt(len(index)))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a branch of an image with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active:
            return x
        return x * self.factors(x).view(-1, *(1,) * (x.ndim - 1))

    @property
    def is_active(self) -> bool:
        """Whether branches are dropped."""
        return self.training and self.rate > 0.0

    def factors(self, x: Tensor) -> Tensor:
        """Random factors of the branch, 0 or 1 / (1 − rate) per image of x: (B,)."""
        return x.new_empty(len(x)).bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class SwinV2Block(nn.Module):
    """Shifted-window attention and MLP, each normalized before it is added to the main path (residual post-norm).

    Maps that the window does not divide are padded with zeros at the bottom and right, and cropped afterwards. Padding
    tokens are attended to like any other. `shift_before_padding` is that of `SwinV2Config`.
    """

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
        super().__init__()
        self.window_size, self.shifted, self.pretrained_window = window_size, shifted, pretrained_window
        self.shift_before_padding = shift_before_padding
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
        windows = self.attn(windows, window, self.pretrained(window), mask, windows_at_once)
        return merge_windows(windows, window, shift, padded, size, self.shift_before_padding)

    def geometry(self, size: Size) -> tuple[Size, Size, Size]:
        """The window, its shift and the size padded to whole windows, for a map of `size`."""
        window = tuple(min(self.window_size, side) for side in size)
        # An axis that one window covers is not shifted.
        shift = tuple(w // 2 if self.shifted and side > w else 0 for side, w in zip(size, window))
        return window, shift, tuple(-(-side // w) * w for side, w in zip(size, window))  # type: ignore[return-value]

    def pretrained(self, window: Size) -> Size:
        """The window that scales the coordinates of the position bias."""
        return as_pair(self.pretrained_window) if self.pretrained_window else window


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
        # Channels last in memory. The convolution keeps that, so its result needs no copy to become tokens.
        images = rearrange(rearrange(images, "b c h w -> b h w c").contiguous(), "b h w c -> b c h w")
        return self.norm(rearrange(self.proj(images), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels: 2 × 2 neighbors are concatenated, reduced and, as new in V2, normalized."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C). Odd sides are padded with zeros."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # The four neighbors in column-major order, which published weights expect.
        return self.norm(self.reduction(rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)))


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


class SwinV2(Encoder):
    """The Swin Transformer V2 encoder in plain PyTorch. `simmim.encoders.swinv2.kernels.use` adds kernels to it.

    One encoder supports images of any height and width. At sizes that need no padding the result is that of the paper.

    Args:
        config: the architecture, usually from a preset: `SwinV2(SwinV2Config.from_preset("tiny", window_size=12))`.
        checkpoint_activations, sequential_attention: those of `Encoder`.

    Raises:
        ValueError: when `sequential_attention` is not positive.
    """

    config: SwinV2Config
    supports_sequential_attention = True

    def __init__(
        self, config: SwinV2Config, checkpoint_activations: bool = False, sequential_attention: int | None = None
    ) -> None:
        super().__init__(config, checkpoint_activations, sequential_attention)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, config.embed_dim)
        blocks = config.num_blocks
        rates = [config.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
        self.layers = nn.ModuleList()
        for index, depth in enumerate(config.depths):
            self.layers.append(Stage(config, index, rates[:depth]))
            rates = rates[depth:]
        self.norm = nn.LayerNorm(config.dims[-1])
        self.reset_parameters()

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
        for stage in self.layers:
            for block in stage.blocks:
                x = self.run_block(block, x, self.sequential_attention, groups)
            if return_stages:
                stages.append(rearrange(x, "b h w c -> b c h w"))
            if stage.downsample is not None:
                x = stage.downsample(x)
                # The four tokens that a merging joins are of one group.
                groups = None if groups is None else groups[:, ::2, ::2]
        x = self.norm(x)
        return EncoderOutput(
            rearrange(x, "b h w c -> b c h w"), x.mean(dim=(1, 2)), tuple(stages) if return_stages else None
        )

    # --- parts and parameters, for training --------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """All blocks in order."""
        return [block for stage in self.layers for block in stage.blocks]

    def named_stages(self) -> dict[str, nn.Module]:
        """stage0.block0, …, stage0.merging, stage1.block0, …."""
        modules: dict[str, nn.Module] = {}
        for number, stage in enumerate(cast(Iterable[Stage], self.layers)):
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

    def no_decay(self) -> tuple[str, ...]:
        """The MLPs of the position bias, and temperatures.

        The reference intends this for both. In its pre-training the pattern misses the encoder's prefix, so that the MLPs do
        decay; its fine-tuning is correct.
        """
        return ("cpb_mlp", "logit_scale")
