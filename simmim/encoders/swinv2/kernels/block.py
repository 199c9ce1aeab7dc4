"""A Swin V2 block's two branches, and the merging of patches, on a CPU, each one step of automatic differentiation: the
matrix products by torch, everything between them by attention.c, bias.c and pointwise.c.

The same mathematics as `simmim.encoders.swinv2`, whose plain lines are what a reader wants and what other devices run. What
is saved: windows are never copied, weights of the attention never kept, GELU is computed again in the backward pass, and
the main path stays float32 under autocast.

There is no second derivative: who needs one sets SIMMIM_KERNELS=0.

Shape letters as in `simmim.encoders.swinv2`; T tokens of an image.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from simmim.encoders.swinv2.kernels.conditions import product_type
from simmim.encoders.swinv2.kernels.library import Attention, Bias, Join, Merging, kernels
from simmim.encoders.swinv2.kernels.windows import Windows

# Of a linear layer oneDNN's products are 1.1 times as fast as MKL's, which torch takes in float32 (on a Zen 4 core, output
# and gradient of the input; not that of the weight).
# With fewer threads than it asks for oneDNN leaves part of its output as it was.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and not {"OMP_DYNAMIC", "OMP_THREAD_LIMIT"} & os.environ.keys()
)


def join_attention(
    x: Tensor, attn: nn.Module, norm: nn.LayerNorm, keep: Tensor | None, windows: Windows, scale: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """x + keep · norm(attention(x)), (B, H, W, C) float32; and as `join_mlp` takes its tokens.

    Args:
        keep: (B,), the factor of stochastic depth; None for 1.
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
        None if keep is None else keep.float(),
        windows,
        product_type(attn.qkv.weight),
    )


def join_mlp(x: Tensor, tokens: Tensor, mlp: nn.Module, norm: nn.LayerNorm, keep: Tensor | None) -> Tensor:
    """x + keep · norm(mlp(x)), (B, H, W, C) float32; `tokens` (B · T, C) is x in the products' type."""
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
        None if keep is None else keep.float(),
    )


def bias_of_offsets(mlp: nn.Sequential, coords: Tensor) -> Tensor:
    """16 · sigmoid(mlp(coords)): (offsets, 2) to (offsets, h), float32."""
    return PositionBias.apply(coords, mlp[0].weight, mlp[0].bias, mlp[2].weight)


def merge(x: Tensor, reduction: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """norm(reduction(2 × 2 neighbors of x side by side)): (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C) float32."""
    kind = product_type(reduction.weight)
    return MergingBranch.apply(x.float(), reduction.weight, norm.weight, norm.bias, norm.eps, kind)


class AttentionBranch(Function):
    """`join_attention`."""

    @staticmethod
    def forward(
        ctx, x, qkv_weight, q_bias, v_bias, scale, table, proj_weight, proj_bias, gain, shift, epsilon, keep, windows, kind
    ) -> tuple[Tensor, Tensor]:
        tokens = rows(x).to(kind)
        qkv_weight, proj_weight = qkv_weight.to(kind), proj_weight.to(kind)
        qkv = product(tokens, qkv_weight)
        images, heads = len(x), scale.numel()
        mixed, log_sums = torch.empty_like(tokens), x.new_empty(images * windows.token_of.numel() * heads)
        call = attention_call(qkv, q_bias, v_bias, scale, table, windows, images)
        kernels().call("attention_forward", call, at(mixed), at(log_sums))
        branch = product(mixed, proj_weight)
        out, out_tokens, moments = join(x, branch, proj_bias, gain, shift, epsilon, keep, kind)
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
            gain,
            shift,
            keep,
            moments,
            *windows,
        )
        ctx.epsilon, ctx.images = epsilon, images
        if kind == torch.float32:  # the same numbers: all of their gradient is `out`'s
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
            gain,
            shift,
            keep,
            moments,
            *windows,
        ) = ctx.saved_tensors
        grad, grad_branch, of_join = join_back(
            grad, grad_tokens, branch, proj_bias, gain, shift, ctx.epsilon, keep, moments, ctx.images
        )
        grad_proj = grad_branch.T @ mixed if ctx.needs_input_grad[6] else None
        grad_mixed = product(grad_branch, proj_weight.T)
        grad_qkv = torch.empty_like(qkv)
        of_biases = [torch.empty_like(value) for value in (q_bias, v_bias, scale, table)]
        call = attention_call(qkv, q_bias, v_bias, scale, table, Windows(*windows), ctx.images)
        kernels().call("attention_backward", call, at(log_sums), at(grad_mixed), at(grad_qkv), *map(at, of_biases))
        grad_qkv_weight = grad_qkv.T @ tokens if ctx.needs_input_grad[1] else None
        grad_x = added(grad, grad_qkv, qkv_weight) if ctx.needs_input_grad[0] else None
        return grad_x, as_float(grad_qkv_weight), *of_biases, as_float(grad_proj), *of_join, *[None] * 4


