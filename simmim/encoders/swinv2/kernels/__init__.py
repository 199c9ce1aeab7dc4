"""Faster ways to the encoder's numbers, put in by `use`: whole blocks and patch merging on a CPU by kernels in C, compiled
once for the machine at hand; attention on a GPU by kernels in Triton, checked once against the plain lines."""

from simmim.encoders.swinv2.kernels.dispatch import use
from simmim.encoders.swinv2.kernels.library import SWITCH, disabled, kernels, reason

__all__ = ["SWITCH", "disabled", "kernels", "reason", "use"]
