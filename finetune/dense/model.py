"""An encoder with a norm on each stage's map: what every head on all maps stands on."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.base import Encoder


class DenseModel(nn.Module):
    """An encoder and a norm on each stage's map; a task adds its head.

    The last map's norm is the encoder's own; the others' are fresh, as all norms are in Swin's published dense predictions.

    Args:
        shape: what it takes to build the head, which is the same for heads that fit one another.
    """

    def __init__(self, encoder: Encoder, shape: Any) -> None:
        super().__init__()
        self.encoder, self.shape = encoder, shape
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in encoder.channels[:-1])

    def maps(self, images: Tensor) -> list[Tensor]:
        """The stages' maps, each normalized, the finest first.

        Args:
            images: (B, channels, height, width) normalized.
        """
        output = self.encoder(images, return_stages=True)
        normalized = [
            rearrange(norm(rearrange(stage, "b c h w -> b h w c")), "b h w c -> b c h w")
            for norm, stage in zip(self.norms, output.stages)
        ]
        return [*normalized, output.features]

    def head_state(self) -> dict[str, Tensor]:
        """All weights that are not the encoder's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}
