"""How a call is computed: number types under autocast, and whether anything traces it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which nothing is cast down. The meta device has no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_eager() -> bool:
    """Neither compiling, tracing, exporting, on tensors without numbers, nor under a transform of torch.func."""
    modes = torch._C._TorchDispatchModeKey
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))
    )
