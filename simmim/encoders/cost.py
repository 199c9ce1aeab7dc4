"""What a training step costs, as encoders and methods state it and `simmim.planning` adds it up.

Shape letter: B images that one device takes at once. Sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from torch import nn

from simmim.encoders.base import EncoderConfig, Size

PRECISIONS = ("bf16-mixed", "32-true")
STRATEGIES = ("ddp", "fsdp")
DEVICES = ("cuda", "cpu")

Config = TypeVar("Config", bound=EncoderConfig, contravariant=True)


@dataclass(frozen=True)
class Setup:
    """How a run is spread over devices and what it trades for memory.

    Args:
        batch_per_device: B, images that a device takes at once.
        devices: number of devices that share the work.
        precision: bf16-mixed or 32-true, as Lightning names them.
        strategy: ddp keeps a whole copy of the model on each device. fsdp spreads each block over all devices and gathers
            it, in mixed precision the weights of its matrix products in half precision (`simmim.training.sharding`).
        checkpoint_activations, sequential_attention: as of `Encoder`.
        device: cuda or cpu. Autocast computes norms in float32 on the former and in bfloat16 on the latter.

    Raises:
        ValueError: for a setting out of range.
    """

    batch_per_device: int
    devices: int = 1
    precision: str = "bf16-mixed"
    strategy: str = "ddp"
    checkpoint_activations: bool = False
    sequential_attention: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("strategy", STRATEGIES), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give {' or '.join(known)}")
        for name in ("batch_per_device", "devices", "sequential_attention"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of what matrix products take and return."""
        return 2 if self.precision == "bf16-mixed" else 4

    @property
    def norm_bytes(self) -> int:
        """Bytes per element on the main path and in the norms that join it."""
        return 4 if self.device == "cuda" else self.compute_bytes

    @property
    def sharded(self) -> bool:
        """Whether each device holds only its share of the model."""
        return self.strategy == "fsdp" and self.devices > 1

    def of_inputs(self, images_per_input: int) -> Setup:
        """As an encoder sees it that takes some images as one."""
        return replace(self, batch_per_device=math.ceil(self.batch_per_device / images_per_input))

    def weight_copies(self, num_weights: int, of_block: bool = False) -> int:
        """Bytes of the copies that autocast makes of weights for matrix products. Under FSDP they are copies of the gathered
        weights, and outlive those. Those of a block are gathered in half precision then, and need none."""
        if self.compute_bytes == 4 or (of_block and self.sharded):
            return 0
        return self.compute_bytes * num_weights

    def gathered(self, block: BlockParameters) -> tuple[int, int]:
        """Under FSDP bytes of weights that are gathered at once, of a unit and the next one, and of gradients before and
        while they are sent, in float32; zeros without FSDP."""
        if not self.sharded:
            return 0, 0
        if self.compute_bytes == 4:
            return 2 * 4 * block.total, 2 * 4 * block.total
        # Parts with products are units, one after the other. The rest of the block is gathered for all of its time. A
        # gradient in half precision takes the place of the weights, which are freed before it is sent.
        *_, second, largest = sorted(block.products)
        rest = block.total - sum(block.products)
        return self.compute_bytes * (largest + second) + 4 * rest, 4 * largest


@dataclass(frozen=True)
class BlockParameters:
    """Numbers of parameters of a block.

    Attributes:
        total: of all.
        products: of each part whose parameters matrix products alone read (the block's `products`).
    """

    total: int
    products: tuple[int, ...]

    @classmethod
    def of(cls, block: nn.Module) -> BlockParameters:
        """Counted."""
        parts = [block, *(block.get_submodule(name) for name in block.products)]  # type: ignore[union-attr]
        total, *products = (sum(parameter.numel() for parameter in part.parameters()) for part in parts)
        return cls(total, tuple(products))


@dataclass(frozen=True)
class LayerCost:
    """One step of the forward pass: memory in bytes on one device.

    Attributes:
        parameters: number of parameters, not bytes.
        kept: held from its forward pass to its backward pass.
        cast: copies of weights that autocast holds until the whole forward pass is over.
        rebuilt: what the backward pass recomputes and holds until it has passed this layer.
        forward, backward: temporary memory of each pass besides.
        gathered, sent: as of `Setup.gathered`, where the layer is a block that FSDP gathers by itself; else 0.
        frozen: number of parameters without gradient, beside `parameters`.
    """

    parameters: int
    kept: float
    cast: float = 0.0
    rebuilt: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    gathered: int = 0
    sent: int = 0
    frozen: int = 0


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products per image, two per multiply-add.

    Attributes:
        forward: of one forward pass.
        training: of a training step: forward and backward pass, with what the latter recomputes.
    """

    forward: float
    training: float


class CostModel(Protocol[Config]):
    """FLOPs and memory of an encoder's training step, computed without allocating anything."""

    def flops(self, config: Config, image_size: Size, setup: Setup) -> Flops:
        """FLOPs of the encoder per image, in a batch of `setup.batch_per_device`."""

    def layers(self, config: Config, image_size: Size, setup: Setup) -> Sequence[LayerCost]:
        """The encoder's layers in order, from the images to the final norm. Every parameter is in exactly one."""

    def cached_bytes(self, config: Config, image_size: Size, setup: Setup) -> int:
        """Bytes that are cached between steps: indices, attention masks."""

    def default_sequential_attention(self, config: Config, image_size: Size) -> int | None:
        """The value of `sequential_attention` to recommend where memory is short; None where the encoder has none."""
