"""The encoder's fast way through a block on a CPU: kernels in C, compiled once for the machine at hand."""
from simmim.fused.block import Windows, join_attention, join_mlp, takes
from simmim.fused.library import SWITCH, kernels, reason

__all__ = ["SWITCH", "Windows", "join_attention", "join_mlp", "kernels", "reason", "takes"]
