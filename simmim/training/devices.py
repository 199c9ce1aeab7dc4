"""What is asked of the machine before there is a trainer, and where there is none: no training library is imported."""

from __future__ import annotations

import torch

from simmim.encoders.base import EncoderConfig


def device_type() -> str:
    """The kind of device a run uses unless told otherwise: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_precision(device: str, encoder: EncoderConfig) -> str:
    """bf16-mixed where the hardware has it, else full precision; and that for nano, which is too small to gain by it."""
    small = max(encoder.channels) <= 96
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # emulation is far slower than float32
    else:
        has = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        has_bf16 = (has.get("avx512_bf16") or has.get("amx_bf16")) and not small
    return "bf16-mixed" if has_bf16 else "32-true"
