"""The two branches of a Swin V2 block, and patch merging, on a CPU: each is one autograd function.

Matrix products are torch's; those for the gradients of weights are in gradients.c where there is a matrix unit. Everything
between products is in attention_forward.c, attention_backward.c, bias.c and pointwise.c.

The mathematics is that of `simmim.encoders.swinv2.model`, which is easier to read and runs on every device. The kernels save
memory and time: windows are never copied, attention weights are not kept, GELU is recomputed in the backward pass, and the
main path stays float32 under autocast.

There is no second derivative. SIMMIM_KERNELS=0 turns the kernels off for code that needs one.

Shape letters as in `model.py`: B images, H W sides of the map, C channels, h heads, D channels of a head, M windows of one
image, N tokens of one window; and T tokens of one image.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from simmim.encoders.swinv2.kernels.conditions import product_dtype
from simmim.encoders.swinv2.kernels.library import Attention, Bias, Join, Merging, get_kernels
from simmim.encoders.swinv2.kernels.windows import Windows

# A linear layer by oneDNN takes 0.9 times as long as by MKL, torch's choice in float32 (on a Zen 4 core; output and gradient
# of the input, not of the weight). With fewer threads than it asks for, oneDNN leaves part of its output unwritten.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and not {"OMP_DYNAMIC", "OMP_THREAD_LIMIT"} & os.environ.keys()
)

TILE = 16  # rows and columns of a tile in tiles.h
MANY_ROWS = 4  # times as many as columns


def join_attention(
    x: Tensor,
    attn: nn.Module,
    norm: nn.LayerNorm,
    drop_factors: Tensor | None,
    windows: Windows,
    scale: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """x + drop_factors · norm(attention(x)), (B, H, W, C) float32; and its tokens in the type of products, for `join_mlp`.

    Args:
        drop_factors: (B,), the factors of stochastic depth; None for 1.
        scale: (h, 1, 1), 1 / τ.
        table: (offsets, h), the position bias of each offset.
    """
    return AttentionBranch.apply(
        x.float(),
        attn.qkv.weight,
        attn.q_bias,
        attn.v_bias,
        scale,
        table,
        attn.proj.weight,
        attn.proj.bias,
        norm.weight,
        norm.bias,
        norm.eps,
        None if drop_factors is None else drop_factors.float(),
        windows,
        product_dtype(attn.qkv.weight),
    )


def join_mlp(x: Tensor, tokens: Tensor, mlp: nn.Module, norm: nn.LayerNorm, drop_factors: Tensor | None) -> Tensor:
    """x + drop_factors · norm(mlp(x)), (B, H, W, C) float32; `tokens` (B · T, C) is x in the type of products."""
    return MlpBranch.apply(
        x,
        tokens,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
        norm.weight,
        norm.bias,
        norm.eps,
        None if drop_factors is None else drop_factors.float(),
    )


def bias_of_offsets(mlp: nn.Sequential, coords: Tensor) -> Tensor:
    """16 · sigmoid(mlp(coords)): (offsets, 2) to (offsets, h), float32."""
    return PositionBias.apply(coords, mlp[0].weight, mlp[0].bias, mlp[2].weight)


def merge(x: Tensor, reduction: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """norm(reduction(2 × 2 neighbors of x side by side)): (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C) float32."""
    dtype = product_dtype(reduction.weight)
    return MergingBranch.apply(x.float(), reduction.weight, norm.weight, norm.bias, norm.eps, dtype)


class AttentionBranch(Function):
    """`join_attention`."""

    @staticmethod
    def forward(
        ctx,
        x,
        qkv_weight,
        q_bias,
        v_bias,
        scale,
        table,
        proj_weight,
        proj_bias,
        norm_weight,
        norm_bias,
        epsilon,
        drop_factors,
        windows,
        dtype,
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()  # rows of one image of another layout would be a view of it
        tokens = as_rows(x).to(dtype)
        qkv_weight, proj_weight = qkv_weight.to(dtype), proj_weight.to(dtype)
        qkv = linear(tokens, qkv_weight)
        images, heads = len(x), scale.numel()
        mixed, log_sums = torch.empty_like(tokens), x.new_empty(images * windows.token_of.numel() * heads)
        call = attention_call(qkv, q_bias, v_bias, scale, table, windows, images)
        get_kernels().call("attention_forward", call, address(mixed), address(log_sums))
        branch = linear(mixed, proj_weight)
        out, out_tokens, moments = join(x, branch, proj_bias, norm_weight, norm_bias, epsilon, drop_factors, dtype)
        ctx.save_for_backward(
            tokens,
            qkv_weight,
            q_bias,
            v_bias,
            scale,
            table,
            qkv,
            log_sums,
            mixed,
            proj_weight,
            proj_bias,
            branch,
            norm_weight,
            norm_bias,
            drop_factors,
            moments,
            *windows,
        )
        ctx.epsilon, ctx.images = epsilon, images
        if dtype == torch.float32:  # `out_tokens` is a view of `out`, through which all of the gradient comes
            ctx.mark_non_differentiable(out_tokens)
        ctx.set_materialize_grads(False)
        return out, out_tokens

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad, grad_tokens):
        if grad is None:
            return (None,) * 14
        (
            tokens,
            qkv_weight,
            q_bias,
            v_bias,
            scale,
            table,
            qkv,
            log_sums,
            mixed,
            proj_weight,
            proj_bias,
            branch,
            norm_weight,
            norm_bias,
            drop_factors,
            moments,
            *windows,
        ) = ctx.saved_tensors
        call = join_call(branch, proj_bias, norm_weight, norm_bias, ctx.epsilon, drop_factors, ctx.images)
        parameters = proj_bias, norm_weight, norm_bias
        grad, grad_branch, grad_join = join_backward(call, grad, grad_tokens, branch, parameters, moments)
        grad_proj = weight_gradient(grad_branch, mixed) if ctx.needs_input_grad[6] else None
        grad_mixed = linear(grad_branch, proj_weight.T)
        grad_qkv = torch.empty_like(qkv)
        grad_parameters = [torch.empty_like(value) for value in (q_bias, v_bias, scale, table)]
        addresses = map(address, (log_sums, grad_mixed, grad_qkv, *grad_parameters))
        call = attention_call(qkv, q_bias, v_bias, scale, table, Windows(*windows), ctx.images)
        get_kernels().call("attention_backward", call, *addresses)
        grad_qkv_weight = weight_gradient(grad_qkv, tokens) if ctx.needs_input_grad[1] else None
        grad_x = add_product(grad, grad_qkv, qkv_weight) if ctx.needs_input_grad[0] else None
        return grad_x, grad_qkv_weight, *grad_parameters, grad_proj, *grad_join, *[None] * 4


class PositionBias(Function):
    """`bias_of_offsets`."""

    @staticmethod
    def forward(ctx, coords, weight1, bias1, weight2) -> Tensor:
        table = coords.new_empty(len(coords), len(weight2))
        get_kernels().call("bias_forward", bias_call(coords, weight1, bias1, weight2), address(table))
        ctx.save_for_backward(coords, weight1, bias1, weight2, table)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, table = ctx.saved_tensors
        grad, grads = grad.contiguous(), [torch.empty_like(value) for value in inputs[1:]]
        get_kernels().call("bias_backward", bias_call(*inputs), address(table), address(grad), *map(address, grads))
        return None, *grads


class MlpBranch(Function):
    """`join_mlp`."""

    @staticmethod
    def forward(ctx, x, tokens, weight1, bias1, weight2, bias2, norm_weight, norm_bias, epsilon, drop_factors) -> Tensor:
        weight1, weight2 = weight1.to(tokens.dtype), weight2.to(tokens.dtype)
        hidden = linear(tokens, weight1)
        active = torch.empty_like(hidden)
        addresses = map(address, (hidden, bias1, active))
        get_kernels().call("gelu_forward", *addresses, *hidden.shape, *type_and_threads(hidden))
        branch = linear(active, weight2)
        del active
        out, _, moments = join(x, branch, bias2, norm_weight, norm_bias, epsilon, drop_factors, torch.float32)
        ctx.save_for_backward(
            tokens, weight1, bias1, hidden, weight2, bias2, branch, norm_weight, norm_bias, drop_factors, moments
        )
        ctx.epsilon, ctx.images = epsilon, len(x)
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):
        tokens, weight1, bias1, hidden, weight2, bias2, branch, norm_weight, norm_bias, drop_factors, moments = (
            ctx.saved_tensors
        )
        call = join_call(branch, bias2, norm_weight, norm_bias, ctx.epsilon, drop_factors, ctx.images)
        grad, grad_branch, grad_join = join_backward(call, grad, None, branch, (bias2, norm_weight, norm_bias), moments)
        grad_hidden = linear(grad_branch, weight2.T)
        active, grad_bias1 = torch.empty_like(hidden), torch.empty_like(bias1)
        addresses = map(address, (hidden, bias1, grad_hidden, active, grad_bias1))
        get_kernels().call("gelu_backward", *addresses, *hidden.shape, *type_and_threads(hidden))
        grad_weight2 = weight_gradient(grad_branch, active) if ctx.needs_input_grad[4] else None
        del active, grad_branch
        grad_weight1 = weight_gradient(grad_hidden, tokens) if ctx.needs_input_grad[2] else None
        grad_tokens = None
        if grad_hidden.dtype == torch.bfloat16:  # the attention's branch, which returned the tokens, adds it to `grad`
            grad_tokens = grad_hidden @ weight1 if ctx.needs_input_grad[1] else None
        elif ctx.needs_input_grad[0]:
            grad = add_product(grad, grad_hidden, weight1)
        return grad, grad_tokens, grad_weight1, grad_bias1, grad_weight2, *grad_join, *[None] * 2


class MergingBranch(Function):
    """`merge`."""

    @staticmethod
    def forward(ctx, x, weight, norm_weight, norm_bias, epsilon, dtype) -> Tensor:
        x, weight = x.contiguous(), weight.to(dtype)
        images, height, width, dim = x.shape
        size = images, (height + 1) // 2, (width + 1) // 2
        tokens = x.new_empty(math.prod(size), 4 * dim, dtype=dtype)
        call = Merging(*x.shape, *type_and_threads(tokens))
        get_kernels().call("merging_forward", call, address(x), address(tokens))
        branch = linear(tokens, weight)
        out = x.new_empty(*size, len(weight))
        moments, no_bias = x.new_empty(len(branch), 2), torch.zeros_like(norm_weight)
        call = join_call(branch, no_bias, norm_weight, norm_bias, epsilon, None, images)
        get_kernels().call("join_forward", call, None, address(out), None, address(moments))
        ctx.save_for_backward(tokens, weight, branch, norm_weight, norm_bias, moments)
        ctx.epsilon, ctx.shape = epsilon, x.shape
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):
        tokens, weight, branch, norm_weight, norm_bias, moments = ctx.saved_tensors
        no_bias = torch.zeros_like(norm_weight)
        call = join_call(branch, no_bias, norm_weight, norm_bias, ctx.epsilon, None, ctx.shape[0])
        parameters = no_bias, norm_weight, norm_bias
        _, grad_branch, (_, grad_norm_weight, grad_norm_bias) = join_backward(call, grad, None, branch, parameters, moments)
        grad_weight = weight_gradient(grad_branch, tokens) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_tokens, grad_x = linear(grad_branch, weight.T), norm_weight.new_empty(ctx.shape)
            call = Merging(*ctx.shape, *type_and_threads(grad_tokens))
            get_kernels().call("merging_backward", call, address(grad_tokens), address(grad_x))
        return grad_x, grad_weight, grad_norm_weight, grad_norm_bias, None, None


# --- calls of the kernels ------------------------------------------------------------------------------------------------


def join(x, branch, bias, norm_weight, norm_bias, epsilon, drop_factors, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x + drop_factors · norm(branch + bias); its rows in `dtype`; and mean and 1 / deviation of each row, (rows, 2)."""
    x = x.contiguous()
    out, moments = torch.empty_like(x), x.new_empty(len(branch), 2)
    out_bf16 = torch.empty_like(branch) if dtype == torch.bfloat16 else None
    call = join_call(branch, bias, norm_weight, norm_bias, epsilon, drop_factors, len(x))
    get_kernels().call("join_forward", call, address(x), address(out), address(out_bf16), address(moments))
    return out, as_rows(out) if out_bf16 is None else out_bf16, moments


