"""The encoder's fast ways: through a block on a CPU, by kernels in C, compiled once for the machine at hand; through a
window's attention on a GPU, by kernels in Triton, tried once against the plain lines."""
from simmim.fused.block import Windows, join_attention, join_mlp, takes
from simmim.fused.circumstances import first_line
from simmim.fused.gpu import window_attention
from simmim.fused.library import SWITCH, kernels, reason
from simmim.fused.trial import attends

__all__ = [
    "SWITCH", "Windows", "attends", "first_line", "join_attention", "join_mlp", "kernels", "reason", "takes",
    "window_attention",
]  # fmt: skip
