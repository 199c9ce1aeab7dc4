"""Shifted-window scaled cosine attention on a GPU, one step of automatic differentiation: what launches the kernels of
triton_kernels.py.

The same mathematics as `simmim.encoders.swinv2.attend`, with the biases of queries and values and the way from tokens to windows
and back. What is saved: windows are never copied, and neither pass writes logits or weights. To torch.compile it is one
operator with nothing to see inside.

There is no second derivative.

Shape letters as in `simmim.encoders.swinv2`; T tokens of an image.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TOKENS, MOST_CHANNELS = 1024, 128  # of a window, of a head
TYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_GPU = (8, 0)  # compute capability: the first with products in bfloat16
# A processor has two or three of these programs at a time; some more let early ones make room for late ones.
PROGRAMS_A_PROCESSOR = 4


def takes_attention(device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int) -> bool:
    """Whether the kernels can do this on `device`: `window_attention` to qkv of `dtype`, windows of so many tokens and
    heads of so many channels."""
    if dtype not in TYPES or not 1 <= window_tokens <= MOST_TOKENS or not 1 <= head_dim <= MOST_CHANNELS:
        return False
    if not has_triton():
        return False
    if interpreted():
        return True
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return False
    # Of the compiled kernels: the backward pass has a window's rows of q and of the gradient there, each in two layouts,
    # and blocks on their way from memory and between layouts.
    blocks = Blocks.of(window_tokens, head_dim, dtype)
    needed = 4 * (blocks.whole + blocks.rest) * blocks.dim * dtype.itemsize + 2**14 * blocks.stages
    properties = torch.cuda.get_device_properties(device)
    return needed <= getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def window_attention(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    scale: Tensor,
    bias: Tensor,
    token_of: Tensor,
    region_of: Tensor | None,
    images: int,
) -> Tensor:
    """What each token makes of the values of its window, (B · T, h · D), of qkv's type.

    similarity(i, j) = cos(q_i + q_bias, k_j) · scale + bias_ij, −100 more across regions; weights are its softmax, over
    values v_j + v_bias. Padding tokens have q = q_bias, k = 0 and v = v_bias. q + q_bias and v + v_bias are rounded to
    qkv's type.

    Args:
        qkv: (B · T, 3 · h · D), in (q k v, head, channel) order, without bias.
        q_bias, v_bias: (h · D,).
        scale: (h, 1, 1) or (h,) float32, 1 / τ.
        bias: (h, N, N) float32, the position bias of each pair of tokens.
        token_of, region_of: as in `simmim.encoders.swinv2.kernels.Windows`, on qkv's device. Each token stands in exactly one window.
        images: B.
    """
    mixed, _ = _forward(qkv.contiguous(), q_bias, v_bias, scale, bias.contiguous(), token_of, region_of, images)
    return mixed


@torch.library.custom_op("simmim::window_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    scale: Tensor,
    bias: Tensor,
    token_of: Tensor,
    region_of: Tensor | None,
    images: int,
) -> tuple[Tensor, Tensor]:
    """`window_attention`; and in float32 what turns its logits into weights again, (B · M, h, 2, N): each query's largest
    logit, and 1 / the sum of exponentials. The log of that sum, one number, at 100 would be exact to 1e-5 only."""
    from simmim.encoders.swinv2.kernels import triton_kernels

    mixed, normalizers = _forward_shapes(qkv, q_bias, v_bias, scale, bias, token_of, region_of, images)
    call = Call.of(qkv, q_bias, v_bias, scale, bias, token_of, region_of, images)
    shares = call.shares()
    call.launch(triton_kernels.forward, call.numbers * shares, mixed, normalizers, *call.sizes, shares)
    return mixed, normalizers


@_forward.register_fake
def _forward_shapes(qkv, q_bias, v_bias, scale, bias, token_of, region_of, images):
    windows, tokens = token_of.shape
    return (
        qkv.new_empty(qkv.shape[0], q_bias.shape[0]),
        qkv.new_empty(images * windows, scale.numel(), 2, tokens, dtype=torch.float32),
    )


@torch.library.custom_op("simmim::window_attention_backward", mutates_args=())
def _backward(
    grad_mixed: Tensor,
    normalizers: Tensor,
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    scale: Tensor,
    bias: Tensor,
    token_of: Tensor,
    region_of: Tensor | None,
    images: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, q_bias, v_bias, scale and bias."""
    from simmim.encoders.swinv2.kernels import triton_kernels

    call = Call.of(qkv, q_bias, v_bias, scale, bias, token_of, region_of, images)
    grad_mixed, normalizers, heads = grad_mixed.contiguous(), normalizers.contiguous(), scale.numel()
    chunks, shares, blocks = call.chunks(), call.shares(), call.blocks.count
    # Every token is in a window, so every row is written: queries by one kernel, keys and values by the other.
    grad_qkv, deltas = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(normalizers[:, :, 0])
    of_bias = deltas.new_empty(chunks, *bias.shape)
    of_q_bias, of_scale = deltas.new_empty(chunks * blocks, len(q_bias)), deltas.new_empty(chunks * blocks, heads)
    of_v_bias = deltas.new_empty(call.numbers * shares, len(v_bias))
    call.launch(
        triton_kernels.backward_of_queries,
        chunks * blocks,
        normalizers,
        grad_mixed,
        grad_qkv,
        deltas,
        of_bias,
        of_q_bias,
        of_scale,
        *call.sizes,
        call.numbers,
        chunks,
    )
    call.launch(
        triton_kernels.backward_of_keys,
        call.numbers * shares,
        normalizers,
        deltas,
        grad_mixed,
        grad_qkv,
        of_v_bias,
        *call.sizes,
        shares,
    )
    # Programs' sums are added here and not by them, in no order of their own: the same numbers every time.
    return (
        grad_qkv,
        of_q_bias.sum(0).to(q_bias.dtype),
        of_v_bias.sum(0).to(v_bias.dtype),
        of_scale.sum(0).view(scale.shape),
        of_bias.sum(0),
    )


