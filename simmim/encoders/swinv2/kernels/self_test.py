"""A self-test of the kernels for a GPU: before their first use on a device they are compared with the reference
implementation, once per window and head size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from simmim.encoders.base import Size
from simmim.encoders.layers import RowIndex
from simmim.encoders.shifted_windows.geometry import REGIONS
from simmim.encoders.swinv2.kernels.conditions import is_modified, product_dtype
from simmim.encoders.swinv2.kernels.gpu import is_interpreted, supports_window_attention, window_attention
from simmim.encoders.swinv2.kernels.library import is_disabled
from simmim.execution import is_eager
from simmim.messages import first_line

# Before 2.7 torch has no such function. It exported by tracing, which `is_eager` detects.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
# Largest distance of a result from that of the reference implementation, relative to its norm. Products of float32 may have
# 10-bit mantissas.
TOLERANCES = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.05}
# Of the self-test. The gradient of a head's temperature is one number, a sum that nearly cancels: of a single head it may be
# far off by rounding alone.
IMAGES, HEADS, WINDOWS = 2, 8, 2


def supports_attention(attn: nn.Module, x: Tensor, window: Size, plain: Callable) -> bool:
    """Whether the kernels for a GPU can compute a `WindowAttention` on the windows of x, (B, H, W, C), in this call.

    The call must be eager or under torch.compile, without hooks on `attn`.

    Args:
        plain: `simmim.encoders.swinv2.model.attend`, for the self-test.
    """
    if x.device.type != "cuda" and not is_interpreted():
        return False
    if is_disabled() or type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or is_modified(attn):
        return False
    if not is_eager() and (not torch.compiler.is_compiling() or is_exporting()):
        return False
    dtype = product_dtype(attn.qkv.weight)
    return passes_while_compiling(x.device, dtype, window[0] * window[1], x.shape[-1] // attn.num_heads, plain)


def passes_while_compiling(
    device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int, plain: Callable
) -> bool:
    """`passes_self_test`, whose result is a constant for torch.compile."""
    return passes_self_test(device, dtype, window_tokens, head_dim, plain)


# As torch.compiler.assume_constant_result does, which would import all of the compiler.
passes_while_compiling._dynamo_marked_constant = True


@lru_cache(maxsize=256)
def passes_self_test(device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int, plain: Callable) -> bool:
    """Whether `window_attention` supports these sizes and its results are those of the reference implementation.

    If they are not, or a kernel fails, a warning says so once and the kernels are not used.

    Args:
        dtype: of qkv.
        window_tokens: N.
        head_dim: D.
    """
    if not supports_window_attention(device, dtype, window_tokens, head_dim):
        return False
    try:
        problem = find_difference(device, dtype, window_tokens, head_dim, plain)
    except Exception as error:  # of the compiler, the driver or the device
        problem = first_line(error)
    if problem:
        sizes = f"{str(dtype).removeprefix('torch.')}, windows of {window_tokens} tokens, heads of {head_dim} channels"
        warnings.warn(f"attention runs without its kernels on {device} ({sizes}): {problem}", stacklevel=2)
    return not problem


def find_difference(
    device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int, plain: Callable, seed: int = 0
) -> str:
    """A text that names the first result by which kernels and reference implementation differ; empty if none does.

    Some heads attend in two windows: without labels; with regions in the second window, for which other kernels are
    compiled; and of two images with groups of tokens that differ between the images.

    Args:
        seed: of the numbers that they compute with.
    """
    # Independent of the caller's modes (evaluation, tracing) and of its random numbers.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs, grad = draw_inputs(device, dtype, window_tokens, head_dim, seed)
        token_of = torch.arange(WINDOWS * window_tokens, dtype=torch.int32, device=device).view(WINDOWS, -1)
        places = torch.arange(window_tokens)
        regions = torch.stack((torch.zeros(window_tokens), places % 2)).to(device, torch.uint8)
        groups = torch.stack([REGIONS * (places % divisor) for divisor in range(1, IMAGES * WINDOWS + 1)])
        groups = groups.to(device, torch.uint8)  # (B · M, N)

        def by_kernels(regions, qkv, q_bias, v_bias, scale, bias) -> Tensor:
            images = len(qkv) // token_of.numel()
            return window_attention(qkv, q_bias, v_bias, scale, bias, token_of, regions, images=images)

        def by_plain_code(regions, qkv, q_bias, v_bias, scale, bias) -> Tensor:
            qkv = (qkv + torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))).to(dtype)
            index = RowIndex(torch.arange(window_tokens**2, device=device))
            windows = qkv.view(-1, window_tokens, 3, HEADS, head_dim)
            return plain(windows, scale, bias.flatten(1).T, index, regions).reshape(len(qkv), -1)

        for images, region_of in ((1, None), (1, regions), (IMAGES, groups)):
            tokens = images * token_of.numel()
            given = [inputs[0][:tokens], *inputs[1:]], grad[:tokens]
            actual = compute_results(by_kernels, region_of, *given)
            expected = compute_results(by_plain_code, region_of, *given)
            for name, value in expected.items():
                distance = ((actual[name] - value).norm() / value.norm()).item()
                if not distance < TOLERANCES[dtype]:
                    return f"its {name} differs from that of the reference implementation by {distance:.2g} of its norm"
    return ""


def draw_inputs(
    device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Random qkv, q_bias, v_bias, scale and bias for `window_attention`, and a gradient of its result."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tokens, dim = IMAGES * WINDOWS * window_tokens, HEADS * head_dim
    inputs = [
        random(tokens, 3 * dim).to(dtype),
        random(dim),
        random(dim),
        random(HEADS, 1, 1).abs() + 5,
        random(HEADS, window_tokens, window_tokens),
    ]
    return inputs, random(tokens, dim).to(dtype)


def compute_results(
    attention: Callable[..., Tensor], regions: Tensor | None, inputs: list[Tensor], grad: Tensor
) -> dict[str, Tensor]:
    """Output and gradients by name, float32."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    output = attention(regions, *inputs)
    names = ("output", *(f"gradient of {name}" for name in ("qkv", "q_bias", "v_bias", "scale", "bias")))
    values = (output.detach(), *torch.autograd.grad(output, inputs, grad))
    return {name: value.float() for name, value in zip(names, values)}
