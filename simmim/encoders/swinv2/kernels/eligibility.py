"""Which of the encoder's modules the kernels for a CPU can stand in for, as they are and on what they are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simmim.encoders.swinv2.kernels.conditions import is_modified, product_type
from simmim.encoders.swinv2.kernels.gpu import interpreted
from simmim.encoders.swinv2.kernels.library import is_disabled, kernels
from simmim.execution import is_eager

LARGEST_SCRATCH = 2**28  # bytes, of all threads


def supports_block(block: nn.Module, x: Tensor) -> bool:
    """Whether they can do this block on `x`, (B, H, W, C): each of its parts is what `block.PARTS` says, nobody listens
    inside it, and their scratch is of a size that does not matter."""
    if (
        not plain(x)
        or not has_expected_parts(block)
        or block.mlp.act.approximate != "none"
        or block.attn.cpb_mlp[2].bias is not None
    ):
        return False
    attn, mlp, dim, hidden = block.attn, block.mlp, x.shape[-1], block.mlp.fc1.out_features
    bias, heads = attn.cpb_mlp, attn.num_heads
    sizes = (
        (attn.qkv.weight, (3 * dim, dim)),
        (attn.q_bias, (dim,)),
        (attn.v_bias, (dim,)),
        (attn.proj.weight, (dim, dim)),
        (attn.proj.bias, (dim,)),
        (mlp.fc1.weight, (hidden, dim)),
        (mlp.fc1.bias, (hidden,)),
        (mlp.fc2.weight, (dim, hidden)),
        (mlp.fc2.bias, (dim,)),
        *((value, (dim,)) for norm in (block.norm1, block.norm2) for value in (norm.weight, norm.bias)),
        (attn.logit_scale, (heads, 1, 1)),
        (bias[0].weight, (bias[0].out_features, 2)),
        (bias[0].bias, (bias[0].out_features,)),
        (bias[2].weight, (heads, bias[0].out_features)),
    )
    tokens = min(block.window_size, x.shape[1]) * min(block.window_size, x.shape[2])
    # Of every thread the gradients of all heads' biases, and weights and their gradients of one.
    scratch = 4 * torch.get_num_threads() * (heads + 3) * tokens**2
    return values_fit(sizes) and types_fit(x, attn.qkv.weight) and scratch <= LARGEST_SCRATCH and ready()


def supports_merging(merging: nn.Module, x: Tensor) -> bool:
    """Likewise a merging of patches."""
    if not plain(x) or not has_expected_parts(merging):
        return False
    weight, norm, dim = merging.reduction.weight, merging.norm, 2 * x.shape[-1]
    sizes = (weight, (dim, 2 * dim)), (norm.weight, (dim,)), (norm.bias, (dim,))
    return merging.reduction.bias is None and values_fit(sizes) and types_fit(x, weight) and ready()


def plain(x: Tensor) -> bool:
    """Numbers on the CPU, computed with as they come."""
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and x.numel() > 0 and is_eager()


def has_expected_parts(module: nn.Module) -> bool:
    """Every part in its place and of the class that `module.PARTS` says, with nobody listening."""
    parts = {name: part for name, part in module.named_modules() if name}
    if {name: type(part) for name, part in parts.items() if name != "norm3"} != module.PARTS:
        return False
    return not nn.modules.module._has_any_global_hook() and not any(is_modified(part) for part in parts.values())


def values_fit(sizes) -> bool:
    """Each of (value, shape) is there, float32 on the CPU and in one piece."""
    return all(
        value is not None
        and value.shape == size
        and value.dtype == torch.float32
        and value.device.type == "cpu"
        and value.is_contiguous()
        for value, size in sizes
    )


def types_fit(x: Tensor, weight: Tensor) -> bool:
    """Products are in float32 or bfloat16, and `x` is in float32 or the same."""
    kind = product_type(weight)
    return kind in (torch.float32, torch.bfloat16) and x.dtype in (torch.float32, kind)


def ready() -> bool:
    """The kernels are there, and as many threads as torch has may run them."""
    if is_disabled() or interpreted():  # Triton's interpreter is asked for to run the kernels for a GPU
        return False
    found = kernels()
    return found is not None and (found.threaded or torch.get_num_threads() == 1)
