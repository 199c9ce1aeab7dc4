"""torch.compile for the blocks of an encoder. What cannot be compiled runs as it is, and a line says so."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from simmim.encoders.base import Encoder
from simmim.execution import constants_in_graphs
from simmim.messages import first_line

COMPILATIONS_PER_BLOCK = 4  # with and without gradients, in training and in evaluation


class CompileBlocks(pl.Callback):
    """Compiles the encoder's blocks for the length of a run.

    If torch.compile does not work here, or fails for a block, one line says why, unless `quiet`, and the run continues.

    Args:
        num_sizes: image sizes of the run, each of which is compiled for.
    """

    def __init__(self, quiet: bool = False, num_sizes: int = 1) -> None:
        self.quiet, self.num_sizes = quiet, num_sizes
        self.undo = contextlib.ExitStack()

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Compile, before the strategy wraps or shards the model."""
        if stage != "fit":
            return

        def report(problem: str) -> None:
            if trainer.is_global_zero and not self.quiet:
                print(f"note     blocks are not compiled by torch: {problem}", flush=True)

        encoder = cast(Encoder, module.model.encoder)
        problem = why_not(trainer.strategy.root_device, encoder)
        if problem:
            report(problem)
        else:
            self.undo = compile_blocks(encoder, report, num_sizes=self.num_sizes)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Leave encoder and torch as they were."""
        self.undo.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call then."""
        self.undo.close()


def why_not(device: torch.device, encoder: Encoder) -> str:
    """Why torch.compile is not used on a device, in one line; empty if it is. Compiles a small function to find out."""
    if encoder.has_kernels(device):
        return "the encoder's own kernels are faster on a CPU"
    try:
        probe = torch.ones(64, device=device, requires_grad=True)
        torch.compile(torch.nn.functional.gelu, dynamic=False)(probe).sum().backward()
    except Exception as error:  # no C++ compiler, no Triton, a Python that torch does not support yet, …
        return describe_error(error)
    return ""


def compile_blocks(
    encoder: Encoder,
    report: Callable[[str], None],
    backend: str | Callable[..., Any] = "inductor",
    num_sizes: int = 1,
) -> contextlib.ExitStack:
    """Compile each block in place, at its first call. Names of weights stay.

    Blocks that differ in nothing but their weights and their rate of stochastic depth, unless it is 0, share their compiled
    code.

    Args:
        report: called once, with the reason, when a block does not compile. This block runs as it is from then on.
        backend: of torch.compile.
        num_sizes: image sizes that will come.

    Returns:
        A stack whose `close` undoes all of this, including changes of torch's global configuration.
    """
    undo = contextlib.ExitStack()
    undo.enter_context(recompile_limit(COMPILATIONS_PER_BLOCK * num_sizes * len(encoder.blocks())))
    undo.enter_context(backward_compiled_first())
    undo.enter_context(constants_in_graphs())
    # The cached functions depend on sizes alone, so tracing through their caches is correct.
    undo.enter_context(ignored_warning(".*call to a `functools.lru_cache`-wrapped function"))
    reported: list[str] = []

    def report_once(problem: str) -> None:
        if not reported:
            report(problem)
        reported.append(problem)

    for block in encoder.blocks():
        # What `Module.compile` sets. `Module.__call__` calls it, and copies and pickles of the module leave it out.
        block._compiled_call_impl = CompiledCall(block, report_once, backend)
        undo.callback(setattr, block, "_compiled_call_impl", None)
    return undo


class CompiledCall:
    """Calls a block by torch.compile until that fails, and then as it is."""

    def __init__(self, block: nn.Module, report: Callable[[str], None], backend: str | Callable[..., Any]) -> None:
        self.report = report
        self.plain_call = block._call_impl
        self.call = torch.compile(self.plain_call, dynamic=False, backend=backend)

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        """The block's output.

        Compiling fails before anything is computed. Errors of the block itself are raised as they are.
        """
        try:
            return self.call(*arguments, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.report(describe_error(error))
            self.call = self.plain_call
            return self.plain_call(*arguments, **options)


def describe_error(error: Exception) -> str:
    """The reason of a compiler's error, in one line. Dynamo wraps the errors of its backends."""
    return first_line(getattr(error, "inner_exception", error))


@contextlib.contextmanager
def recompile_limit(minimum: int) -> Iterator[None]:
    """A context in which torch compiles a function at least `minimum` times. Beyond its limit it would silently stop."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the latter before 2.7
    with config.patch({name: max(getattr(config, name), minimum)}):
        yield


def backward_compiled_first() -> contextlib.AbstractContextManager[Any]:
    """A context in which torch compiles the backward pass of a function with its forward pass.

    By default it does so in the first backward pass, where it is too late to go on without what does not compile.
    """
    from torch._functorch import config

    name = "force_non_lazy_backward_lowering"
    return config.patch({name: True}) if hasattr(config, name) else contextlib.nullcontext()


@contextlib.contextmanager
def ignored_warning(message: str) -> Iterator[None]:
    """A context in which warnings are ignored whose text begins with `message`, a regular expression.

    Unlike `warnings.catch_warnings` it keeps filters that others add or remove meanwhile.
    """
    warnings.filterwarnings("ignore", message=message)
    entry = warnings.filters[0]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            cast(list, warnings.filters).remove(entry)
