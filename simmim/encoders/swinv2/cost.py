"""FLOPs and memory of SwinV2's training step (`simmim.encoders.shifted_windows.cost`)."""

from __future__ import annotations

from simmim.encoders.cost import BlockParameters, LayerCost, Setup
from simmim.encoders.shifted_windows.cost import ShiftedWindowCost, StageShape, attention_temporary, attention_weights
from simmim.encoders.swinv2.config import SwinV2Config
from simmim.encoders.swinv2.model import CPB_HIDDEN, SwinV2


class SwinV2Cost(ShiftedWindowCost[SwinV2Config]):
    """The `CostModel` of SwinV2."""

    encoder = SwinV2

    def bias_flops(self, stage: StageShape) -> float:
        """Of the MLP of coordinates."""
        return 2 * stage.offsets * CPB_HIDDEN * (2 + stage.heads)

    def bias_bytes(self, stage: StageShape) -> int:
        """Of the coordinates."""
        return 2 * 4 * stage.offsets

    def block_layer(
        self, config: SwinV2Config, stage: StageShape, setup: Setup, parameters: BlockParameters, index: int, block: int
    ) -> LayerCost:
        """One `SwinV2Block`."""
        every = config.extra_norm_every if index == 2 else 0
        return block_layer(stage, setup, parameters, bool(every) and (block + 1) % every == 0)

    def merging_layer(self, elements: int, setup: Setup, num_parameters: int) -> LayerCost:
        """One `PatchMerging` that returns `elements` elements."""
        compute, norm = setup.compute_bytes, setup.norm_bytes
        # Four neighbors side by side, which are twice the elements of the output; the norm's input.
        kept = 2 * elements * compute + elements * norm + setup.weight_copies(num_parameters)
        return LayerCost(num_parameters, kept, forward=2 * elements * norm, backward=4 * elements * norm)


def block_layer(stage: StageShape, setup: Setup, parameters: BlockParameters, extra_norm: bool) -> LayerCost:
    """One `SwinV2Block`.

    Attention and MLP do not reach their peaks at the same time. So the temporary memory of attention is counted less what
    the MLP keeps.
    """
    compute, norm = setup.compute_bytes, setup.norm_bytes
    tokens = setup.batch_per_device * stage.tokens
    elements, hidden = tokens * stage.dim, tokens * stage.hidden
    attention = attention_kept(stage, setup)
    # The MLP's input, its hidden layer before and after GELU, the norm's input; means and deviations of both norms.
    mlp = elements * compute + 2 * hidden * compute + elements * norm + 4 * 4 * tokens
    kept = attention + mlp + (elements * norm if extra_norm else 0)
    copies = setup.weight_copies(4 * stage.dim**2 + 2 * stage.dim * stage.hidden, of_block=True)

    attention_forward, attention_backward = attention_temporary(stage, setup)
    forward = max(attention_forward - mlp, 0) + 2 * elements * norm
    # The gradients of attention, or those of the MLP's hidden layer, input and output.
    backward = max(attention_backward - mlp, hidden * compute + elements * (norm + compute))
    total, units = parameters.total, setup.gathered(parameters)
    if setup.checkpoint_activations:
        # The forward pass drops what it would keep; at its peak it holds what attention keeps.
        return LayerCost(total, elements * norm, copies, kept + copies, forward + attention, backward, *units)
    return LayerCost(total, kept + copies, 0, 0, forward, backward, *units)


def attention_kept(stage: StageShape, setup: Setup) -> int:
    """Bytes that the attention of one block keeps for the backward pass."""
    compute, norm = setup.compute_bytes, setup.norm_bytes
    tokens = setup.batch_per_device * stage.padded
    padded = tokens * stage.dim
    # The windows, the projection's input, the norm's input; of the position bias the hidden layer and the table.
    around = 2 * padded * compute + padded * norm + 4 * stage.offsets * (CPB_HIDDEN + stage.heads)
    if setup.sequential_attention is not None:
        return around + 3 * padded * compute  # queries, keys and values
    # Queries and keys in float32, which without autocast are views of one tensor with the values; both normalized, the
    # queries scaled, the keys transposed for the product; a copy of the values; norms of queries and keys.
    inside = padded * ((3 if compute == 4 else 2) * 4 + 3 * 4 + compute) + 4 * 4 * tokens * stage.heads
    return around + inside + attention_weights(stage, setup)
