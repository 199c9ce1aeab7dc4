"""Which modules and inputs the kernels for a CPU support."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from simmim.encoders.swinv2.kernels.conditions import is_modified, product_dtype
from simmim.encoders.swinv2.kernels.gpu import is_interpreted
from simmim.encoders.swinv2.kernels.library import get_kernels, is_disabled
from simmim.execution import is_eager

MAX_SCRATCH_BYTES = 2**28  # of all threads


def supports_block(block: nn.Module, x: Tensor) -> bool:
    """Whether the kernels can compute this `KernelBlock` on `x`, (B, H, W, C).

    Each part must be what `block.PARTS` says, without hooks, and of the expected sizes; and the memory that the kernels
    allocate must be small.
    """
    if (
        not is_plain_input(x)
        or not has_expected_parts(block)
        or block.mlp.act.approximate != "none"
        or block.attn.cpb_mlp[2].bias is not None
    ):
        return False
    weight = block.attn.qkv.weight
    return are_usable(block_shapes(block, x)) and supports_types(x, weight) and has_small_scratch(block, x) and is_ready()


def block_shapes(block: nn.Module, x: Tensor) -> tuple[tuple[Tensor | None, tuple[int, ...]], ...]:
    """The parameters of a block and the shapes that the kernels expect of them."""
    attn, mlp, dim, hidden = block.attn, block.mlp, x.shape[-1], block.mlp.fc1.out_features
    bias_in, bias_out = attn.cpb_mlp[0], attn.cpb_mlp[2]
    return (
        (attn.qkv.weight, (3 * dim, dim)),
        (attn.q_bias, (dim,)),
        (attn.v_bias, (dim,)),
        (attn.proj.weight, (dim, dim)),
        (attn.proj.bias, (dim,)),
        (mlp.fc1.weight, (hidden, dim)),
        (mlp.fc1.bias, (hidden,)),
        (mlp.fc2.weight, (dim, hidden)),
        (mlp.fc2.bias, (dim,)),
        (block.norm1.weight, (dim,)),
        (block.norm1.bias, (dim,)),
        (block.norm2.weight, (dim,)),
        (block.norm2.bias, (dim,)),
        (attn.logit_scale, (attn.num_heads, 1, 1)),
        (bias_in.weight, (bias_in.out_features, 2)),
        (bias_in.bias, (bias_in.out_features,)),
        (bias_out.weight, (attn.num_heads, bias_in.out_features)),
    )


def has_small_scratch(block: nn.Module, x: Tensor) -> bool:
    """Whether the scratch memory of the kernels is within `MAX_SCRATCH_BYTES`."""
    tokens = min(block.window_size, x.shape[1]) * min(block.window_size, x.shape[2])
    # Position biases of all heads and their gradients. Per thread: weights and their gradients of one head.
    return 4 * (2 * block.attn.num_heads + 3 * torch.get_num_threads()) * tokens**2 <= MAX_SCRATCH_BYTES


def supports_merging(merging: nn.Module, x: Tensor) -> bool:
    """Whether the kernels can compute this `KernelMerging` on `x`, (B, H, W, C)."""
    if not is_plain_input(x) or not has_expected_parts(merging):
        return False
    weight, norm, dim = merging.reduction.weight, merging.norm, 2 * x.shape[-1]
    shapes = (weight, (dim, 2 * dim)), (norm.weight, (dim,)), (norm.bias, (dim,))
    return merging.reduction.bias is None and are_usable(shapes) and supports_types(x, weight) and is_ready()


def is_plain_input(x: Tensor) -> bool:
    """Whether x is an ordinary tensor of numbers on the CPU, and the call is eager."""
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and x.numel() > 0 and is_eager()


def has_expected_parts(module: nn.Module) -> bool:
    """Whether the parts of a module are exactly those of `module.PARTS`, without hooks or replaced methods."""
    parts = {name: part for name, part in module.named_modules() if name}
    if {name: type(part) for name, part in parts.items() if name != "norm3"} != module.PARTS:
        return False
    return not nn.modules.module._has_any_global_hook() and not any(is_modified(part) for part in parts.values())


def are_usable(shapes: Iterable[tuple[Tensor | None, tuple[int, ...]]]) -> bool:
    """Whether each parameter has the expected shape and is float32, contiguous and on the CPU."""
    return all(
        value is not None
        and value.shape == shape
        and value.dtype == torch.float32
        and value.device.type == "cpu"
        and value.is_contiguous()
        for value, shape in shapes
    )


def supports_types(x: Tensor, weight: Tensor) -> bool:
    """Whether products are float32 or bfloat16, and `x` is float32 or of the type of products."""
    dtype = product_dtype(weight)
    return dtype in (torch.float32, torch.bfloat16) and x.dtype in (torch.float32, dtype)


def is_ready() -> bool:
    """Whether the kernels are loaded and not disabled."""
    if is_disabled() or is_interpreted():  # with Triton's interpreter the kernels for a GPU run on a CPU
        return False
    return get_kernels() is not None
