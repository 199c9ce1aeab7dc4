"""Layers that several encoder families have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


def recompute(function, *arguments):
    """function(*arguments), computed again in the backward pass, so that only `arguments` are kept. Nothing random in it."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
