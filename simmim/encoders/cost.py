"""What a training step costs, as encoders and methods state it and `simmim.planning` adds it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from simmim.encoders.base import EncoderConfig, Size

PRECISIONS = ("bf16-mixed", "32-true")
STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Setup:
    """How a run is spread over devices and what it trades for memory.

    Args:
        batch_per_device: B, images that a device takes at once.
        devices: how many share the work.
        precision: bf16-mixed or 32-true, as Lightning names them.
        strategy: ddp, a whole copy of the model on each device, or fsdp, each block a unit spread over all of them and
            gathered in float32, as torch's fully_shard does without a policy of its own.
        checkpoint_activations, sequential_attention: as of `Encoder`.
        device: cuda or cpu. Autocast normalizes in float32 on the former and in bfloat16 on the latter.

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
        for name, known in (("precision", PRECISIONS), ("strategy", STRATEGIES), ("device", ("cuda", "cpu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give {' or '.join(known)}")
        for name in ("batch_per_device", "devices", "sequential_attention"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")

    @property
    def compute_bytes(self) -> int:
        """Of a number in matrix products."""
        return 2 if self.precision == "bf16-mixed" else 4

    @property
    def norm_bytes(self) -> int:
        """Of a number on the main path and in the norms that join it."""
        return 4 if self.device == "cuda" else self.compute_bytes

    @property
    def sharded(self) -> bool:
        """Whether each device holds only its share of the model."""
        return self.strategy == "fsdp" and self.devices > 1


@dataclass(frozen=True)
class LayerCost:
    """One step of the forward pass: memory in bytes on one device.

    Attributes:
        parameters: how many, not bytes.
        kept: from its forward pass to its backward pass.
        cast: what autocast keeps of the weights until the whole forward pass is over, and no longer.
        rebuilt: what the backward pass computes anew and keeps until it is through.
        forward, backward: what either pass needs besides, temporarily.
        gathered: under FSDP, its parameters whole, where it is a unit of its own.
    """

    parameters: int
    kept: float
    cast: float = 0.0
    rebuilt: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    gathered: int = 0


@dataclass(frozen=True)
class Flops:
    """Matrix products of one image, two FLOPs per multiply-add: of one pass forward, and of a training step."""

    forward: float
    training: float


class CostModel(Protocol):
    """FLOPs and memory of an encoder's training step, by arithmetic alone."""

    def flops(self, config: EncoderConfig, image_size: Size, setup: Setup) -> Flops:
        """Of the encoder on one image in a batch of `setup.batch_per_device`, recomputation included."""

    def layers(self, config: EncoderConfig, image_size: Size, setup: Setup) -> Sequence[LayerCost]:
        """The encoder's steps in order, from the images to the final norm."""

    def cached_bytes(self, config: EncoderConfig, image_size: Size, setup: Setup) -> int:
        """What is cached from step to step: indices, attention masks."""

    def sequential_options(self, config: EncoderConfig, image_size: Size) -> int | None:
        """The number of windows at a time to recommend where memory is short; None where attention is not sequential."""
