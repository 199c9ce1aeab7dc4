"""FLOPs and memory of ViT's training step, by arithmetic alone, for `simmim plan`.

The formulas list what autograd keeps of `ViTBlock` and its surroundings. tests/test_plan.py compares them with live bytes
of real steps.

Shape letters: B images, h heads, C channels, T tokens of one image with the class token. In formulas `compute` is the bytes
per element in matrix products and `norm` the bytes per element in norms and on the main path.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from simmim.encoders.base import Size
from simmim.encoders.cost import BlockParameters, Flops, LayerCost, Setup
from simmim.encoders.vit.config import SHARED, ViTConfig
from simmim.encoders.vit.model import ViT


class ViTCost:
    """The `CostModel` of ViT."""

    def flops(self, config: ViTConfig, image_size: Size, setup: Setup) -> Flops:
        """FLOPs per image."""
        patches = math.prod(config.grid(image_size))
        tokens, dim, hidden = patches + 1, config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        core = 2 * 2 * tokens**2 * dim  # logits, and the weighted sum of values
        blocks = config.depth * (core + 2 * tokens * dim * (4 * dim + 2 * hidden))
        embed = 2 * patches * dim * config.in_channels * config.patch_size**2
        forward = embed + blocks
        # A product has two gradients, but the gradient of the images is not computed.
        training = 3 * forward - embed
        if setup.checkpoint_activations:
            # Without factors of its channels, no gradient depends on the MLP's last product.
            training += blocks - (0 if config.layer_scale else config.depth * 2 * tokens * dim * hidden)
        return Flops(forward, training)

    def layers(self, config: ViTConfig, image_size: Size, setup: Setup) -> list[LayerCost]:
        """Patch embedding, which counts the class token and the position bias of all blocks; blocks; final norm."""
        embed_parameters, block_parameters, norm_parameters = parameter_counts(config)
        batch, compute, norm = setup.batch_per_device, setup.compute_bytes, setup.norm_bytes
        patches = math.prod(config.grid(image_size))
        pixels = batch * math.prod(image_size) * config.in_channels
        bias = 4 * config.num_heads * (patches + 1) ** 2
        # The images, and their copy in the products' precision. A bias of all blocks is an input of each that is recomputed.
        shared = config.position_bias == SHARED
        kept = pixels * (4 if compute == 4 else 4 + compute) + (bias if shared and setup.checkpoint_activations else 0)
        kept += setup.weight_copies(config.embed_dim * config.in_channels * config.patch_size**2)
        elements = batch * patches * config.embed_dim
        embed = LayerCost(embed_parameters, kept, forward=2 * elements * norm, backward=2 * elements * norm)
        # Factors of channels are float32, and so is the main path after the first of them.
        main = 4 if config.layer_scale else compute
        mains = [compute, *[main] * (config.depth - 1)]
        blocks = [block_layer(config, patches + 1, bias, setup, block_parameters, before, main) for before in mains]
        # The norm's input. What comes after the encoder keeps the output.
        return [embed, *blocks, LayerCost(norm_parameters, elements * max(main, norm))]

    def cached_bytes(self, config: ViTConfig, image_size: Size, setup: Setup) -> int:
        """Bytes of the cached indices of pairs, of patches and of all tokens."""
        patches = math.prod(config.grid(image_size))
        return 8 * patches**2 + 8 * (patches + 1) ** 2

    def default_sequential_attention(self, config: ViTConfig, image_size: Size) -> None:
        """None: there are no windows."""


@lru_cache(maxsize=64)
def parameter_counts(config: ViTConfig) -> tuple[int, BlockParameters, int]:
    """Numbers of parameters of patch embedding and position bias of all blocks, of a block, and of the final norm."""
    with torch.device("meta"):
        encoder = ViT(config)
    total = sum(parameter.numel() for parameter in encoder.parameters())
    block = BlockParameters.of(encoder.layers[0])
    norm = 2 * config.embed_dim
    return total - config.depth * block.total - norm, block, norm


def block_layer(
    config: ViTConfig, num_tokens: int, bias: int, setup: Setup, parameters: BlockParameters, before: int, main: int
) -> LayerCost:
    """One `ViTBlock`. Attention and MLP do not reach their peaks at the same time.

    Args:
        bias: bytes of the position bias of all pairs.
        before, main: bytes per element of the main path, before the block and in it.
    """
    compute, norm, dim = setup.compute_bytes, max(main, setup.norm_bytes), config.embed_dim
    tokens = setup.batch_per_device * num_tokens
    elements, hidden = tokens * dim, tokens * int(dim * config.mlp_ratio)
    pairs = setup.batch_per_device * config.num_heads * num_tokens**2
    scaled = elements * compute if config.layer_scale else 0  # a branch before its factors
    # Attention weights in float32, and again in the products' precision where that differs.
    weights = pairs * (4 if compute == 4 else 4 + compute)
    # The norm's input; the projection's; queries, scaled, keys and values; the last projection's input; mean and deviation.
    attention = elements * max(before, setup.norm_bytes) + 5 * elements * compute + weights + scaled + 2 * 4 * tokens
    # The norm's input, the MLP's, its hidden layer before and after GELU.
    mlp = elements * (norm + compute) + 2 * hidden * compute + scaled + 2 * 4 * tokens
    copies = setup.weight_copies(4 * dim**2 + 2 * dim * int(dim * config.mlp_ratio), of_block=True)
    kept = attention + mlp
    logits = 4 * pairs
    # Logits before and after the bias is added, or with the weights; the bias.
    attention_forward = (2 if compute == 4 else 2.5) * logits + bias - weights
    attention_backward = 2 * logits + elements * (norm + 2 * compute)
    forward = max(attention_forward - mlp, 0) + 2 * elements * norm
    backward = max(attention_backward - mlp, hidden * compute + elements * (norm + compute))
    total, units = parameters.total, setup.gathered(parameters)
    if setup.checkpoint_activations:
        # What the block begins with is the first norm's input, where that is not cast.
        begin = elements * before
        again = kept + copies - (begin if before == max(before, setup.norm_bytes) else 0)
        return LayerCost(total, begin, copies, again, forward + attention, backward, *units)
    return LayerCost(total, kept + copies, 0, 0, forward, backward, *units)
