"""Kernels that compute what `model.py`, the reference implementation, does in less time. `use` puts them into an encoder.

On a CPU whole blocks and patch mergings run by kernels in C, compiled once for the machine. On a GPU the attention runs by
kernels in Triton, checked once against the reference implementation.
"""

from simmim.encoders.swinv2.kernels.dispatch import use
from simmim.encoders.swinv2.kernels.library import SWITCH, disabled, get_kernels, unavailable_reason

__all__ = ["SWITCH", "disabled", "get_kernels", "unavailable_reason", "use"]