def join_backward(
    call: Join, grad: Tensor, grad_tokens: Tensor | None, branch: Tensor, parameters: tuple[Tensor, ...], moments: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The backward pass of `join`.

    Args:
        grad, grad_tokens: gradients of its first and second result; of the second None where it is a view of the first.
        parameters: bias, norm_weight and norm_bias.

    Returns:
        The gradients of x, of the branch, and of the parameters.
    """
    grad = grad.contiguous()
    total = None if grad_tokens is None else torch.empty_like(grad)
    grad_branch, grad_parameters = torch.empty_like(branch), [torch.empty_like(value) for value in parameters]
    addresses = map(address, (moments, grad, grad_tokens, total, grad_branch, *grad_parameters))
    get_kernels().call("join_backward", call, *addresses)
    return grad if total is None else total, grad_branch, grad_parameters


def join_call(branch, bias, norm_weight, norm_bias, epsilon, drop_factors, images) -> Join:
    """The arguments that both passes of `join` share."""
    rows, dim = branch.shape
    addresses = map(address, (branch, bias, norm_weight, norm_bias, drop_factors))
    return Join(*addresses, rows, rows // images, dim, epsilon, *type_and_threads(branch))


def attention_call(qkv, q_bias, v_bias, scale, table, windows: Windows, images: int) -> Attention:
    """The arguments that both passes of attention share."""
    heads = scale.numel()
    tensors = qkv, q_bias, v_bias, scale, table, windows.offset_of, windows.token_of, windows.region_of
    return Attention(
        *map(address, tensors),
        0 if windows.region_of is None else len(windows.region_of),
        images,
        len(qkv) // images,
        *windows.token_of.shape,
        heads,
        len(q_bias) // heads,
        len(table),
        *type_and_threads(qkv),
    )


def bias_call(coords, weight1, bias1, weight2) -> Bias:
    """The arguments that both passes of the position bias share."""
    addresses = map(address, (coords, weight1, bias1, weight2))
    return Bias(*addresses, len(coords), len(bias1), len(weight2), torch.get_num_threads())


def type_and_threads(x: Tensor) -> tuple[int, int]:
    """Whether products are bfloat16, and the number of threads to use."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def address(x: Tensor | None) -> int | None:
    """The address of a contiguous tensor's data; None for None.

    Raises:
        RuntimeError: for a tensor that is not contiguous.
    """
    if x is None:
        return None
    if not x.is_contiguous():
        raise RuntimeError(f"a tensor of strides {x.stride()}: the kernels expect contiguous ones")
    return x.data_ptr()


# --- parts ---------------------------------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B · T, C)."""
    return x.reshape(-1, x.shape[-1])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ."""
    if x.dtype == torch.float32 and ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def add_product(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """grad + left @ right, in float32 and of grad's shape."""
    if left.dtype != torch.float32:
        return grad + (left @ right).view_as(grad)
    if ONEDNN:
        return torch.ops.mkldnn._linear_pointwise.binary(left, as_rows(grad), right.T, None, "add").view_as(grad)
    return torch.addmm(as_rows(grad), left, right).view_as(grad)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ @ x in float32, the gradient of a weight."""
    dim = grad.shape[1]
    if x.dtype == torch.bfloat16 and get_kernels().has_weight_gradient and not dim % TILE and not x.shape[1] % TILE:
        result = x.new_empty(dim, x.shape[1], dtype=torch.float32)
        sizes = *grad.shape, x.shape[1], torch.get_num_threads()
        get_kernels().call("weight_gradient", address(grad), address(x), address(result), *sizes)
        return result
    # In bfloat16, of many rows, oneDNN is up to an eighth faster where the second factor is the wider one: see "Gradients of
    # weights" in benchmarks/README.md.
    if x.dtype == torch.bfloat16 and x.shape[1] < dim and dim * MANY_ROWS < len(x):
        return (x.T @ grad).T.to(torch.float32, memory_format=torch.contiguous_format)
    return (grad.T @ x).float()