@_backward.register_fake
def _backward_shapes(grad_mixed, normalizers, qkv, q_bias, v_bias, scale, bias, token_of, region_of, images):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (qkv, q_bias, v_bias, scale, bias))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.images = inputs
    _, normalizers = output
    ctx.save_for_backward(normalizers, *tensors)
    ctx.mark_non_differentiable(normalizers)


def _differentiate(ctx, grad_mixed: Tensor, _):
    return *_backward(grad_mixed, *ctx.saved_tensors, ctx.images), None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


# --- Launches ------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How the tokens of a window are cut into blocks, whose sizes are powers of two and no less than a matrix
    instruction's 16.

    Attributes:
        whole: the largest power of two in N.
        rest: what holds the tokens beyond `whole`, 0 for none: 144 tokens are 128 + 16 and not 256.
        dim: what holds D.
        block: how many rows of logits a program computes at a time.
        count: blocks of rows of a window.
        warps: of one program.
        stages: of the pipeline that loads what the next round of a loop needs.
    """

    whole: int
    rest: int
    dim: int
    block: int
    count: int
    warps: int
    stages: int

    @classmethod
    def of(cls, tokens: int, head_dim: int, dtype: torch.dtype) -> Blocks:
        whole = max(16, 1 << (tokens.bit_length() - 1))
        rest = max(16, power_of_two(tokens - whole)) if tokens > whole else 0
        # No less than 32: Triton hands a program's warps columns, where the last product's block has more columns than
        # rows, else rows. There are 16 rows for one warp; four would all compute the same.
        dim = max(32, power_of_two(head_dim))
        usual = dim == 32 and dtype.itemsize == 2
        if usual and tokens <= 64:  # a warp has 16 whole rows of logits
            block = max(16, power_of_two(tokens))
            warps = block // 16
        else:  # all warps have the same 16 rows, each some of the columns: more do not fit their registers
            block, warps = 16, 4 if usual and whole + rest <= 192 else 8
        stages = 2 if dtype.itemsize * (whole + rest) * dim <= 2**14 else 1
        return cls(whole, rest, dim, block, -(-tokens // block), warps, stages)


class Call(NamedTuple):
    """What all kernels are called with.

    Attributes:
        inputs: their first arguments.
        heads: h.
        numbers: B · M, windows of all images.
        sizes: T, M and h.
        constants: what they are compiled for.
    """

    inputs: tuple[Tensor, ...]
    heads: int
    numbers: int
    sizes: tuple[int, int, int]
    blocks: Blocks
    constants: dict

    @classmethod
    def of(cls, qkv, q_bias, v_bias, scale, bias, token_of, region_of, images) -> Call:
        (windows, tokens), heads = token_of.shape, scale.numel()
        head_dim = len(q_bias) // heads
        blocks = Blocks.of(tokens, head_dim, qkv.dtype)
        constants = {
            "N": tokens,
            "D": head_dim,
            "DIVIDED": region_of is not None,
            "WHOLE": blocks.whole,
            "REST": blocks.rest,
            "DIM": blocks.dim,
            "BLOCK": blocks.block,
            "PRECISION": product_precision(qkv.dtype),
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
        # Kernels want some address; without regions they never read it.
        regions = token_of if region_of is None else region_of
        inputs = tuple(x.contiguous() for x in (qkv, q_bias, v_bias, scale, bias, token_of, regions))
        return cls(inputs, heads, images * windows, (len(qkv) // images, windows, heads), blocks, constants)

    def launch(self, kernel, programs_a_head: int, *arguments) -> None:
        """Run one of triton_kernels.py."""
        device = self.inputs[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs_a_head * self.heads,)](*self.inputs, *arguments, **self.constants)

    def shares(self) -> int:
        """Among how many programs the blocks of a window are shared: one, which loads the other side's rows once, where
        there are windows enough to occupy the device."""
        return min(self.blocks.count, -(-self.wanted() // (self.numbers * self.heads)))

    def chunks(self) -> int:
        """Into how many chunks windows fall whose gradients of the position bias are summed by one program: no more than
        occupy the device, for each has sums of its own in memory."""
        return min(self.numbers, -(-self.wanted() // (self.blocks.count * self.heads)))

    def wanted(self) -> int:
        """Programs that occupy the device."""
        device = self.inputs[0].device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return PROGRAMS_A_PROCESSOR * processors


def power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << (number - 1).bit_length()


def product_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch's own are. Of half precisions it means nothing."""
    settings = torch.backends.cuda.matmul
    # The older name, the only one before 2.9, raises an error where the newer was set.
    fast = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if dtype != torch.float32 or fast else "ieee"


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on any device, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("triton") is not None
