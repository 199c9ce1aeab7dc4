"""What both kinds of kernels check before they replace the reference implementation of a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_modified(module: nn.Module) -> bool:
    """Whether a module has hooks or a replaced `forward`, so that calling it does more than its class defines."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def product_dtype(weight: Tensor) -> torch.dtype:
    """The type of products with a weight: what autocast casts to, else the weight's own type."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
