"""torch.compile for the encoder's blocks, and what stands against it on a machine."""

from __future__ import annotations

import warnings

import pytorch_lightning as pl
import torch

from simmim.encoders.base import Encoder
from simmim.messages import first_line


class CompileBlocks(pl.Callback):
    """Compiles the encoder's blocks before the first step; where that cannot be, says so in one line, unless `quiet`, and
    goes on."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Before the strategy takes the model, which it may divide among devices."""
        if stage != "fit":
            return
        device = trainer.strategy.root_device
        problem = why_not(device, module.model.encoder)
        if not problem:
            compile_blocks(module.model.encoder)
        elif trainer.is_global_zero and not self.quiet:
            print(f"note     blocks are not compiled by torch: {problem}", flush=True)


def why_not(device: torch.device, encoder: Encoder) -> str:
    """What speaks against torch.compile on a device, as a line; empty for nothing. Tries it, on something small."""
    if encoder.has_kernels(device):
        return "the encoder's own kernels are faster on a CPU"
    try:
        probe = torch.ones(64, device=device, requires_grad=True)
        torch.compile(torch.nn.functional.gelu, dynamic=False)(probe).sum().backward()
    except Exception as error:  # whatever it is: no C++ compiler, no Triton, a Python that torch does not trace yet
        return first_line(error)
    return ""


def compile_blocks(encoder: Encoder) -> None:
    """Compile each block in place at its first call. Blocks of one stage that differ in their weights alone share what was
    compiled; names of weights stay."""
    blocks = encoder.blocks()
    # A block is compiled anew for evaluation and without gradients. Beyond the limit torch would silently not compile.
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), 4 * len(blocks)))
    config.suppress_errors = True  # a block that does not compile runs as it is
    # They are pure functions of sizes: to trace through their caches is right.
    warnings.filterwarnings("ignore", message=".*call to a `functools.lru_cache`-wrapped function")
    for block in blocks:
        block.compile(dynamic=False)
