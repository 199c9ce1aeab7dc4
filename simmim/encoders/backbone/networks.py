"""What the two libraries' networks have in common: how one is built, and what it returns."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from simmim.encoders.backbone.config import BackboneConfig

# Library to the module that speaks to it.
ADAPTERS = {
    "timm": "simmim.encoders.backbone.timm_networks",
    "transformers": "simmim.encoders.backbone.transformers_networks",
}


class NetworkOutput(NamedTuple):
    """What a network returns of images (B, channels, height, width).

    Attributes:
        last: the last map after the final norm, (B, C, H, W); None where the features do not lie on a grid.
        pooled: (B, D), pooled as the network does it: a class token, a mean, or learned attention. D may differ from C.
        maps: every intermediate map, (B, C_i, H_i, W_i), in order, those of `indices` alone where they were asked for.
    """

    last: Tensor | None
    pooled: Tensor
    maps: tuple[Tensor, ...]


class Adapter(Protocol):
    """A module of `ADAPTERS`."""

    def build(self, config: BackboneConfig) -> nn.Module:
        """The network with random weights, as its library builds it.

        Raises:
            ValueError: when the library is not installed, or does not know the network.
        """

    def run(self, network: nn.Module, images: Tensor, indices: tuple[int, ...] | None) -> NetworkOutput:
        """Images through the network.

        Args:
            indices: of the intermediate maps to return; None for all, () for none.
        """

    def layers(self, network: nn.Module) -> dict[str, int]:
        """The layer, 0 to n + 1, of each parameter by its name, as of `Encoder.layer_of`."""

    def no_decay(self, network: nn.Module) -> tuple[str, ...]:
        """Names, or parts of names, of parameters that never decay."""

    def checkpoint_activations(self, network: nn.Module, enabled: bool) -> None:
        """Have the network recompute its blocks in the backward pass, or not.

        Raises:
            ValueError: when it cannot.
        """


def adapter_of(library: str) -> Adapter:
    """The functions that speak to a library."""
    return cast(Adapter, import_module(ADAPTERS[library]))
