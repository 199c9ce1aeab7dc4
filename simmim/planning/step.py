"""FLOPs and memory of one training step: the encoder's layers, then the method's head.

Everything is arithmetic and nothing is allocated, so a model that fits no machine at hand is planned as fast as a small one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simmim.encoders.base import EncoderConfig, Size
from simmim.encoders.cost import CostModel, Flops, LayerCost, Setup
from simmim.encoders.registry import family_of
from simmim.methods.base import Method, MethodSettings

OPTIMIZER_STATES = 2  # AdamW's two moments of each parameter


def cost_model(config: EncoderConfig) -> CostModel[Any]:
    """The cost model of an encoder's family.

    Raises:
        ValueError: when the family has none.
    """
    family = family_of(config)
    if family.cost is None:
        raise ValueError(f"{family.title} encoders cannot be planned: their family has no cost model")
    return family.cost


def step_flops(
    config: EncoderConfig,
    image_size: Size,
    setup: Setup,
    method: type[Method],
    predicted: float = 1.0,
    settings: MethodSettings | None = None,
) -> Flops:
    """FLOPs of encoder and head per image, in a batch of `setup.batch_per_device`.

    Args:
        predicted: share of the image that the method predicts, in [0, 1].
        settings: of the method; its defaults where None.

    Raises:
        ValueError: as `cost_model`.
    """
    settings = settings or method.settings_class()
    encoder = method.encoder_flops(cost_model(config), config, settings, image_size, setup)
    head = method.head_flops(config, settings, image_size, setup, predicted)
    return Flops(encoder.forward + head.forward, encoder.training + head.training)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters, gradients, optimizer: in float32 whatever the precision.
        exchange: what only several devices need. Of DDP the buckets, a second copy of the gradients. Of FSDP the gathered
            parameters, those outside the blocks throughout and two units at a time, blocks or their largest parts, and the
            gradient of one unit before and while it is sent.
        activations: kept from the forward pass for the backward pass, with the images and what is cached between steps.
        working: the largest temporary memory that a layer needs in either pass.
        peak: the largest total at any time. It is less than the sum: gradients grow while activations are freed.
    """

    parameters: int
    gradients: int
    optimizer: int
    exchange: int
    activations: int
    working: int
    peak: int


def step_memory(
    config: EncoderConfig,
    image_size: Size,
    setup: Setup,
    method: type[Method],
    settings: MethodSettings | None = None,
) -> Memory:
    """Memory of one device in a training step.

    Args:
        settings: of the method; its defaults where None.

    Raises:
        ValueError: as `cost_model`.
    """
    cost, settings = cost_model(config), settings or method.settings_class()
    layers = [
        *method.encoder_layers(cost, config, settings, image_size, setup),
        *method.head_layers(config, settings, image_size, setup),
    ]
    cached = cost.cached_bytes(config, image_size, setup)
    num_shards = setup.devices if setup.sharded else 1
    trained = math.ceil(4 * sum(layer.parameters for layer in layers) / num_shards)
    parameters = trained + math.ceil(4 * sum(layer.frozen for layer in layers) / num_shards)
    optimizer = OPTIMIZER_STATES * trained
    exchange = 0 if setup.devices == 1 else trained
    if setup.sharded:  # what is no unit of its own stays gathered
        exchange = 4 * sum(layer.parameters for layer in layers if not layer.gathered)
    throughout = parameters + optimizer + exchange + cached
    return Memory(
        parameters=parameters,
        gradients=trained,
        optimizer=optimizer,
        exchange=exchange + max(layer.gathered + layer.sent for layer in layers),
        activations=round(cached + sum(layer.kept for layer in layers)),
        working=round(max(max(layer.forward, layer.rebuilt + layer.backward) for layer in layers)),
        peak=round(throughout + peak_of_passes(layers, num_shards)),
    )


def peak_of_passes(layers: Sequence[LayerCost], num_shards: int) -> float:
    """The largest sum of activations, temporary memory, gradients and gathered units, in bytes, from layer to layer forward
    and back."""
    kept = casts = gradients = peak = whole = 0.0
    for layer in layers:
        kept, casts = kept + layer.kept, casts + layer.cast
        peak = max(peak, kept + casts + layer.forward + layer.gathered)
    for layer in reversed(layers):
        peak = max(peak, kept + layer.rebuilt + layer.backward + gradients + layer.gathered)
        kept -= layer.kept
        # In the end FSDP holds the unit's whole gradient, and once more while it is sent.
        peak = max(peak, kept + gradients + layer.gathered + layer.sent)
        # What is no unit of its own is one with the whole model, whose gradient is sent when it is complete.
        rest = 0 if num_shards == 1 or layer.gathered else 4 * layer.parameters
        whole, gradients = whole + rest, gradients + (rest or 4 * layer.parameters / num_shards)
    return max(peak, gradients + whole)  # in the optimizer's step
