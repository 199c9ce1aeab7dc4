"""The Swin Transformer V2 encoder (arXiv 2111.09883).

Read it top down as the paper's section 3: log-spaced continuous position bias (3.3), scaled cosine attention and
residual post-normalisation (3.2), stages and variants (3.5).

Shape letters: B images, H W height and width of a feature map in tokens, C channels, h heads, D channels of a head,
M windows of one image, N tokens of one window. Sizes are (height, width). Images are (B, channels, height, width);
feature maps are (B, H, W, C) inside and (B, C, H, W) where they are returned.
"""
from __future__ import annotations

import contextlib
import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simmim import fused

Size = tuple[int, int]

# Added to the logits of token pairs that the cyclic shift brought together. The reference's value: below every logit at
# the initial temperature (−10 to 26), though not below every one at the lowest (−100 to 116).
MASKED_LOGIT = -100.0
MAX_LOGIT_SCALE = math.log(100.0)  # temperature never below 0.01, section 3.2
INITIAL_LOGIT_SCALE = math.log(10.0)
CPB_HIDDEN = 512
# Sequential attention takes fewer heads at once where a piece of all heads would have more logits: 64 MiB in float32.
PIECE_LOGITS = 2**24


@dataclass(frozen=True)
class SwinV2Config:
    """Architecture of one encoder.

    Args:
        embed_dim: C, channels of the first stage; each further stage doubles it.
        depths: blocks of each stage, 1 to 5 stages.
        num_heads: attention heads of each stage; each divides its stage's channels.
        window_size: side of the attention windows in tokens; shrinks to the feature map where that is smaller.
        pretrained_window_sizes: for each stage the window its weights were pre-trained with, a number or height and
            width, by which the position-bias coordinates are scaled; None scales by the window in use, as in
            pre-training.
        patch_size: side of a patch in pixels.
        in_channels: channels of the images.
        mlp_ratio: hidden channels of the block's MLP over its channels.
        drop_path_rate: stochastic-depth probability of the last block; rises linearly from 0 at the first.
        extra_norm_every: the paper's additional layer norm on the main path after every so many blocks of the third
            stage (6 for huge and giants); 0 for none.
        shift_before_padding: where windows do not divide the map, shift it first and pad then, as timm does; else the
            other way round, as transformers and published dense-prediction code do.

    Raises:
        ValueError: for a setting out of range, saying what was expected.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 8
    pretrained_window_sizes: tuple[int | Size, ...] | None = None
    patch_size: int = 4
    in_channels: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    extra_norm_every: int = 0
    shift_before_padding: bool = False

    def __post_init__(self) -> None:
        for name in ("embed_dim", "window_size", "patch_size", "in_channels", "extra_norm_every"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a whole number")
        for name in ("mlp_ratio", "drop_path_rate"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a number")
        for name in ("depths", "num_heads"):  # lists arrive from YAML and JSON
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
                raise ValueError(f"{name} is {values!r}: give a list with one whole number a stage")
            object.__setattr__(self, name, tuple(values))
        if self.pretrained_window_sizes is not None:
            if not isinstance(self.pretrained_window_sizes, list | tuple):
                raise ValueError(f"pretrained_window_sizes is {self.pretrained_window_sizes!r}: give a list, one a stage")
            sizes = tuple(tuple(size) if isinstance(size, list) else size for size in self.pretrained_window_sizes)
            object.__setattr__(self, "pretrained_window_sizes", sizes)
        if not 1 <= len(self.depths) <= 5 or min(self.depths) < 1:
            raise ValueError(f"depths is {self.depths}: give 1 to 5 stages with at least one block each")
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads {self.num_heads} has {len(self.num_heads)} stages and depths {self.depths} has "
                f"{len(self.depths)}: give one number of heads a stage"
            )
        for dim, heads in zip(self.dims, self.num_heads):
            if heads < 1 or dim % heads:
                raise ValueError(f"{heads} heads do not divide a stage's {dim} channels: num_heads {self.num_heads}")
        if self.pretrained_window_sizes is not None:
            sides = [side for window in map(as_pair, self.pretrained_window_sizes) for side in window]
            whole = all(isinstance(side, int) and side > 0 for side in sides)
            if len(sides) != 2 * len(self.depths) or not whole:
                raise ValueError(
                    f"pretrained_window_sizes is {self.pretrained_window_sizes}: give one positive size a stage, "
                    f"{len(self.depths)} in all"
                )
        for name in ("embed_dim", "window_size", "patch_size", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}: give a probability in [0, 1)")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}: give a positive number")
        if self.extra_norm_every < 0:
            raise ValueError(f"extra_norm_every is {self.extra_norm_every}: give 0 for none, or a number of blocks")

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per token of each stage's feature map."""
        return tuple(self.patch_size * 2**stage for stage in range(len(self.depths)))

    def windows(self, image_size: Size) -> tuple[Size, ...]:
        """The window each stage uses on images of `image_size`: `window_size`, or the feature map if smaller."""
        height, width = (-(-side // self.patch_size) for side in image_size)
        windows = []
        for _ in self.depths:
            windows.append((min(self.window_size, height), min(self.window_size, width)))
            height, width = -(-height // 2), -(-width // 2)
        return tuple(windows)

    def as_dict(self) -> dict:
        """Plain values for JSON and YAML."""

        def plain(value):
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return {key: plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> SwinV2Config:
        """A row of `PRESETS` with some fields replaced.

        Raises:
            ValueError: for an unknown preset or field, naming the nearest known ones.
        """
        known = {field.name for field in fields(cls)}
        for name in overrides:
            if name not in known:
                raise ValueError(f"unknown encoder setting {name!r}{nearest(name, known)}")
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
        return replace(PRESETS[preset], **overrides)


def as_pair(size: int | Size) -> Size:
    """One number for both sides, or height and width as they are."""
    return (size, size) if isinstance(size, int) else size


def nearest(name: str, known) -> str:
    """The tail of an error message: the nearest known name, and all of them."""
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" known: {', '.join(sorted(known))}"


# Tiny to large: Table 6 of arXiv 2103.14030, kept by Swin V2 (section 3.5). Huge and giant: section 3.5 of
# arXiv 2111.09883, heads of 32 channels, one extra norm on the main path every 6 blocks. giant-1b: the 1-billion model
# of arXiv 2206.04664. Nano and micro are ours, for small images and laptops: heads of 16 channels.
PRESETS = {
    "nano": SwinV2Config(48, (2, 2), (3, 6), window_size=4),
    "micro": SwinV2Config(48, (2, 2, 6, 2), (3, 6, 12, 24)),
    "tiny": SwinV2Config(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": SwinV2Config(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": SwinV2Config(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": SwinV2Config(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "huge": SwinV2Config(352, (2, 2, 18, 2), (11, 22, 44, 88), extra_norm_every=6),
    "giant-1b": SwinV2Config(448, (2, 2, 18, 2), (14, 28, 56, 112), extra_norm_every=6),
    "giant-3b": SwinV2Config(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_every=6),
}


# Coordinates, indices and masks depend on sizes alone. They are cached here and not in buffers, so that one model takes
# any image size and a checkpoint holds nothing but learned weights. Built outside inference mode: a tensor made in an
# evaluation may be needed by a backward pass later.


@lru_cache(maxsize=256)
def log_spaced_coords(window: Size, pretrained: Size, device: torch.device) -> Tensor:
    """Log-spaced relative coordinates of all pairs of tokens in a window, equation 4 of the paper.

    Offsets are scaled so that the pre-training window spans ±8, then sign(x) · log2(1 + |x|) / log2(8).

    Returns:
        ((2·height − 1) · (2·width − 1), 2) float32, rows first.
    """
    with torch.inference_mode(False), torch.no_grad():
        axes = [
            torch.arange(1 - side, side, dtype=torch.float32, device=device) * 8 / max(reference - 1, 1)
            for side, reference in zip(window, pretrained)
        ]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        return torch.sign(coords) * torch.log2(1 + coords.abs()) / math.log2(8)


@lru_cache(maxsize=256)
def relative_position_index(window: Size, device: torch.device) -> Tensor:
    """For each pair of a window's tokens the row of `log_spaced_coords` that holds their offset: (N · N,) int64."""
    height, width = window
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.arange(height, device=device).repeat_interleave(width)
        columns = torch.arange(width, device=device).repeat(height)
        row_offset = rows[:, None] - rows[None, :] + height - 1
        column_offset = columns[:, None] - columns[None, :] + width - 1
        return (row_offset * (2 * width - 1) + column_offset).flatten()


@lru_cache(maxsize=64)
def shift_regions(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """Which tokens of the shifted windows are neighbours in the image: those of one window with the same label.

    Args:
        size: the feature map in tokens, a multiple of the window.

    Returns:
        (M, N) int64 labels from 0 to 3.
    """
    with torch.inference_mode(False), torch.no_grad():
        # The last `shift` rows and columns of the shifted map came from the image's other side.
        rows, columns = (torch.arange(side, device=device) >= side - moved for side, moved in zip(size, shift))
        return rearrange(
            rows[:, None] * 2 + columns[None, :].long(), "(m p) (n q) -> (m n) (p q)", p=window[0], q=window[1]
        )


@lru_cache(maxsize=64)
def shift_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """What keeps apart the tokens of a shifted window that are not neighbours in the image, for all windows.

    Returns:
        (M, N, N) as from `keep_apart`.
    """
    with torch.inference_mode(False), torch.no_grad():
        return keep_apart(shift_regions(size, window, shift, device))


def keep_apart(regions: Tensor) -> Tensor:
    """Labels, (M, N), to what is added to the logits, (M, N, N) float32: 0 inside a region, else `MASKED_LOGIT`."""
    return (regions[:, :, None] != regions[:, None, :]).to(torch.float32) * MASKED_LOGIT


@lru_cache(maxsize=64)
def fused_windows(
    size: Size, window: Size, shift: Size, padded: Size, shift_before_padding: bool, device: torch.device
) -> fused.Windows:
    """`SwinV2Block.windowed_attention`'s way of padding, shifting and partitioning a map, as indices."""
    with torch.inference_mode(False), torch.no_grad():
        tokens = torch.arange(1, 1 + size[0] * size[1], device=device).view(1, *size, 1)
        placed = partition(tokens, window, shift, padded, shift_before_padding).squeeze(-1) - 1
        regions = shift_regions(padded, window, shift, device).to(torch.uint8) if any(shift) else None
        return fused.Windows(placed.int(), regions, relative_position_index(window, device))


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
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, CPB_HIDDEN), nn.ReLU(), nn.Linear(CPB_HIDDEN, num_heads, bias=False)
        )
        self.proj = nn.Linear(dim, dim)
        self.kept_tables: dict[tuple[Size, Size], Tensor] | None = None  # see `SwinV2.position_bias_kept`

    def position_table(self, window: Size, pretrained: Size, by=None) -> Tensor:
        """B of equation 3 for each offset between two tokens of a window, in the order of `log_spaced_coords`:
        ((2·height − 1) · (2·width − 1), h), at least float32; computed as `bias_of_offsets` does, or by another."""
        keep = self.kept_tables is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if keep and (window, pretrained) in self.kept_tables:
            return self.kept_tables[window, pretrained]
        weight = self.cpb_mlp[0].weight
        coords = log_spaced_coords(window, pretrained, weight.device).to(weight.dtype)
        table = (by or bias_of_offsets)(self.cpb_mlp, coords)
        if keep:
            self.kept_tables[window, pretrained] = table
        return table

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
            mask = keep_apart(mask) if mask.ndim == 2 else mask
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


def without_autocast(device: torch.device):
    """A context in which nothing is cast down. The meta device knows no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    """Shifted-window attention and MLP, each normalised before it joins the main path (residual post-norm).

    Maps that the window does not divide are padded with zeros at the bottom and right and cropped after; padded tokens
    are attended to like any other. `shift_before_padding` is as in `SwinV2Config`.
    """

    # What `simmim.fused` knows how to compute: each part's class, those of norm3, which is none of its business, aside.
    PARTS: ClassVar[dict[str, type[nn.Module]]] = {
        "attn": WindowAttention, "attn.qkv": nn.Linear, "attn.proj": nn.Linear, "attn.cpb_mlp": nn.Sequential,
        "attn.cpb_mlp.0": nn.Linear, "attn.cpb_mlp.1": nn.ReLU, "attn.cpb_mlp.2": nn.Linear, "norm1": nn.LayerNorm,
        "mlp": Mlp, "mlp.fc1": nn.Linear, "mlp.act": nn.GELU, "mlp.fc2": nn.Linear, "norm2": nn.LayerNorm,
        "drop_path": DropPath,
    }  # fmt: skip

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
        """(B, H, W, C) to the same shape, attending to so many windows at once; None for all."""
        as_here = getattr(self.windowed_attention, "__func__", None) is SwinV2Block.windowed_attention
        if windows_at_once is None and as_here and fused.takes(self, x):
            return self.norm3(self.fused(x))
        x = x + self.drop_path(self.norm1(self.windowed_attention(x, windows_at_once)))
        x = x + self.drop_path(self.norm2(self.mlp(x)))
        return self.norm3(x)

    def fused(self, x: Tensor) -> Tensor:
        """Both branches joined, as the lines of `forward`, in fewer passes over memory."""
        size = x.shape[1:3]
        window, shift, padded = self.geometry(size)
        windows = fused_windows(tuple(size), window, shift, padded, self.shift_before_padding, x.device)
        with without_autocast(x.device):
            scale = self.attn.inverse_temperature()
            table = self.attn.position_table(window, self.pretrained(window), fused.bias_of_offsets)
        drop = self.drop_path
        keep = drop.factors(x) if drop.active else None
        x, tokens = fused.join_attention(x, self.attn, self.norm1, keep, windows, scale, table)
        return fused.join_mlp(x, tokens, self.mlp, self.norm2, drop.factors(x) if drop.active else None)

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
        if windows_at_once is None and fused.attends(self.attn, x, window, attend):
            return self.attention_by_index(x, window, shift, padded)
        windows = partition(x, window, shift, padded, self.shift_before_padding)
        # The mask of all windows, N times their labels, would be the largest tensor left in sequential attention.
        keep = shift_mask if windows_at_once is None else shift_regions
        mask = keep(padded, window, shift, x.device) if any(shift) else None
        windows = self.attn(windows, window, self.pretrained(window), mask, windows_at_once)
        rows, columns = padded[0] // window[0], padded[1] // window[1]
        x = rearrange(windows, "(b m n) (p q) c -> b (m p) (n q) c", m=rows, n=columns, p=window[0])
        if self.shift_before_padding:
            return roll(x[:, : size[0], : size[1]], shift)
        return roll(x, shift)[:, : size[0], : size[1]]

    def attention_by_index(self, x: Tensor, window: Size, shift: Size, padded: Size) -> Tensor:
        """`windowed_attention` by the kernels for a GPU, which find a window's tokens where they are."""
        attn = self.attn
        windows = fused_windows(tuple(x.shape[1:3]), window, shift, padded, self.shift_before_padding, x.device)
        with without_autocast(x.device):
            scale, bias = attn.inverse_temperature(), attn.position_bias(window, self.pretrained(window))
        qkv = F.linear(x, attn.qkv.weight).flatten(0, 2)
        mixed = fused.window_attention(
            qkv, attn.q_bias, attn.v_bias, scale, bias, windows.token_of, windows.region_of, len(x)
        )
        return attn.proj(mixed.view(*x.shape[:3], -1))


def partition(x: Tensor, window: Size, shift: Size, padded: Size, shift_before_padding: bool) -> Tensor:
    """(B, H, W, C) to windows, (B · M, N, C), padded to whole ones and shifted, in the order that is asked for."""
    back = (-shift[0], -shift[1])
    x = pad_to(roll(x, back), padded) if shift_before_padding else roll(pad_to(x, padded), back)
    return rearrange(x, "b (m p) (n q) c -> (b m n) (p q) c", p=window[0], q=window[1])


def roll(x: Tensor, shift: Size) -> Tensor:
    """(B, H, W, C) moved cyclically down and right."""
    return x.roll(shift, dims=(1, 2)) if any(shift) else x


def pad_to(x: Tensor, size: Size) -> Tensor:
    """(B, H, W, C) with zeros below and right of it."""
    bottom, right = size[0] - x.shape[1], size[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


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
    """Halves the map and doubles the channels: 2 × 2 neighbours joined, reduced, and, new in V2, normalised after."""

    # As `SwinV2Block.PARTS`.
    PARTS: ClassVar[dict[str, type[nn.Module]]] = {"reduction": nn.Linear, "norm": nn.LayerNorm}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C); odd sides are padded with zeros."""
        if fused.takes_merging(self, x):
            return fused.merge(x, self.reduction, self.norm)
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Column-major order of the four neighbours, as published weights expect it.
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


class EncoderOutput(NamedTuple):
    """What the encoder returns.

    Attributes:
        features: (B, C, H, W), the last stage's map after the final norm.
        pooled: (B, C), the mean of `features` over the map.
        stages: on request each stage's map before merging and without the final norm, (B, C_i, H_i, W_i) at
            `SwinV2Config.strides`; else None.
    """

    features: Tensor
    pooled: Tensor
    stages: tuple[Tensor, ...] | None


class SwinV2(nn.Module):
    """The Swin Transformer V2 encoder.

    One model takes images of any height and width, from call to call. At sizes that need no padding the result is the
    paper's.

    Args:
        config: the architecture, best from a preset: `SwinV2(SwinV2Config.from_preset("tiny", window_size=12))`.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations: less
            memory, about a third more time, same outputs and gradients.
        sequential_attention: attend to so many windows at once, one group after another, and recompute each group's
            attention in the backward pass, for images so large that attention fills the memory; None for all at once.
            Same outputs and gradients.

    Raises:
        ValueError: when `sequential_attention` is not a positive number.
    """

    def __init__(
        self, config: SwinV2Config, checkpoint_activations: bool = False, sequential_attention: int | None = None
    ) -> None:
        super().__init__()
        if sequential_attention is not None and sequential_attention < 1:
            raise ValueError(f"sequential_attention is {sequential_attention}: give 1 window at once or more, or none")
        self.config = config
        self.checkpoint_activations, self.sequential_attention = checkpoint_activations, sequential_attention
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, config.embed_dim)
        blocks = sum(config.depths)
        rates = [config.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
        self.layers = nn.ModuleList()
        for index, depth in enumerate(config.depths):
            self.layers.append(Stage(config, index, rates[:depth]))
            rates = rates[depth:]
        self.norm = nn.LayerNorm(config.dims[-1])
        self.reset_parameters()

    @property
    def stride(self) -> int:
        """Pixels of the image per token of the last feature map."""
        return self.config.strides[-1]

    @property
    def dim(self) -> int:
        """Channels of the last feature map."""
        return self.config.dims[-1]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's map, for dense heads."""
        return self.config.dims

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per token of each stage's map, for dense heads."""
        return self.config.strides

    def reset_parameters(self) -> None:
        """Linear weights from a truncated normal of 0.02, and both norms of each block with zero gain, so that every
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

    def forward(self, images: Tensor, return_stages: bool = False) -> EncoderOutput:
        """Encode normalised images.

        Args:
            images: (B, channels, height, width), float.
            return_stages: also return the map of every stage.

        Raises:
            ValueError: when the images have another number of channels or dimensions than the encoder takes.
        """
        return self.encode(self.embed(images), return_stages)

    def features(self, images: Tensor, per_stage: bool = False) -> Tensor | tuple[Tensor, ...]:
        """What heads and indexes take: the pooled features, (B, C), or with `per_stage` each stage's map,
        (B, channels[i], H_i, W_i) at strides[i], of normalised images of any size."""
        output = self(images, return_stages=per_stage)
        return output.stages if per_stage else output.pooled

    @contextlib.contextmanager
    def position_bias_kept(self):
        """A context in which each block computes its position bias once for each kind of window, however many batches go
        through it without gradients. Nothing may change the weights in it."""
        attentions = [module for module in self.modules() if isinstance(module, WindowAttention)]
        for attention in attentions:
            attention.kept_tables = {}
        try:
            yield
        finally:
            for attention in attentions:
                attention.kept_tables = None

    def embed(self, images: Tensor) -> Tensor:
        """Images to the tokens of the first stage, (B, H, W, C)."""
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: this encoder takes "
                f"(batch, {self.config.in_channels}, height, width)"
            )
        return self.patch_embed(images)

    def encode(self, x: Tensor, return_stages: bool = False) -> EncoderOutput:
        """Tokens of the first stage, (B, H, W, C), through all stages and the final norm."""
        stages = []
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
