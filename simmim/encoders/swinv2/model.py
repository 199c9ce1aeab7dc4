"""The Swin Transformer V2 encoder (arXiv 2111.09883).

Read it from top to bottom as the paper's section 3: log-spaced continuous position bias (3.3), scaled cosine attention and
residual post-norm (3.2), stages and variants (3.5).

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
)
from simmim.execution import at_least_float32, without_autocast

MAX_LOGIT_SCALE = math.log(100.0)  # temperature never below 0.01, section 3.2
INITIAL_LOGIT_SCALE = math.log(10.0)
CPB_HIDDEN = 512
# Sequential attention takes fewer heads at once where a piece of all heads would have more logits: 64 MiB in float32.
PIECE_LOGITS = 2**24


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows with log-spaced continuous position bias (sections 3.2 and 3.3).

    similarity(i, j) = cos(q_i, k_j) / τ + B_ij, with 1 / τ = exp(logit_scale) per head, never above 100, and
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
        """B of equation 3 for each offset between two tokens of a window, in the order of `log_spaced_coords`:
        ((2·height − 1) · (2·width − 1), h), at least float32."""
        weight = self.cpb_mlp[0].weight
        coords = log_spaced_coords(window, pretrained, weight.device).to(weight.dtype)
        return bias_of_offsets(self.cpb_mlp, coords)

    def position_bias(self, window: Size, pretrained: Size) -> Tensor:
        """B of equation 3 for one window: (h, N, N), at least float32."""
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
            mask: (M, N, N) as from `shift_mask`, or (M, N) as from `shift_regions`; None where windows are not shifted.
            windows_at_once: attend piece by piece (`attend_in_pieces`); None to all windows together.
        """
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = rearrange(F.linear(x, self.qkv.weight, qkv_bias), "b n (t h d) -> b n t h d", t=3, h=self.num_heads)
        with without_autocast(x.device):  # see `attend`
            scale, table = self.inverse_temperature(), self.position_table(window, pretrained)
        index = relative_position_index(window, x.device)
        if windows_at_once is None:
            mixed = attend(qkv, scale, table, index, mask)
        else:
            mixed = attend_in_pieces(qkv, scale, table, index, mask, windows_at_once)
        return self.proj(mixed.flatten(-2))


