"""What decides whether kernels may stand in for the encoder's own lines, and why they do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_modified(part: nn.Module) -> bool:
    """Whether calling it does more or else than its class says."""
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__
    )


def product_type(weight: Tensor) -> torch.dtype:
    """What products with a weight are computed in: what autocast casts to, else its own type."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
