"""FLOPs and memory of a training step of encoders with shifted windows, by arithmetic alone, for `simmim plan`.

The formulas list what autograd keeps of blocks and their surroundings. tests/test_plan.py compares them with the live bytes
of real steps, so a change of what those keep is a change here.

Shape letters: B images, h heads, M windows of one image, N tokens of one window. In formulas `compute` is the bytes per
element in matrix products and `norm` the bytes per element in norms and on the main path; `elements` counts those of a
batch's feature map, `padded` those of its windows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from simmim.encoders.base import Size
from simmim.encoders.cost import BlockParameters, Flops, LayerCost, Setup
from simmim.encoders.shifted_windows.config import ShiftedWindowConfig
from simmim.encoders.shifted_windows.model import PIECE_LOGITS, ShiftedWindowEncoder

Config = TypeVar("Config", bound=ShiftedWindowConfig)


class ShiftedWindowCost(ABC, Generic[Config]):
    """The `CostModel` of a Swin. It counts the reference implementation; kernels keep less.

    Attributes:
        encoder: the class of the encoder.
    """

    encoder: ClassVar[type[ShiftedWindowEncoder]]

    @abstractmethod
    def bias_flops(self, stage: StageShape) -> float:
        """FLOPs of a block's position bias, which is computed once per batch."""

    def spared_flops(self, stage: StageShape) -> float:
        """FLOPs of a block that are not computed again where activations are recomputed."""
        return 0.0

    @abstractmethod
    def bias_bytes(self, stage: StageShape) -> int:
        """Bytes that are cached for the position bias of a window, besides its index."""

    @abstractmethod
    def block_layer(
        self, config: Config, stage: StageShape, setup: Setup, parameters: BlockParameters, index: int, block: int
    ) -> LayerCost:
        """One block: number `block` of stage `index`."""

    @abstractmethod
    def merging_layer(self, elements: int, setup: Setup, num_parameters: int) -> LayerCost:
        """One patch merging that returns `elements` elements."""

    def flops(self, config: Config, image_size: Size, setup: Setup) -> Flops:
        """FLOPs per image. The position bias is computed once per batch, so each image has a share of it."""
        stages = stage_shapes(config, image_size)
        blocks = attention = 0.0
        for stage, depth in zip(stages, config.depths):
            core = 2 * 2 * stage.padded * stage.window_tokens * stage.dim  # logits, and the weighted sum of values
            linear = 2 * stage.dim * (stage.padded * 4 * stage.dim + stage.tokens * 2 * stage.hidden)
            bias = self.bias_flops(stage) / setup.batch_per_device
            attention += depth * core
            blocks += depth * (core + linear + bias)
        embed = 2 * stages[0].tokens * stages[0].dim * config.in_channels * config.patch_size**2
        merging = sum(2 * after.tokens * 4 * before.dim * after.dim for before, after in pairwise(stages))
        forward = embed + blocks + merging
        # A product has two gradients, but the gradient of the images is not computed.
        training = 3 * forward - embed
        if setup.checkpoint_activations:
            training += blocks - sum(depth * self.spared_flops(stage) for stage, depth in zip(stages, config.depths))
        if setup.sequential_attention is not None:
            training += attention // 2  # the logits again; the weighted sum is not needed a second time
        return Flops(forward, training)

    def layers(self, config: Config, image_size: Size, setup: Setup) -> list[LayerCost]:
        """Patch embedding, blocks and mergings, final norm."""
        parameters = parameter_counts(self.encoder, config)
        stages = stage_shapes(config, image_size)
        batch, compute, norm = setup.batch_per_device, setup.compute_bytes, setup.norm_bytes

        pixels = batch * math.prod(image_size) * config.in_channels
        elements = batch * stages[0].tokens * stages[0].dim
        # The images; their copy for the projection, channels last and in the products' precision; the norm's input.
        kept = pixels * (4 + compute) + elements * norm
        layers = [LayerCost(parameters.embed, kept, forward=elements * 2 * norm, backward=elements * 2 * norm)]
        for index, (stage, blocks) in enumerate(zip(stages, parameters.blocks)):
            for block, own in enumerate(blocks):
                layers.append(self.block_layer(config, stage, setup, own, index, block))
            if index < len(parameters.mergings):
                after, merging = stages[index + 1], parameters.mergings[index]
                layers.append(self.merging_layer(batch * after.tokens * after.dim, setup, merging))
        # The norm's input. What comes after the encoder keeps the output.
        elements = batch * stages[-1].tokens * stages[-1].dim
        return [*layers, LayerCost(parameters.norm, elements * norm)]

    def cached_bytes(self, config: Config, image_size: Size, setup: Setup) -> int:
        """Bytes of the caches of geometry: indices and coordinates of windows, attention masks."""
        total, windows = 0, set()
        for stage, depth in zip(stage_shapes(config, image_size), config.depths):
            if stage.window not in windows:
                windows.add(stage.window)
                total += 8 * stage.window_tokens**2 + self.bias_bytes(stage)
            if stage.shifts and depth > 1:
                # Labels of regions, int64, and the mask between all pairs of tokens, float32.
                mask = 0 if setup.sequential_attention is not None else 4 * stage.window_tokens
                total += stage.num_windows * stage.window_tokens * (8 + mask)
        return total

    def default_sequential_attention(self, config: Config, image_size: Size) -> int:
        """As many windows at once as have no more than `PIECE_LOGITS` logits with all heads."""
        largest = max(stage.heads * stage.window_tokens**2 for stage in stage_shapes(config, image_size))
        return max(PIECE_LOGITS // largest, 1)


# --- shapes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageShape:
    """The sizes of one stage on one image.

    Attributes:
        dim, hidden: channels of the map and of the MLP's hidden layer.
        heads: h.
        tokens: of the map.
        padded: of the map padded to whole windows.
        window: (height, width) in tokens.
        num_windows: M.
        shifts: whether every second block has something to shift.
    """

    dim: int
    heads: int
    hidden: int
    tokens: int
    padded: int
    window: Size
    num_windows: int
    shifts: bool

    @property
    def window_tokens(self) -> int:
        """N."""
        return self.window[0] * self.window[1]

    @property
    def offsets(self) -> int:
        """Number of offsets between two tokens of a window: rows of the position-bias table."""
        return (2 * self.window[0] - 1) * (2 * self.window[1] - 1)


def stage_shapes(config: ShiftedWindowConfig, image_size: Size) -> list[StageShape]:
    """The sizes of each stage on an image of `image_size` pixels."""
    size = tuple(-(-side // config.patch_size) for side in image_size)
    stages = []
    for dim, heads, window in zip(config.dims, config.num_heads, config.windows(image_size)):
        num_windows = math.prod(-(-side // w) for side, w in zip(size, window))
        shifts = any(side > w and w > 1 for side, w in zip(size, window))
        padded = num_windows * math.prod(window)
        hidden = int(dim * config.mlp_ratio)
        stages.append(StageShape(dim, heads, hidden, math.prod(size), padded, window, num_windows, shifts))
        size = tuple(-(-side // 2) for side in size)
    return stages


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of each part: patch embedding, blocks of each stage, merging after each stage, final norm."""

    embed: int
    blocks: tuple[tuple[BlockParameters, ...], ...]
    mergings: tuple[int, ...]
    norm: int


@lru_cache(maxsize=64)
def parameter_counts(kind: type[ShiftedWindowEncoder], config: ShiftedWindowConfig) -> ParameterCounts:
    """Counted on an encoder of the meta device."""
    with torch.device("meta"):
        encoder = kind(config)

    def count(part: nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    stages: list[Any] = list(encoder.layers)
    return ParameterCounts(
        count(encoder.patch_embed),
        tuple(tuple(BlockParameters.of(block) for block in stage.blocks) for stage in stages),
        tuple(count(stage.downsample) for stage in stages if stage.downsample is not None),
        count(encoder.norm),
    )


# --- memory -------------------------------------------------------------------------------------------------------------


def attention_weights(stage: StageShape, setup: Setup) -> int:
    """Bytes of all attention weights that are kept: in float32, and again in the products' precision where that differs."""
    if setup.sequential_attention is not None:
        return 0
    pairs = setup.batch_per_device * stage.num_windows * stage.heads * stage.window_tokens**2
    return pairs * (4 if setup.compute_bytes == 4 else 4 + 2)


def attention_temporary(stage: StageShape, setup: Setup) -> tuple[float, float]:
    """Bytes of temporary memory of one block's attention, forward and backward, besides what it keeps."""
    compute, norm = setup.compute_bytes, setup.norm_bytes
    windows, heads, pairs = setup.batch_per_device * stage.num_windows, stage.heads, stage.window_tokens**2
    elements = setup.batch_per_device * stage.tokens * stage.dim
    if setup.sequential_attention is not None:
        windows = min(windows, setup.sequential_attention)
        heads = min(heads, max(PIECE_LOGITS // (windows * pairs), 1))
    logits = 4 * windows * heads * pairs
    # Logits before and after the mask is added, or with the weights, and those in the products' precision; one bias.
    forward = (2 if compute == 4 else 2.5) * logits + 4 * heads * pairs - attention_weights(stage, setup)
    if setup.sequential_attention is None:
        # Gradients of the weights and of the logits; of the main path, and of the output of attention.
        return forward, 2 * logits + elements * (norm + 2 * compute)
    # The weights again, and gradients of queries, keys and values, piece by piece and joined.
    return forward, 3 * logits + elements * (norm + compute + 2 * 3 * compute)