def attend(qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled cosine attention of each window to itself: (B · M, N, 3, h, D) to (B · M, N, h, D).

    Args:
        scale: (h, 1, 1), 1 / τ.
        table: position bias of each offset, (offsets, h), and
        index: the offset of each pair of tokens, (N · N,), as `relative_position_index`.
        mask: as in `WindowAttention.forward`.
    """
    q, k, v = rearrange(qkv, "b n t h d -> t b h n d")
    # Logits reach 100 + 16: bfloat16, with 8 bits, would round them to halves. Logits, bias and softmax are
    # float32 under autocast; what they weigh may be bfloat16.
    with without_autocast(qkv.device):
        q = F.normalize(at_least_float32(q), dim=-1)
        k = F.normalize(at_least_float32(k), dim=-1)
        logits = (q * scale) @ k.transpose(-2, -1) + bias_of_pairs(table, index)
        if mask is not None:
            mask = additive_mask(mask) if mask.ndim == 2 else mask
            logits = rearrange(logits, "(b m) h i j -> b m h i j", m=len(mask))
            logits = (logits + mask.to(logits.dtype)[:, None]).flatten(0, 1)
        attention = logits.softmax(dim=-1)
    return rearrange(attention.to(v.dtype) @ v, "b h n d -> b n h d")


def attend_in_pieces(
    qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, regions: Tensor | None, windows_at_once: int
) -> Tensor:
    """`attend`, to so many windows and as many heads as `PIECE_LOGITS` allows, one piece after another: the paper's
    sequential self-attention computation.

    The backward pass computes each piece again, so neither pass holds the logits or biases of more than one.

    Args:
        regions: (M, N) as from `shift_regions`; None where windows are not shifted.
    """
    logits_a_head = min(windows_at_once, len(qkv)) * qkv.shape[1] ** 2
    heads_at_once = max(PIECE_LOGITS // logits_a_head, 1)
    # Splits and not slices: the gradient of every slice would be as large as the whole.
    groups, scales, tables = qkv.split(windows_at_once), scale.split(heads_at_once), table.split(heads_at_once, dim=1)
    labels = [None] * len(groups)
    if regions is not None:
        labels = regions.repeat(len(qkv) // len(regions), 1).split(windows_at_once)
    mixed = []
    for group, label in zip(groups, labels):
        pieces = zip(group.split(heads_at_once, dim=3), scales, tables)
        mixed.append(torch.cat([recomputed(attend, *piece, index, label) for piece in pieces], dim=2))
    return torch.cat(mixed)


def recomputed(function, *args):
    """function(*args), computed again in the backward pass, which so keeps nothing but `args`. Nothing random."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def bias_of_offsets(mlp: nn.Module, coords: Tensor) -> Tensor:
    """B of equation 3 for coordinates, (offsets, 2): (offsets, h), at least float32."""
    return 16 * torch.sigmoid(at_least_float32(mlp(coords)))


def bias_of_pairs(table: Tensor, index: Tensor) -> Tensor:
    """A value for each offset, (offsets, h), to one for each pair of tokens, (h, N, N)."""
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
    """Stochastic depth (arXiv 1603.09382): in training, drops a branch for a whole image with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        return x * self.factors(x).view(-1, *(1,) * (x.ndim - 1))

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.rate > 0.0

    def factors(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 − rate) for each image of x: (B,)."""
        return x.new_empty(len(x)).bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class SwinV2Block(nn.Module):
    """Shifted-window attention and MLP, each normalized before it joins the main path (residual post-norm).

    Maps that the window does not divide are padded with zeros at the bottom and right and cropped after; padded tokens
    are attended to like any other. `shift_before_padding` is as in `SwinV2Config`.
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

    def forward(self, x: Tensor, windows_at_once: int | None = None) -> Tensor:
        """(B, H, W, C) to the same shape, attending to this number of windows at a time; None for all."""
        x = x + self.drop_path(self.norm1(self.windowed_attention(x, windows_at_once)))
        x = x + self.drop_path(self.norm2(self.mlp(x)))
        return self.norm3(x)

    def geometry(self, size: Size) -> tuple[Size, Size, Size]:
        """On a map of `size`: the window, its shift, and the size padded to whole windows."""
        window = tuple(min(self.window_size, side) for side in size)
        # A map that one window covers has nothing to shift.
        shift = tuple(w // 2 if self.shifted and side > w else 0 for side, w in zip(size, window))
        return window, shift, tuple(-(-side // w) * w for side, w in zip(size, window))

    def pretrained(self, window: Size) -> Size:
        """The window by which position-bias coordinates are scaled."""
        return as_pair(self.pretrained_window) if self.pretrained_window else window

    def windowed_attention(self, x: Tensor, windows_at_once: int | None = None) -> Tensor:
        """Attention inside the block's windows: pad, shift, partition, attend, and back."""
        size = x.shape[1:3]
        window, shift, padded = self.geometry(size)
        windows = partition(x, window, shift, padded, self.shift_before_padding)
        # The mask of all windows, N times their labels, would be the largest tensor left in sequential attention.
        mask_of = shift_mask if windows_at_once is None else shift_regions
        mask = mask_of(padded, window, shift, x.device) if any(shift) else None
        windows = self.attn(windows, window, self.pretrained(window), mask, windows_at_once)
        return merge_windows(windows, window, shift, padded, size, self.shift_before_padding)


class PatchEmbed(nn.Module):
    """Patches to tokens by one linear layer, then a norm. Images that the patch does not divide are padded with 0."""

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
        # In memory channels come last, as tokens have them: a convolution keeps that, and nothing is turned around after it.
        images = rearrange(rearrange(images, "b c h w -> b h w c").contiguous(), "b h w c -> b c h w")
        return self.norm(rearrange(self.proj(images), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels: 2 × 2 neighbors joined, reduced, and, new in V2, normalized after."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C); odd sides are padded with zeros."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Column-major order of the four neighbors, as published weights expect it.
        return self.norm(self.reduction(rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)))


class Stage(nn.Module):
    """Blocks at one resolution, every second with shifted windows, and the merging that leads to the next stage."""

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
    """The Swin Transformer V2 encoder, by its plain lines; `kernels.use` puts in faster ways to the same numbers.

    One model takes images of any height and width, from call to call. At sizes that need no padding the result is the
    paper's.

    Args:
        config: the architecture, best from a preset: `SwinV2(SwinV2Config.from_preset("tiny", window_size=12))`.
        checkpoint_activations, sequential_attention: as of `Encoder`.

    Raises:
        ValueError: when `sequential_attention` is not a positive number.
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
        """Linear weights from a truncated normal of 0.02, and both norms of each block with zero weight, so that every
        block starts as the identity. The patch projection keeps PyTorch's convolution default, as in the reference."""
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
        """Images to the tokens of the first stage, (B, H, W, C)."""
        self.check_images(images)
        return self.patch_embed(images)

    def encode(self, tokens: Tensor, return_stages: bool = False) -> EncoderOutput:
        """Tokens of the first stage, (B, H, W, C), through all stages and the final norm."""
        x, stages = tokens, []
        for stage in self.layers:
            for block in stage.blocks:
                if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                    x = checkpoint(block, x, self.sequential_attention, use_reentrant=False)
                else:
                    x = block(x, self.sequential_attention)
            if return_stages:
                stages.append(rearrange(x, "b h w c -> b c h w"))
            if stage.downsample is not None:
                x = stage.downsample(x)
        x = self.norm(x)
        return EncoderOutput(
            rearrange(x, "b h w c -> b c h w"), x.mean(dim=(1, 2)), tuple(stages) if return_stages else None
        )

    # --- what the rest of the toolkit asks of its parts --------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """All blocks in order."""
        return [block for stage in self.layers for block in stage.blocks]

    def named_stages(self) -> dict[str, nn.Module]:
        """stage0.block0, …, stage0.merging, stage1.block0, …."""
        parts: dict[str, nn.Module] = {}
        for number, stage in enumerate(self.layers):
            parts |= {f"stage{number}.block{index}": block for index, block in enumerate(stage.blocks)}
            if stage.downsample is not None:
                parts[f"stage{number}.merging"] = stage.downsample
        return parts

    def stage_modules(self) -> list[list[nn.Module]]:
        """Each stage with its merging; the patch embedding with the first."""
        return [[self.patch_embed, self.layers[0]], *([stage] for stage in self.layers[1:])]

    def layer_of(self, name: str) -> int:
        """0 for the patch embedding, 1 … n for the blocks, a merging as the block before it, n + 1 for the final norm."""
        depths, parts = self.config.depths, name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] == "norm":
            return self.num_layers + 1
        if parts[0] == "layers" and parts[2] in ("blocks", "downsample") and int(parts[1]) < len(depths):
            stage = int(parts[1])
            before = sum(depths[:stage])
            return before + (int(parts[3]) + 1 if parts[2] == "blocks" else depths[stage])
        raise KeyError(f"{name} is no parameter of this encoder")

    def no_decay(self) -> tuple[str, ...]:
        """Position-bias MLPs and temperatures. The reference's pre-training means these too, yet decays the former, because
        its match fails on the encoder's prefix; its fine-tuning has it right."""
        return ("cpb_mlp", "logit_scale")
