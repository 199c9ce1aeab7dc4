"""FLOPs and memory of Swin's training step (`simmim.encoders.shifted_windows.cost`)."""

from __future__ import annotations

from simmim.encoders.cost import BlockParameters, LayerCost, Setup
from simmim.encoders.shifted_windows.cost import ShiftedWindowCost, StageShape, attention_temporary, attention_weights
from simmim.encoders.swin.config import SwinConfig
from simmim.encoders.swin.model import Swin


class SwinCost(ShiftedWindowCost[SwinConfig]):
    """The `CostModel` of Swin."""

    encoder = Swin

    def bias_flops(self, stage: StageShape) -> float:
        """None: a table is read."""
        return 0.0

    def spared_flops(self, stage: StageShape) -> float:
        """Of the MLP's last product: nothing that the backward pass needs depends on it."""
        return 2 * stage.tokens * stage.hidden * stage.dim

    def bias_bytes(self, stage: StageShape) -> int:
        """None: a table is no cache."""
        return 0

    def block_layer(
        self, config: SwinConfig, stage: StageShape, setup: Setup, parameters: BlockParameters, index: int, block: int
    ) -> LayerCost:
        """One `SwinBlock`. Attention and MLP do not reach their peaks at the same time."""
        compute, norm = setup.compute_bytes, setup.norm_bytes
        tokens = setup.batch_per_device * stage.tokens
        elements, hidden = tokens * stage.dim, tokens * stage.hidden
        padded = setup.batch_per_device * stage.padded * stage.dim
        # The norm's input; the windows; queries, scaled, keys and values; the projection's input; mean and deviation.
        attention = elements * norm + 5 * padded * compute + attention_weights(stage, setup) + 2 * 4 * tokens
        # The norm's input, the MLP's, its hidden layer before and after GELU.
        mlp = elements * (norm + compute) + 2 * hidden * compute + 2 * 4 * tokens
        copies = setup.weight_copies(4 * stage.dim**2 + 2 * stage.dim * stage.hidden, of_block=True)
        kept = attention + mlp
        attention_forward, attention_backward = attention_temporary(stage, setup)
        forward = max(attention_forward - mlp, 0) + 2 * elements * norm
        # The branch begins and ends on the main path, whose gradient is the only one of its size.
        attention_backward -= 2 * elements * compute
        backward = max(attention_backward - mlp, hidden * compute + elements * (norm + compute))
        total, units = parameters.total, setup.gathered(parameters)
        if setup.checkpoint_activations:
            # The forward pass drops what it would keep; at its peak it holds what attention keeps.
            # What the block begins with is the first norm's input.
            begin = elements * norm
            return LayerCost(total, begin, copies, kept - begin + copies, forward + attention, backward, *units)
        return LayerCost(total, kept + copies, 0, 0, forward, backward, *units)

    def merging_layer(self, elements: int, setup: Setup, num_parameters: int) -> LayerCost:
        """One `PatchMerging` that returns `elements` elements."""
        compute, norm = setup.compute_bytes, setup.norm_bytes
        # Four neighbors side by side, twice the elements of the output, before and after the norm.
        kept = 2 * elements * (compute + norm) + setup.weight_copies(num_parameters)
        return LayerCost(num_parameters, kept, forward=2 * elements * norm, backward=4 * elements * norm)
