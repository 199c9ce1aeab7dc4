"""Scaled cosine attention in shifted windows on a GPU, as one autograd function: launches the kernels of triton_kernels.py.

The mathematics is that of `attend` in `simmim.encoders.swinv2.model`, with the biases of queries and values, and with the
way from tokens to windows and back. Windows are never copied, and neither pass writes logits or weights. torch.compile sees
one opaque operator.

There is no second derivative.

Shape letters as in `model.py`: B images, h heads, D channels of a head, M windows of one image, N tokens of one window; and
T tokens of one image.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens of a window, 24 × 24 and 16 × 16. The backward pass of 1,024 asks for 288 KiB of shared memory in half precision,
# and no GPU has more than 227 KiB for a program.
MAX_WINDOW_TOKENS = {torch.bfloat16: 576, torch.float16: 576, torch.float32: 256}
MAX_HEAD_DIM = 128
MIN_CAPABILITY = (8, 0)  # the first GPUs that multiply bfloat16
# A multiprocessor runs eight to twelve warps of these programs at a time. A few more keep it busy to the end.
WARPS_PER_MULTIPROCESSOR = 16
FORWARD, OF_QUERIES, OF_KEYS = "forward", "backward_of_queries", "backward_of_keys"  # the kernels of triton_kernels.py
# Warps of a program for windows of up to some places (`Blocks.whole` + `Blocks.rest`), for half precision and heads of up to
# 32 channels; `MOST_WARPS` for more places. Of what fits the registers these need the fewest instructions for a head of a
# window, compiled for compute capability 9.0: at 144 tokens the forward pass of one warp needs 21 thousand, that of four 35
# thousand, and they wait for one another at 22 barriers for every 16 queries.
WARPS = {FORWARD: ((144, 1), (256, 2)), OF_QUERIES: ((192, 4),), OF_KEYS: ((64, 1), (144, 2), (256, 4))}
MOST_WARPS = 8


def supports_window_attention(device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int) -> bool:
    """Whether `window_attention` supports qkv of `dtype`, N = `window_tokens` and D = `head_dim` on `device`."""
    if not 1 <= window_tokens <= MAX_WINDOW_TOKENS.get(dtype, 0) or not 1 <= head_dim <= MAX_HEAD_DIM:
        return False
    if not has_triton():
        return False
    if is_interpreted():
        return True
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    properties = torch.cuda.get_device_properties(device)
    available = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Blocks.of(window_tokens, head_dim, dtype, FORWARD).shared_memory(dtype) <= available


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
    """Attention of each token to the tokens of its window.

    similarity(i, j) = cos(q_i + q_bias, k_j) · scale + bias_ij, plus `MASKED_LOGIT` across regions and `OTHER_GROUP_LOGIT`
    across groups. Its softmax weighs the values v_j + v_bias. Padding tokens have q = q_bias, k = 0 and v = v_bias.
    q + q_bias and v + v_bias are rounded to qkv's type.

    Args:
        qkv: (B · T, 3 · h · D), in (q k v, head, channel) order, without bias.
        q_bias, v_bias: (h · D,).
        scale: (h, 1, 1) or (h,) float32, 1 / τ.
        bias: (h, N, N) float32, the position bias of each pair of tokens.
        token_of, region_of: as in `Windows`, on qkv's device. Each token is in exactly one window.
        images: B.

    Returns:
        (B · T, h · D), of qkv's type.
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
    """`window_attention`; and the normalizers of its softmax, (B · M, h, 2, N) float32, by which the backward pass computes
    weights from logits again: the largest logit of each query, and 1 / the sum of exponentials, both to base 2.

    A single number, the log of the sum, would be precise to 1e-5 only where it is near 100.
    """
    mixed, normalizers = _forward_shapes(qkv, q_bias, v_bias, scale, bias, token_of, region_of, images)
    call = Call.of(qkv, q_bias, v_bias, scale, bias, token_of, region_of, images)
    shares = call.shares(FORWARD)
    call.launch(FORWARD, call.num_windows * shares, mixed, normalizers, *call.sizes, shares)
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
    call = Call.of(qkv, q_bias, v_bias, scale, bias, token_of, region_of, images)
    grad_mixed, normalizers, heads = grad_mixed.contiguous(), normalizers.contiguous(), scale.numel()
    chunks, shares, blocks = call.chunks(), call.shares(OF_KEYS), call.blocks(OF_QUERIES).count
    # Every token is in a window, so every row is written: queries by the first kernel, keys and values by the second.
    grad_qkv, deltas = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(normalizers[:, :, 0])
    bias_sums = deltas.new_empty(chunks, *bias.shape)
    q_bias_sums, scale_sums = deltas.new_empty(chunks * blocks, len(q_bias)), deltas.new_empty(chunks * blocks, heads)
    v_bias_sums = deltas.new_empty(call.num_windows * shares, len(v_bias))
    call.launch(
        OF_QUERIES,
        chunks * blocks,
        normalizers,
        grad_mixed,
        grad_qkv,
        deltas,
        bias_sums,
        q_bias_sums,
        scale_sums,
        *call.sizes,
        call.num_windows,
        chunks,
    )
    call.launch(
        OF_KEYS,
        call.num_windows * shares,
        normalizers,
        deltas,
        grad_mixed,
        grad_qkv,
        v_bias_sums,
        *call.sizes,
        shares,
    )
    # The sums of the programs are added here, in a fixed order: results are the same every time.
    return (
        grad_qkv,
        q_bias_sums.sum(0).to(q_bias.dtype),
        v_bias_sums.sum(0).to(v_bias.dtype),
        scale_sums.sum(0).view(scale.shape),
        bias_sums.sum(0),
    )


