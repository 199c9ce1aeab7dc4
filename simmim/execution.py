"""How a call is computed: number types under autocast, whether anything traces it, and what other processes have."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Tensor])


def cached_constant(maxsize: int) -> Callable[[Function], Function]:
    """A decorator that caches a function of sizes and devices, outside inference mode and without gradients.

    A backward pass may need a tensor that an evaluation has cached. torch.compile traces through the cache and computes the
    tensor at each call; in `constants_in_graphs` it calls the function once, while it compiles, and its graph reads the
    tensor.

    Args:
        maxsize: as of `functools.lru_cache`, whose `cache_clear` and `cache_info` the function gets.
    """

    def decorate(function: Function) -> Function:
        @functools.lru_cache(maxsize)
        def compute(*arguments: Any) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return function(*arguments)

        def constant(*arguments: Any) -> Tensor:
            return compute(*arguments)

        # torch.compile tells the tensors of a graph apart by this name.
        constant.__code__ = constant.__code__.replace(co_name=function.__name__)
        # As torch.compiler.assume_constant_result does, which would import all of the compiler.
        constant._dynamo_marked_constant = True  # type: ignore[attr-defined]

        @functools.wraps(function)
        def call(*arguments: Any) -> Tensor:
            if torch.compiler.is_compiling() and not _num_constants_contexts:
                with torch.no_grad():
                    return function(*arguments)
            return constant(*arguments)

        call.cache_clear, call.cache_info = compute.cache_clear, compute.cache_info  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


_num_constants_contexts = 0


@contextlib.contextmanager
def constants_in_graphs() -> Iterator[None]:
    """A context in which torch.compile takes what `cached_constant` functions return as constants of its graphs. A graph may
    then read one tensor of each such function, as that of a block does."""
    global _num_constants_contexts
    _num_constants_contexts += 1
    try:
        yield
    finally:
        _num_constants_contexts -= 1


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


def has_atomic_sums(device: torch.device) -> bool:
    """Whether torch's backward passes on a device may add in another order every time: of a gather, by atomic additions, and
    of a convolution's weight."""
    return device.type not in ("cpu", "meta")


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
