"""What decides whether kernels may stand in for the encoder's own lines, and why they do not."""
from __future__ import annotations

import torch
from torch import Tensor, nn


def changed(part: nn.Module) -> bool:
    """Whether calling it does more or else than its class says."""
    return bool(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        or "forward" in part.__dict__
    )  # fmt: skip


def plainly_eager() -> bool:
    """Neither compiling, tracing, exporting, on tensors without numbers, nor under a transform of torch.func."""
    modes = torch._C._TorchDispatchModeKey
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))
    )


def product_type(weight: Tensor) -> torch.dtype:
    """What products with a weight are computed in: what autocast casts to, else its own type."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def first_line(error: Exception) -> str:
    """What an error says, as one line; its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
