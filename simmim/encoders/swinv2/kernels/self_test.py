"""Whether the kernels for a GPU do, on the device at hand, what the encoder's own lines do: tried once for each kind of
window, before the first is computed with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from simmim.encoders.swinv2.kernels.conditions import is_modified, product_type
from simmim.encoders.swinv2.kernels.gpu import interpreted, takes_attention, window_attention
from simmim.encoders.swinv2.kernels.library import is_disabled
from simmim.execution import is_eager
from simmim.messages import first_line

# Torch before 2.7 cannot tell; it exported by tracing, which `is_eager` sees.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
# Distance of a result from that of the plain lines, as a share of its length. Products of float32 may be of 10 bits.
TOLERANCES = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.05}


def supports_attention(attn: nn.Module, x: Tensor, window: tuple[int, int], plain: Callable) -> bool:
    """Whether the kernels for a GPU can do what `attn`, a `simmim.encoders.swinv2.WindowAttention`, does to the windows of x,
    (B, H, W, C), and torch.compile or nobody traces it.

    Args:
        plain: `simmim.encoders.swinv2.attend`.
    """
    if x.device.type != "cuda" and not interpreted():
        return False
    if is_disabled() or type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or is_modified(attn):
        return False
    if not is_eager() and (not torch.compiler.is_compiling() or is_exporting()):
        return False
    kind = product_type(attn.qkv.weight)
    return verified_constant(x.device, kind, window[0] * window[1], x.shape[-1] // attn.num_heads, plain)


def verified_constant(device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int, plain: Callable) -> bool:
    """`verified`, which torch.compile does not look into."""
    return verified(device, dtype, window_tokens, head_dim, plain)


# As by torch.compiler.assume_constant_result, which would load all of the compiler.
verified_constant._dynamo_marked_constant = True


@lru_cache(maxsize=256)
def verified(device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int, plain: Callable) -> bool:
    """Whether `window_attention` is to be used for qkv of `dtype`, windows of so many tokens and heads of so many channels;
    where the kernels fail or differ, a warning says so and they are not tried again."""
    if not takes_attention(device, dtype, window_tokens, head_dim):
        return False
    try:
        problem = difference(device, dtype, window_tokens, head_dim, plain)
    except Exception as error:  # whatever a compiler, a driver or a device that nobody has tried comes up with
        problem = first_line(error)
    if problem:
        kind = f"{str(dtype).removeprefix('torch.')}, windows of {window_tokens} tokens, heads of {head_dim} channels"
        warnings.warn(f"attention goes without its kernels on {device} ({kind}): {problem}", stacklevel=2)
    return not problem


def difference(device: torch.device, dtype: torch.dtype, window_tokens: int, head_dim: int, plain: Callable) -> str:
    """How kernels and plain lines differ in two windows of one head, whole, and one of them divided into regions, for which
    other kernels are compiled; "" for not."""
    # Nothing of it is part of what goes on around: an evaluation, a trace, the run's own random numbers.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        draw = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device)

        tokens = 2 * window_tokens
        given = [
            random(tokens, 3 * head_dim).to(dtype),
            random(head_dim),
            random(head_dim),
            random(1, 1, 1).abs() + 5,
            random(1, window_tokens, window_tokens),
        ]
        grad = random(tokens, head_dim).to(dtype)
        token_of = torch.arange(tokens, dtype=torch.int32, device=device).view(2, -1)
        divided = torch.stack((torch.zeros(window_tokens), torch.arange(window_tokens) % 2)).to(device, torch.uint8)

        def by_kernels(regions, qkv, q_bias, v_bias, scale, bias) -> Tensor:
            return window_attention(qkv, q_bias, v_bias, scale, bias, token_of, regions, images=1)

        def by_plain_lines(regions, qkv, q_bias, v_bias, scale, bias) -> Tensor:
            qkv = (qkv + torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))).to(dtype)
            index = torch.arange(window_tokens**2, device=device)
            windows = qkv.view(2, window_tokens, 3, 1, head_dim)
            return plain(windows, scale, bias.view(-1, 1), index, regions).reshape(tokens, head_dim)

        for regions in (None, divided):
            found, expected = (results(how, regions, given, grad) for how in (by_kernels, by_plain_lines))
            for name, value in expected.items():
                distance = ((found[name] - value).norm() / value.norm()).item()
                if not distance < TOLERANCES[dtype]:
                    return f"its {name} is {distance:.2g} of its length from that of the plain lines"
    return ""


def results(how: Callable[..., Tensor], regions: Tensor | None, given: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients, float32, by name."""
    given = [value.clone().requires_grad_() for value in given]
    output = how(regions, *given)
    names = ("output", *(f"gradient of {name}" for name in ("qkv", "q_bias", "v_bias", "scale", "bias")))
    values = (output.detach(), *torch.autograd.grad(output, given, grad))
    return {name: value.float() for name, value in zip(names, values)}
