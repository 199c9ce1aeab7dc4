"""The architecture of another library's network, as plain values from which that library builds it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from simmim.encoders.base import EncoderConfig, Size, State

LIBRARIES = ("timm", "transformers")
Config = TypeVar("Config", bound=EncoderConfig)


@dataclass(frozen=True)
class BackboneConfig(EncoderConfig):
    """A network of timm or transformers, and what was measured of it (`simmim.encoders.backbone.measure`).

    Args:
        library: one of `LIBRARIES`.
        architecture: timm's registered name, or transformers' model type.
        arguments: of `timm.create_model`, or the fields of transformers' configuration. JSON text or a mapping; kept as
            text, so that configurations have a hash.
        widths: channels of each map.
        map_strides: pixels of the image per token of each map. Plain transformers have maps of several depths at one stride.
        map_indices: which of the network's intermediate outputs the maps are, from 0.
        num_layers: number of blocks, by which layer decay counts.
        projection: name of the weight that reads the images, (C, in_channels, …); empty where there are several or none.
        has_maps: whether its features lie on a grid. Without, the only map is a single token: the pooled features.
        fixed_size: (height, width) of the only images that it takes; None for any.
        in_channels: channels of the images.

    Raises:
        ValueError: for an unknown library, or arguments that are no JSON object.
    """

    library: str
    architecture: str
    arguments: Any
    widths: tuple[int, ...]
    map_strides: tuple[int, ...]
    map_indices: tuple[int, ...]
    num_layers: int
    projection: str
    has_maps: bool = True
    fixed_size: Size | None = None
    in_channels: int = 3

    size_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise ValueError(f"library is {self.library!r}: give {' or '.join(LIBRARIES)}")
        arguments = json.loads(self.arguments) if isinstance(self.arguments, str) else self.arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(f"arguments are {self.arguments!r}: expected a JSON object")
        object.__setattr__(self, "arguments", json.dumps(arguments, sort_keys=True))
        for name in ("widths", "map_strides", "map_indices"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.fixed_size is not None:
            object.__setattr__(self, "fixed_size", tuple(self.fixed_size))

    @property
    def options(self) -> dict[str, Any]:
        """`arguments` as a dict."""
        return json.loads(self.arguments)

    @property
    def input_projection(self) -> str:  # type: ignore[override]
        """As of `EncoderConfig`; it depends on the network."""
        return self.projection

    @property
    def patch_size(self) -> int:  # type: ignore[override]
        """The stride of the first map."""
        return self.map_strides[0]

    @property
    def channels(self) -> tuple[int, ...]:
        return self.widths

    @property
    def strides(self) -> tuple[int, ...]:
        return self.map_strides

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    def describe(self) -> str:
        return f"{self.architecture} of {self.library}, {self.num_layers} layers"

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "arguments": self.options}

    def adapt_to_size(self: Config, trained_size: Size, image_size: Size) -> Config:
        """Unchanged.

        Raises:
            ValueError: where the network takes images of one size and this is another.
        """
        assert isinstance(self, BackboneConfig)
        self.check_size(image_size)
        return self

    def check_size(self, image_size: Size) -> None:
        """Check that the network takes images of this size.

        Raises:
            ValueError: naming the only size that it takes.
        """
        if self.fixed_size not in (None, tuple(image_size)):
            height, width = self.fixed_size  # type: ignore[misc]
            size = str(height) if height == width else f"[{height}, {width}]"
            raise ValueError(
                f"image_size is {' × '.join(map(str, image_size))}: {self.architecture} takes images of {height} × {width} "
                f"px alone, give {size}"
            )

    def check_maps(self) -> None:
        if not self.has_maps:
            raise ValueError(
                f"{self.architecture} of {self.library} has no feature maps, which this task needs: its features do not lie "
                "on a grid. Give an encoder with maps"
            )

    def check_pretraining(self) -> None:
        raise ValueError(
            f"init names {self.architecture} of {self.library}, which no method here pre-trains: it can be compared with "
            "and fine-tuned. Give a SwinV2, or a preset"
        )

    def adapt_weights(self: Config, state: State, config: Config) -> tuple[State, tuple[str, ...]]:
        """As of `EncoderConfig`.

        Raises:
            ValueError: for other input channels where no single weight reads the images.
        """
        if config.in_channels != self.in_channels and self.input_projection not in state:
            assert isinstance(self, BackboneConfig)
            raise ValueError(
                f"{self.architecture} of {self.library} takes {self.in_channels} channels, and no single weight of it reads "
                f"them: it cannot take {config.in_channels}"
            )
        return super().adapt_weights(state, config)  # type: ignore[misc]
