"""The encoder's fast ways: through a block or a merging on a CPU, by kernels in C, compiled once for the machine at hand;
through a window's attention on a GPU, by kernels in Triton, tried once against the plain lines."""
from simmim.fused.block import Windows, bias_of_offsets, join_attention, join_mlp, merge
from simmim.fused.circumstances import first_line, plainly_eager
from simmim.fused.gpu import window_attention
from simmim.fused.library import SWITCH, kernels, reason
from simmim.fused.taken import takes, takes_merging
from simmim.fused.trial import attends

__all__ = [
    "SWITCH", "Windows", "attends", "bias_of_offsets", "first_line", "join_attention", "join_mlp", "kernels", "merge",
    "plainly_eager", "reason", "takes", "takes_merging", "window_attention",
]  # fmt: skip