class PositionBias(Function):
    """`bias_of_offsets`."""

    @staticmethod
    def forward(ctx, coords, weight1, bias1, weight2) -> Tensor:
        table = coords.new_empty(len(coords), len(weight2))
        kernels().call("bias_forward", bias_call(coords, weight1, bias1, weight2), at(table))
        ctx.save_for_backward(coords, weight1, bias1, weight2, table)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *given, table = ctx.saved_tensors
        grad, grads = grad.contiguous(), [torch.empty_like(value) for value in given[1:]]
        kernels().call("bias_backward", bias_call(*given), at(table), at(grad), *map(at, grads))
        return None, *grads


class MlpBranch(Function):
    """`join_mlp`."""

    @staticmethod
    def forward(ctx, x, tokens, weight1, bias1, weight2, bias2, gain, shift, epsilon, keep) -> Tensor:
        weight1, weight2 = weight1.to(tokens.dtype), weight2.to(tokens.dtype)
        hidden = product(tokens, weight1)
        active = torch.empty_like(hidden)
        kernels().call("gelu_forward", at(hidden), at(bias1), at(active), *hidden.shape, *how(hidden))
        branch = product(active, weight2)
        del active
        out, _, moments = join(x, branch, bias2, gain, shift, epsilon, keep, torch.float32)
        ctx.save_for_backward(tokens, weight1, bias1, hidden, weight2, bias2, branch, gain, shift, keep, moments)
        ctx.epsilon, ctx.images = epsilon, len(x)
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):
        tokens, weight1, bias1, hidden, weight2, bias2, branch, gain, shift, keep, moments = ctx.saved_tensors
        grad, grad_branch, of_join = join_back(
            grad, None, branch, bias2, gain, shift, ctx.epsilon, keep, moments, ctx.images
        )
        grad_hidden = product(grad_branch, weight2.T)
        active, grad_bias1 = torch.empty_like(hidden), torch.empty_like(bias1)
        kernels().call(
            "gelu_backward", at(hidden), at(bias1), at(grad_hidden), at(active), at(grad_bias1), *hidden.shape, *how(hidden)
        )
        grad_weight2 = grad_branch.T @ active if ctx.needs_input_grad[4] else None
        del active, grad_branch
        grad_weight1 = grad_hidden.T @ tokens if ctx.needs_input_grad[2] else None
        grad_tokens = None
        if grad_hidden.dtype == torch.bfloat16:  # to be added where it goes: the branch that gave the tokens
            grad_tokens = grad_hidden @ weight1 if ctx.needs_input_grad[1] else None
        elif ctx.needs_input_grad[0]:
            grad = added(grad, grad_hidden, weight1)
        return grad, grad_tokens, as_float(grad_weight1), grad_bias1, as_float(grad_weight2), *of_join, *[None] * 2


class MergingBranch(Function):
    """`merge`."""

    @staticmethod
    def forward(ctx, x, weight, gain, shift, epsilon, kind) -> Tensor:
        x, weight = x.contiguous(), weight.to(kind)
        images, height, width, dim = x.shape
        size = images, (height + 1) // 2, (width + 1) // 2
        tokens = x.new_empty(math.prod(size), 4 * dim, dtype=kind)
        kernels().call("merging_forward", Merging(*x.shape, *how(tokens)), at(x), at(tokens))
        branch = product(tokens, weight)
        out = x.new_empty(*size, len(weight))
        moments, nothing = x.new_empty(len(branch), 2), torch.zeros_like(gain)
        call = join_call(branch, nothing, gain, shift, epsilon, None, images)
        kernels().call("join_forward", call, None, at(out), None, at(moments))
        ctx.save_for_backward(tokens, weight, branch, gain, shift, moments)
        ctx.epsilon, ctx.shape = epsilon, x.shape
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):
        tokens, weight, branch, gain, shift, moments = ctx.saved_tensors
        _, grad_branch, (_, grad_gain, grad_shift) = join_back(
            grad, None, branch, torch.zeros_like(gain), gain, shift, ctx.epsilon, None, moments, ctx.shape[0]
        )
        grad_weight = grad_branch.T @ tokens if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_tokens, grad_x = product(grad_branch, weight.T), gain.new_empty(ctx.shape)
            kernels().call("merging_backward", Merging(*ctx.shape, *how(grad_tokens)), at(grad_tokens), at(grad_x))
        return grad_x, as_float(grad_weight), grad_gain, grad_shift, None, None


