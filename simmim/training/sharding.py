"""Sharding: parameters, gradients and optimizer state of every block divided among the devices (FSDP2), by Lightning's
ModelParallelStrategy and torch's fully_shard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

FSDP = "fsdp"
HALF_PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def strategy_named(name: str | Strategy, devices: str | int, nodes: int) -> str | Strategy:
    """The strategy for Lightning's Trainer: `fsdp` is FSDP2 over all devices, with the checkpoints of a single device;
    every other name stays as it is."""
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
    """Shard `model` over the devices of the module's mesh, block by block. Without a mesh it does nothing.

    In a mixed precision the parts of a block that say so (`products`) are gathered in the half precision that autocast would
    cast them to, which takes half of the traffic and changes no number. Their gradients are added in float32. All other
    parameters, whose precision matters, are gathered in float32.

    Call it in `configure_model`, before optimizers are made.
    """
    if module.device_mesh is None or getattr(model, "is_sharded", False):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, half = module.device_mesh["data_parallel"], HALF_PRECISIONS.get(str(module.trainer.precision))
    # Autocast casts what these parts take; the policy would cast the main path with it.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.encoder.blocks():
        for name in getattr(block, "products", ()) if half else ():
            fully_shard(block.get_submodule(name), mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.is_sharded = True  # type: ignore[assignment]


def outside_a_step(module: pl.LightningModule) -> contextlib.AbstractContextManager[Any]:
    """A context in which a sharded model computes as in a step of its run: what is gathered in half precision takes nothing
    else. Any other model computes in float32."""
    return contextlib.nullcontext() if module.device_mesh is None else module.trainer.precision_plugin.forward_context()


@contextlib.contextmanager
def gathered(module: pl.LightningModule) -> Iterator[None]:
    """A context in which the parameters of a sharded model that belong to no block are whole. Outside a forward pass of the
    model they are not, and blocks gather their own. The model must have had a forward pass before."""
    if module.device_mesh is None:
        yield
        return
    module.model.unshard()
    try:
        yield
    finally:
        module.model.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, scale: Tensor | None = None) -> Tensor:
    """Scale the gradient down to the norm `limit` where it is larger.

    Args:
        scale: by which the gradients still are multiplied, a scalar; None for 1.

    Returns:
        The norm before clipping and without `scale`, over all parameters on all devices, a scalar.
    """
    if scale is None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    parameters = list(parameters)
    norm = clip_gradients(parameters, math.inf) / scale
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch, and as a tensor, for which no device is waited for
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
    return norm


def pending_scale(precision: Any, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """By which gradients still are multiplied when they are clipped: float16's scale, where the optimizer itself divides by
    it, as fused ones do; None for nothing.

    Args:
        precision: Lightning's plugin.
    """
    scaler = getattr(precision, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    parameter = optimizer.param_groups[0]["params"][0]
    return scaler.scale(torch.ones((), device=parameter.device))
