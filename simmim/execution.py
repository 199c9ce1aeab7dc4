"""How a call is computed: number types under autocast, whether anything traces it, and what other processes have."""

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


def rows_of_all_processes(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes that train together, in their order, and how many are before this process's. Each has as
    many. Without gradient."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows.detach(), 0
    every = rows.new_empty(len(rows) * torch.distributed.get_world_size(), *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(every, rows.detach().contiguous())
    return every, len(rows) * torch.distributed.get_rank()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, of the host, on a device, without waiting for what the device has yet to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def is_eager() -> bool:
    """Neither compiling, tracing, exporting, on tensors without numbers, nor under a transform of torch.func."""
    modes = torch._C._TorchDispatchModeKey
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))
    )
