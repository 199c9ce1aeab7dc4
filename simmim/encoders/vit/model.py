"""The Vision Transformer encoder (arXiv 2010.11929) as SimMIM has it.

It is that of BEiT (arXiv 2106.08254): a class token, norms before the branches, learned factors of the branches' channels,
and relative position biases instead of position embeddings, with biases of their own for the class token.

Shape letters: B images, H W height and width of the map in tokens, C channels, h heads, D channels of a head, G class tokens
(one for each group of tokens), T = G + H · W. Sizes are (height, width). Images are (B, channels, height, width); the map is
(B, H, W, C) inside and (B, C, H, W) where it is returned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.base import Encoder, EncoderOutput, Size
from simmim.encoders.layers import DropPath, Mlp, ProductWithBias, RowIndex, gather_rows, project_patches
from simmim.encoders.position_tables import move_table, num_offsets
from simmim.encoders.shifted_windows.geometry import OTHER_GROUP_LOGIT, pairs_of_offsets, relative_position_index
from simmim.encoders.vit.config import BLOCKS, CLASS_ROWS, SHARED, ViTConfig
from simmim.execution import at_least_float32, cached_constant, has_atomic_sums

NORM_EPSILON = 1e-6
INITIAL_DEVIATION = 0.02


class PatchEmbed(nn.Module):
    """Patches to tokens by a linear layer, and the class token.

    Images that the patch does not divide are padded with zeros.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) to (B, H, W, C), without the class token."""
        height, width = images.shape[-2:]
        pad_bottom, pad_right = -height % self.patch_size, -width % self.patch_size
        if pad_bottom or pad_right:
            images = F.pad(images, (0, pad_right, 0, pad_bottom))
        return project_patches(self.proj, images)


class PositionBias(nn.Module):
    """Relative position biases of a grid and of the class token.

    Args:
        grid: of the table. On another grid the biases are those of the moved table.

    Attributes:
        table: (offsets + 3, h): the offsets of `relative_position_index`; from the class token to patches, from patches to
            it, and from it to itself.
    """

    def __init__(self, grid: Size, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(num_offsets(grid) + CLASS_ROWS, num_heads))

    def forward(self, grid: Size, num_class_tokens: int = 1) -> Tensor:
        """The bias of each pair of tokens, (h, T, T), at least float32."""
        table = at_least_float32(self.table)
        if grid != self.grid:
            offsets, class_rows = table.split((len(table) - CLASS_ROWS, CLASS_ROWS))
            table = torch.cat((move_table(offsets, self.grid, grid), class_rows))
        places = grid, num_class_tokens, table.device
        index = RowIndex(index_of_pairs(*places), pairs_of_rows(*places) if has_atomic_sums(table.device) else None)
        return rearrange(gather_rows(table, index), "(i j) h -> h i j", i=math.isqrt(len(index.row_of)))


@cached_constant(maxsize=64)
def index_of_pairs(grid: Size, num_class_tokens: int, device: torch.device) -> Tensor:
    """The row of `PositionBias.table` for each pair of tokens, class tokens first: (T · T,) int64."""
    rows, count = num_offsets(grid), num_class_tokens
    total = count + grid[0] * grid[1]
    index = torch.empty(total, total, dtype=torch.int64, device=device)
    index[count:, count:] = relative_position_index(grid, device).view(total - count, -1)
    index[:count], index[:, :count], index[:count, :count] = rows, rows + 1, rows + 2
    return index.flatten()


@cached_constant(maxsize=64)
def pairs_of_rows(grid: Size, num_class_tokens: int, device: torch.device) -> Tensor:
    """The pairs of tokens that read each row: `RowIndex.places_of` of `index_of_pairs`."""
    num_patches, count = grid[0] * grid[1], num_class_tokens
    total = num_patches + count
    pairs = pairs_of_offsets(grid, device)
    moved = (pairs // num_patches + count) * total + pairs % num_patches + count
    tokens = torch.arange(total, device=device)
    numbers = tokens[:, None] * total + tokens
    class_rows = numbers[:count, count:], numbers[count:, :count], numbers[:count, :count]
    parts = [torch.where(pairs < num_patches**2, moved, total**2), *(part.reshape(1, -1) for part in class_rows)]
    most = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, most - part.shape[1]), value=total**2) for part in parts])


class Attention(nn.Module):
    """Scaled dot-product attention of all tokens. Queries and values have a bias, keys have none.

    Args:
        grid: of its own position bias; None where the bias is given.
    """

    def __init__(self, dim: int, num_heads: int, grid: Size | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = ProductWithBias(dim, 3 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.position_bias = PositionBias(grid, num_heads) if grid else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) to the same shape.

        Args:
            bias: (h, T, T), added to the logits, at least float32; so are logits and weights.
            mask: (B, T, T) as from `group_mask`; None where all tokens attend to one another.
        """
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = rearrange(self.qkv(x, qkv_bias), "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        if mask is not None:
            logits = logits + mask[:, None].to(logits.dtype)
        mixed = logits.softmax(dim=-1).to(v.dtype) @ v
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))