@_backward.register_fake
def _backward_shapes(grad_mixed, normalizers, qkv, q_bias, v_bias, scale, bias, token_of, region_of, images):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (qkv, q_bias, v_bias, scale, bias))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.images = inputs
    _, normalizers = output
    ctx.save_for_backward(normalizers, *tensors)
    ctx.mark_non_differentiable(normalizers)


def _differentiate(ctx, grad_mixed: Tensor, _):
    return *_backward(grad_mixed, *ctx.saved_tensors, ctx.images), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# --- launches ------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How the tokens of a window are divided into blocks. Block sizes are powers of two, at least 16, the smallest tile of a
    matrix instruction.

    Attributes:
        whole: the largest power of two in N.
        rest: size of the block for the tokens beyond `whole`; 0 for none. 144 tokens are 128 + 16 and not 256.
        dim: D rounded up to a power of two, at least 32.
        block: rows of logits that a program computes at a time.
        count: number of blocks of rows in a window.
        warps: number of warps of a program.
        stages: length of the pipeline that loads the next iterations of a loop.
    """

    whole: int
    rest: int
    dim: int
    block: int
    count: int
    warps: int
    stages: int

    @classmethod
    def of(cls, tokens: int, head_dim: int, dtype: torch.dtype, kernel: str) -> Blocks:
        whole = max(16, 1 << (tokens.bit_length() - 1))
        rest = max(16, power_of_two(tokens - whole)) if tokens > whole else 0
        # At least 32: Triton gives columns to warps if the block of the last product has more columns than rows, else rows.
        # 16 rows are rows for one warp; four warps would all compute the same.
        dim = max(32, power_of_two(head_dim))
        block, warps = 16, MOST_WARPS  # all warps compute the same 16 rows, each some of the columns: more do not fit
        if dim == 32 and dtype.itemsize == 2:
            warps = next((warps for places, warps in WARPS[kernel] if whole + rest <= places), MOST_WARPS)
            if kernel == OF_QUERIES and tokens <= 64:  # each warp computes 16 whole rows of logits
                block = max(16, power_of_two(tokens))
                warps = block // 16
        stages = 2 if dtype.itemsize * (whole + rest) * dim <= 2**14 else 1
        return cls(whole, rest, dim, block, -(-tokens // block), warps, stages)

    def constants(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        sizes = {"WHOLE": self.whole, "REST": self.rest, "DIM": self.dim, "BLOCK": self.block}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}

    def shared_memory(self, dtype: torch.dtype) -> int:
        """The most bytes of shared memory that a compiled kernel asks for. The backward pass holds a window's rows of q and
        of the gradient, each in two layouts, and blocks that are being loaded or converted between layouts."""
        return 4 * (self.whole + self.rest) * self.dim * dtype.itemsize + 2**14 * self.stages


class Call(NamedTuple):
    """The arguments that all kernels share.

    Attributes:
        inputs: the first arguments of each kernel.
        heads: h.
        num_windows: B · M, windows of all images.
        sizes: T, M, rows of labels and h.
        tokens: N.
        constants: the values that all kernels are compiled for.
    """

    inputs: tuple[Tensor, ...]
    heads: int
    num_windows: int
    sizes: tuple[int, int, int, int]
    tokens: int
    constants: dict

    @classmethod
    def of(cls, qkv, q_bias, v_bias, scale, bias, token_of, region_of, images) -> Call:
        (windows, tokens), heads = token_of.shape, scale.numel()
        constants = {
            "N": tokens,
            "D": len(q_bias) // heads,
            "HAS_REGIONS": region_of is not None,
            "PRECISION": product_precision(qkv.dtype),
        }
        # A kernel needs an address here. Without regions it does not read it.
        regions = token_of if region_of is None else region_of
        inputs = tuple(x.contiguous() for x in (qkv, q_bias, v_bias, scale, bias, token_of, regions))
        sizes = len(qkv) // images, windows, len(regions), heads
        return cls(inputs, heads, images * windows, sizes, tokens, constants)

    def blocks(self, kernel: str) -> Blocks:
        """How a kernel divides a window."""
        return Blocks.of(self.tokens, self.constants["D"], self.inputs[0].dtype, kernel)

    def launch(self, kernel: str, programs_per_head: int, *arguments) -> None:
        """Launch a kernel of triton_kernels.py."""
        from simmim.encoders.swinv2.kernels import triton_kernels

        device = self.inputs[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            function = getattr(triton_kernels, kernel)
            function[(programs_per_head * self.heads,)](
                *self.inputs, *arguments, **self.constants, **self.blocks(kernel).constants()
            )

    def shares(self, kernel: str) -> int:
        """Number of programs that share the blocks of a window. One, which loads the rows of the other side once, if there
        are enough windows to occupy the device."""
        return min(self.blocks(kernel).count, -(-self.wanted_programs(kernel) // (self.num_windows * self.heads)))

    def chunks(self) -> int:
        """Number of chunks of windows. One program sums the gradients of the position bias over a chunk, in memory of its
        own, so there are no more chunks than occupy the device."""
        blocks = self.blocks(OF_QUERIES)
        return min(self.num_windows, -(-self.wanted_programs(OF_QUERIES) // (blocks.count * self.heads)))

    def wanted_programs(self, kernel: str) -> int:
        """Number of programs that occupy the device."""
        device = self.inputs[0].device
        count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return WARPS_PER_MULTIPROCESSOR // self.blocks(kernel).warps * count


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def product_precision(dtype: torch.dtype) -> str:
    """The precision of float32 products, which is that of torch's own. It has no effect on half precisions."""
    settings = torch.backends.cuda.matmul
    # Torch before 2.9 has the older name only. Later versions raise an error for it once the newer name was set.
    allows_tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if dtype != torch.float32 or allows_tf32 else "ieee"


def is_interpreted() -> bool:
    """Whether Triton interprets kernels in Python, on any device. For tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
