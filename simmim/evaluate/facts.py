"""What an encoder is and costs, for tables of several: a tie with a network of ten times the cost is then seen as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.encoders import registry
from simmim.encoders.base import EncoderConfig, Size
from simmim.encoders.cost import Setup
from simmim.messages import counted, gflops_text

UNKNOWN = "–"


@dataclass(frozen=True)
class EncoderFacts:
    """One encoder of a comparison.

    Attributes:
        network: family and size, or the library's name of the network.
        parameters: number of parameters; None where unknown.
        flops: of one forward pass per image, two per multiply-add; None where they cannot be counted.
        image_size: (height, width) in pixels of the images; None where unknown.
        trained_on: as far as its files tell; empty where they do not.
    """

    network: str
    parameters: int | None = None
    flops: float | None = None
    image_size: Size | None = None
    trained_on: str = ""

    def cells(self) -> list[str]:
        """As cells of a table, under `HEADINGS`."""
        return [
            self.network,
            UNKNOWN if self.parameters is None else f"{self.parameters / 1e6:,.1f}",
            UNKNOWN if self.flops is None else gflops_text(self.flops),
            UNKNOWN if self.image_size is None else "×".join(map(str, self.image_size)),
            self.trained_on or "not recorded",
        ]

    def sentence(self) -> str:
        """In words: "SwinV2 micro, 1.3 M parameters, 0.210 GFLOPs an image of 96×96 px, trained on photos"."""
        network, parameters, flops, size, trained_on = self.cells()
        parts = [network]
        if self.parameters is not None:
            parts.append(f"{parameters} M parameters")
        if self.flops is not None:
            parts.append(f"{flops} GFLOPs an image of {size} px")
        known = f"trained on {trained_on}" if self.trained_on else "what it was trained on is not recorded"
        return ", ".join([*parts, known])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


HEADINGS = ("network", "M parameters", "GFLOPs an image", "px", "trained on")


def facts_of(config: EncoderConfig, preprocessing: Preprocessing, provenance: Mapping[str, Any]) -> EncoderFacts:
    """The facts of an encoder as it was read."""
    with torch.device("meta"):
        encoder = registry.build(config)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    flops = forward_flops(config, preprocessing.image_size)
    return EncoderFacts(network_name(config), parameters, flops, preprocessing.image_size, trained_on(provenance))


def facts_of_checkpoint(checkpoint: Checkpoint) -> EncoderFacts:
    """As `facts_of`, of what a file holds."""
    return facts_of(checkpoint.config, checkpoint.preprocessing, checkpoint.provenance)


def network_name(config: EncoderConfig) -> str:
    """Family and preset; of another library's network, its own name."""
    family = registry.family_of(config)
    if not family.presets:
        return config.describe().partition(",")[0]
    preset = registry.preset_name(config)
    return f"{family.title} {preset}" if preset else f"{family.title} of {list(config.channels)} channels"


def forward_flops(config: EncoderConfig, image_size: Size) -> float | None:
    """FLOPs of the matrix products of a forward pass of one image, by the family's cost model or counted on the meta device;
    None where they cannot be counted."""
    family = registry.family_of(config)
    if family.cost is not None:
        return family.cost.flops(config, image_size, Setup(1, precision="32-true", device="cpu")).forward
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    try:
        with torch.device("meta"), torch.no_grad():
            encoder = registry.build(config).eval()
            counter = FlopCounterMode(display=False)
            with counter:
                encoder(torch.empty(1, config.in_channels, *image_size))
    except (RuntimeError, NotImplementedError):
        return None
    return float(counter.get_total_flops())


def trained_on(provenance: Mapping[str, Any]) -> str:
    """The images of the training as far as the provenance tells, those of the encoder before fine-tuning among them."""
    known = provenance.get("trained_on")
    if known is None and provenance.get("tag"):
        known = f"tag {provenance['tag']}"
    if known is None and "data" in provenance:
        images = provenance.get("images")
        known = str(provenance["data"]) + (f" ({counted(images, 'image')})" if isinstance(images, int) else "")
    before = provenance.get("encoder")
    if isinstance(before, Mapping):
        earlier = trained_on(before)
        known = ", then ".join(part for part in (earlier, known) if part)
    return str(known or "")


def facts_table(names: Sequence[str], facts: Sequence[EncoderFacts]) -> str:
    """A Markdown table with a row per encoder."""
    lines = [f"| encoder | {' | '.join(HEADINGS)} |", "| :--- | :--- | ---: | ---: | ---: | :--- |"]
    lines += [f"| {' | '.join([name, *one.cells()])} |" for name, one in zip(names, facts, strict=True)]
    return "\n".join(lines)
