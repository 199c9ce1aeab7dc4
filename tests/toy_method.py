"""A toy method of pre-training, and an example for a new one: the mean color of an image, from half of its patches.

`methods.registry.METHODS["toy"] = ("toy_method", "ToyMethod")` registers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simmim.encoders.base import Encoder, EncoderConfig, Size
from simmim.methods.base import Method, MethodOutput, MethodSettings


@dataclass(frozen=True)
class ToySettings(MethodSettings):
    """Settings of the toy method, and changes to the preset's encoder.

    Args:
        hidden_share: share of the patches that is hidden.
    """

    hidden_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.hidden_share < 1:
            raise ValueError(f"model.hidden_share is {self.hidden_share}: give a share between 0 and 1")


class ToyMethod(Method):
    """Hidden patches are replaced by zeros; a linear layer predicts the mean of each channel."""

    name = "toy"
    title = "Toy method"
    own_parts = "linear head"
    loss_name = "mean_color"
    loss_description = "mean squared error of an image's mean color"
    settings_class = ToySettings
    predicts_pixels = False

    def __init__(self, encoder: Encoder, hidden_share: float) -> None:
        super().__init__()
        self.encoder, self.hidden_share = encoder, hidden_share
        self.head = nn.Linear(encoder.dim, encoder.config.in_channels)

    @classmethod
    def build(cls, encoder: Encoder, settings: ToySettings) -> ToyMethod:
        return cls(encoder, settings.hidden_share)

    def draw(self, image_size: Size, seeds: Sequence[int], device: torch.device) -> Tensor:
        """(B, H, W) bool, True = hidden."""
        size = [-(-side // self.encoder.config.patch_size) for side in image_size]
        rows = [torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (torch.stack(rows) < self.hidden_share).to(device)

    def forward(
        self, images: Tensor, drawn: Tensor, return_reconstruction: bool = False, valid: Tensor | None = None
    ) -> MethodOutput:
        tokens = self.encoder.embed(images).masked_fill(drawn[..., None], 0.0)
        predicted = self.head(self.encoder.encode(tokens).pooled)
        return MethodOutput((predicted - images.mean(dim=(2, 3))).square().mean())

    def describe(self, image_size: Size) -> str:
        return f"{self.hidden_share:.0%} of the patches hidden"

    def provenance(self) -> dict[str, Any]:
        return {"hidden_share": self.hidden_share}

    @classmethod
    def expected_state(cls, config: EncoderConfig, settings: ToySettings) -> dict[str, tuple[int, ...]]:
        return {"head.weight": (config.in_channels, config.channels[-1]), "head.bias": (config.in_channels,)}
