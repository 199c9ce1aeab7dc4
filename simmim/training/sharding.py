"""One model over several devices: every block's parameters, gradients and optimizer state divided among them (FSDP2), by
Lightning's ModelParallelStrategy and torch's fully_shard."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

FSDP = "fsdp"


def strategy_named(name: str | Strategy, devices: str | int, nodes: int) -> str | Strategy:
    """What Lightning's Trainer takes: `fsdp` as FSDP2 over all devices, whose checkpoints are the plain ones of a single
    device; every other name as it is."""
    if name != FSDP:
        return name
    if devices == "auto":
        per_node = torch.cuda.device_count() or 1
    else:
        per_node = int(devices) if str(devices).isdecimal() else len(str(devices).split(","))
    return ModelParallelStrategy(
        data_parallel_size=per_node * nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard(module: pl.LightningModule, model: nn.Module) -> None:
    """Divide `model` among the devices of the module's mesh, block by block; does nothing where there is no mesh.

    To be called in `configure_model`, before optimizers are made.
    """
    if module.device_mesh is None or getattr(model, "is_sharded", False):
        return
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for block in model.encoder.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.is_sharded = True


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradient to the norm `limit` where it is larger.

    Returns:
        The norm before, over all parameters on all devices, a scalar.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