# --- Calls ---------------------------------------------------------------------------------------------------------------


def join(x, branch, bias, gain, shift, epsilon, keep, kind) -> tuple[Tensor, Tensor, Tensor]:
    """x + keep · norm(branch + bias); its rows of type `kind`; and each row's mean and 1 / deviation, (rows, 2)."""
    x = x.contiguous()
    out, moments = torch.empty_like(x), x.new_empty(len(branch), 2)
    half = torch.empty_like(branch) if kind == torch.bfloat16 else None
    call = join_call(branch, bias, gain, shift, epsilon, keep, len(x))
    kernels().call("join_forward", call, at(x), at(out), at(half), at(moments))
    return out, rows(out) if half is None else half, moments


def join_back(
    grad, grad_tokens, branch, bias, gain, shift, epsilon, keep, moments, images
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of x, of the branch, and of bias, gain and shift, from those of what `join` gave: of its second, where
    that is not the first over again, or None."""
    grad = grad.contiguous()
    both = None if grad_tokens is None else torch.empty_like(grad)
    grad_branch, of_join = torch.empty_like(branch), [torch.empty_like(value) for value in (bias, gain, shift)]
    call = join_call(branch, bias, gain, shift, epsilon, keep, images)
    others = (at(value) for value in (moments, grad, grad_tokens, both, grad_branch, *of_join))
    kernels().call("join_backward", call, *others)
    return grad if both is None else both, grad_branch, of_join


def join_call(branch, bias, gain, shift, epsilon, keep, images) -> Join:
    """What both directions of `join` take."""
    count, dim = branch.shape
    return Join(at(branch), at(bias), at(gain), at(shift), at(keep), count, count // images, dim, epsilon, *how(branch))


def attention_call(qkv, q_bias, v_bias, scale, table, windows: Windows, images: int) -> Attention:
    """What both directions of attention take."""
    heads = scale.numel()
    return Attention(
        at(qkv),
        at(q_bias),
        at(v_bias),
        at(scale),
        at(table),
        at(windows.offset_of),
        at(windows.token_of),
        at(windows.region_of),
        images,
        len(qkv) // images,
        *windows.token_of.shape,
        heads,
        len(q_bias) // heads,
        len(table),
        *how(qkv),
    )


def bias_call(coords, weight1, bias1, weight2) -> Bias:
    """What both directions of the position bias take."""
    given = at(coords), at(weight1), at(bias1), at(weight2)
    return Bias(*given, len(coords), len(bias1), len(weight2), torch.get_num_threads())


def how(x: Tensor) -> tuple[int, int]:
    """Whether products are bfloat16, and how many threads may work."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def at(x: Tensor | None) -> int | None:
    """Where its numbers are."""
    if x is None:
        return None
    if not x.is_contiguous():
        raise RuntimeError(f"a tensor of strides {x.stride()} for kernels that know none")
    return x.data_ptr()


def rows(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B · T, C)."""
    return x.reshape(-1, x.shape[-1])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ."""
    if x.dtype == torch.float32 and ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def added(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """grad + left @ right, in float32 and of grad's shape."""
    if left.dtype != torch.float32:
        return grad + (left @ right).view_as(grad)
    if ONEDNN:
        return torch.ops.mkldnn._linear_pointwise.binary(left, rows(grad), right.T, None, "add").view_as(grad)
    return torch.addmm(rows(grad), left, right).view_as(grad)


def as_float(grad: Tensor | None) -> Tensor | None:
    """Of a weight: float32."""
    return None if grad is None else grad.float()