class ViTBlock(nn.Module):
    """Attention and MLP, each after a norm, their channels scaled by learned factors."""

    products = "attn.qkv", "attn.proj", "mlp"  # as of `ShiftedWindowBlock`
    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        grid = config.grid(config.image_size) if config.position_bias == BLOCKS else None
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.attn = Attention(dim, config.num_heads, grid)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)
        for name in ("gamma_1", "gamma_2"):
            factors = nn.Parameter(torch.full((dim,), config.layer_scale)) if config.layer_scale else None
            self.register_parameter(name, factors)

    def forward(
        self, x: Tensor, grid: Size, num_class_tokens: int = 1, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) to the same shape.

        Args:
            bias: of all blocks, (h, T, T); None where the block has its own.
            mask: as of `Attention.forward`.
        """
        if self.attn.position_bias is not None:
            bias = self.attn.position_bias(grid, num_class_tokens)
        assert bias is not None
        x = x + self.drop_path(scaled(self.attn(self.norm1(x), bias, mask), self.gamma_1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))


def scaled(branch: Tensor, factors: Tensor | None) -> Tensor:
    """(…, C) times factors, (C,); None for 1."""
    return branch if factors is None else factors * branch


class ViT(Encoder):
    """The Vision Transformer encoder in plain PyTorch.

    One encoder supports images of any height and width. At the size of its tables the result is that of the reference.

    Args:
        config: the architecture, usually from a preset: `ViT(PRESETS["vit-base"])`.
        checkpoint_activations: that of `Encoder`. There are no windows for `sequential_attention`.

    Raises:
        ValueError: when `sequential_attention` is given.
    """

    config: ViTConfig

    def __init__(
        self, config: ViTConfig, checkpoint_activations: bool = False, sequential_attention: int | None = None
    ) -> None:
        super().__init__(config, checkpoint_activations, sequential_attention)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, config.embed_dim)
        is_shared = config.position_bias == SHARED
        self.position_bias = PositionBias(config.grid(config.image_size), config.num_heads) if is_shared else None
        rates = [config.drop_path_rate * block / max(config.depth - 1, 1) for block in range(config.depth)]
        self.layers = nn.ModuleList(ViTBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPSILON)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as the reference does.

        Weights and the class token are from a normal distribution of standard deviation 0.02, truncated at one deviation.
        The last weights of both branches of block n are divided by √(2n).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                truncated_normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        truncated_normal(self.patch_embed.class_token)
        with torch.no_grad():
            for number, block in enumerate(self.blocks(), start=1):
                for layer in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]
                    layer.weight /= math.sqrt(2 * number)  # type: ignore[operator, union-attr]

    def embed(self, images: Tensor) -> Tensor:
        """Images, (B, channels, height, width), to the tokens of patches, (B, H, W, C)."""
        self.check_images(images)
        return self.patch_embed(images)

    def encode(self, tokens: Tensor, return_stages: bool = False, groups: Tensor | None = None) -> EncoderOutput:
        """Tokens of patches, (B, H, W, C), with the class token through all blocks and the final norm.

        Args:
            groups: as in `Encoder.encode`. Each group has a class token of its own. Stochastic depth drops a branch of a
                whole map, for all groups on it.
        """
        self.check_groups(tokens, groups)
        grid: Size = tuple(tokens.shape[1:3])  # type: ignore[assignment]
        count = 1 if groups is None else int(groups.max()) + 1
        mask = None if groups is None else group_mask(groups, count)
        bias = None if self.position_bias is None else self.position_bias(grid, count)
        class_tokens = self.patch_embed.class_token.to(tokens.dtype).expand(len(tokens), count, -1)
        x = torch.cat((class_tokens, tokens.flatten(1, 2)), dim=1)
        for block in self.layers:
            x = self.run_block(block, x, grid, count, bias, mask)
        x = x[:, count:].unflatten(1, grid)
        normalized = self.norm(x)
        pooled = self.norm(x.mean(dim=(1, 2))) if self.config.norm_after_pooling else normalized.mean(dim=(1, 2))
        return EncoderOutput(
            rearrange(normalized, "b h w c -> b c h w"),
            pooled,
            (rearrange(x, "b h w c -> b c h w"),) if return_stages else None,
        )

    # --- parts and parameters, for training --------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """All blocks in order."""
        return list(self.layers)

    def named_stages(self) -> dict[str, nn.Module]:
        """stage0.block0, stage0.block1, …."""
        return {f"stage0.block{index}": block for index, block in enumerate(self.layers)}

    def stage_modules(self) -> list[list[nn.Module]]:
        """One stage, with the patch embedding and the position bias of all blocks."""
        shared = [] if self.position_bias is None else [self.position_bias]
        return [[self.patch_embed, *shared, *self.layers]]

    def layer_of(self, name: str) -> int:
        """0 for the patch embedding and the class token, 1 … n for blocks, n + 1 for the final norm and the position bias of
        all blocks."""
        match name.split("."):
            case ["patch_embed", *_]:
                return 0
            case ["layers", block, *_] if int(block) < self.config.depth:
                return int(block) + 1
            case ["norm" | "position_bias", _]:
                return self.num_layers + 1
        raise KeyError(f"{name} is no parameter of this encoder")

    def no_decay(self) -> tuple[str, ...]:
        """The class token. Position biases decay, as in the reference."""
        return ("class_token",)


def group_mask(groups: Tensor, num_groups: int) -> Tensor:
    """Groups of patches, (B, H, W) uint8, to a mask that is added to the logits, (B, T, T) float32. The first tokens are the
    class tokens of the groups in order."""
    numbers = torch.arange(num_groups, dtype=groups.dtype, device=groups.device).expand(len(groups), -1)
    labels = torch.cat((numbers, groups.flatten(1)), dim=1)
    return (labels[:, :, None] != labels[:, None, :]).to(torch.float32) * OTHER_GROUP_LOGIT


def truncated_normal(weight: Tensor) -> None:
    """Fill a weight with values of standard deviation 0.02, truncated at one deviation."""
    nn.init.trunc_normal_(weight, std=INITIAL_DEVIATION, a=-INITIAL_DEVIATION, b=INITIAL_DEVIATION)
