"""Layers that several encoder families have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simmim.execution import has_atomic_sums


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ProductWithBias(nn.Linear):
    """A linear layer without bias, which takes one with its input: of queries, keys and values some have none."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, C) to (…, C'). bias: (C',); None for none."""
        return F.linear(x, self.weight, bias)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a branch of an image with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.drops = rate, rate > 0.0
        # torch.compile compiles for each number anew and takes a tensor as an input. It is no buffer, which DDP would send
        # around at each step; on the CPU, so that nothing waits for it wherever the branch is.
        self.kept = torch.tensor(1 - rate, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active:
            return x
        return x * self.factors(x).view(-1, *(1,) * (x.ndim - 1))

    @property
    def is_active(self) -> bool:
        """Whether branches are dropped."""
        return self.training and self.drops

    def factors(self, x: Tensor) -> Tensor:
        """Random factors of the branch, 0 or 1 / (1 − rate) per image of x: (B,)."""
        if torch.compiler.is_compiling():
            return (torch.rand(len(x), device=x.device) < self.kept).to(x.dtype) / self.kept.to(x.dtype)
        return x.new_empty(len(x)).bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def project_patches(proj: nn.Conv2d, images: Tensor, channels_last: bool = False) -> Tensor:
    """A convolution whose stride is its kernel, (B, channels, height, width) to (B, H, W, C).

    On a GPU it is a linear layer of the patches. The gradient of its weight is then the same every time, and its precision
    that of other products: convolutions multiply float32 in TF32 by default.

    Args:
        channels_last: whether the convolution gets its images channels last in memory. It keeps that, so its result needs no
            copy to become tokens, which is faster for small patches.
    """
    if has_atomic_sums(images.device):
        return project_by_linear(proj, images)
    if channels_last:
        images = rearrange(rearrange(images, "b c h w -> b h w c").contiguous(), "b h w c -> b c h w")
    return rearrange(proj(images), "b c h w -> b h w c")


def project_by_linear(proj: nn.Conv2d, images: Tensor) -> Tensor:
    """`project_patches` by a linear layer."""
    height, width = proj.kernel_size
    patches = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=height, q=width)
    return F.linear(patches, proj.weight.flatten(1), proj.bias)


# --- rows of a table -------------------------------------------------------------------------------------------------------


class RowIndex(NamedTuple):
    """The row of a table that each place reads.

    Attributes:
        row_of: (places,) int64.
        places_of: (rows, most places of a row) int64, the places that read each row, filled up with the number of places;
            None where torch's own backward pass adds in a fixed order.
    """

    row_of: Tensor
    places_of: Tensor | None = None


def gather_rows(table: Tensor, index: RowIndex) -> Tensor:
    """The rows of a table, (rows, C), that the places read, (places, C)."""
    if index.places_of is None:
        return table.index_select(0, index.row_of)
    return GatherRows.apply(table, index.row_of, index.places_of)


class GatherRows(torch.autograd.Function):
    """`gather_rows` whose backward pass adds the gradients of a row's places in a fixed order, without atomic additions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, row_of: Tensor, places_of: Tensor) -> Tensor:  # type: ignore[override]
        """(rows, C) to (places, C)."""
        return table.index_select(0, row_of)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the places."""
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """(places, C) to (rows, C)."""
        (places_of,) = ctx.saved_tensors
        grad = torch.cat((grad, grad.new_zeros(1, grad.shape[1])))
        return grad.index_select(0, places_of.flatten()).view(*places_of.shape, -1).sum(dim=1), None, None


def recompute(function, *arguments):
    """function(*arguments), computed again in the backward pass, so that only `arguments` are kept. Nothing random in it."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
