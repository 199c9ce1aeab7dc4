"""What the configurations of both versions of the Swin Transformer share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simmim.encoders.base import EncoderConfig, Size

HEAD_DIM = 32  # channels of a head of the published models


@dataclass(frozen=True)
class ShiftedWindowConfig(EncoderConfig):
    """The architecture of a hierarchical encoder with attention in shifted windows.

    Args:
        embed_dim: C, channels of the first stage. Each further stage doubles them.
        depths: number of blocks of each stage; 1 to 5 stages.
        num_heads: number of attention heads of each stage. It divides the stage's channels.
        window_size: side of the attention windows in tokens. Where the feature map is smaller, the window is the map.
        patch_size: side of a patch in pixels.
        in_channels: channels of the images.
        mlp_ratio: hidden channels of a block's MLP per channel.
        drop_path_rate: stochastic-depth probability of the last block. It rises linearly from 0 at the first block.
        shift_before_padding: if windows do not divide the map, shift it first and pad it then, as timm does. Otherwise pad
            first, as transformers and published dense-prediction code do.

    Raises:
        ValueError: for a setting out of range, saying what was expected.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    patch_size: int = 4
    in_channels: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    shift_before_padding: bool = False

    input_projection: ClassVar[str] = "patch_embed.proj.weight"
    size_fields: ClassVar[tuple[str, ...]] = ("embed_dim", "depths", "num_heads", "mlp_ratio")
    supports_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check_types()
        self._check_stages()
        for name in ("embed_dim", "window_size", "patch_size", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}: give a probability in [0, 1)")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}: give a positive number")

    def _check_types(self) -> None:
        """Values from YAML and JSON may have any type. Lists become tuples."""
        for name in ("embed_dim", "window_size", "patch_size", "in_channels"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a whole number")
        for name in ("mlp_ratio", "drop_path_rate"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a number")
        for name in ("depths", "num_heads"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
                raise ValueError(f"{name} is {values!r}: give a list with one whole number per stage")
            object.__setattr__(self, name, tuple(values))

    def _check_stages(self) -> None:
        if not 1 <= len(self.depths) <= 5 or min(self.depths) < 1:
            raise ValueError(f"depths is {self.depths}: give 1 to 5 stages with at least one block each")
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads {self.num_heads} has {len(self.num_heads)} stages and depths {self.depths} has "
                f"{len(self.depths)}: give one number of heads per stage"
            )
        for dim, heads in zip(self.dims, self.num_heads):
            if heads < 1 or dim % heads:
                raise ValueError(f"{heads} heads do not divide a stage's {dim} channels: num_heads {self.num_heads}")

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage: `dims` under the name that all encoders share."""
        return self.dims

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per token of each stage's feature map."""
        return tuple(self.patch_size * 2**stage for stage in range(len(self.depths)))

    @property
    def num_blocks(self) -> int:
        """Number of blocks in all stages."""
        return sum(self.depths)

    @property
    def default_drop_path(self) -> float:
        """As published: 0.1, and 0.2 for large and above. 0 for fewer than 8 blocks, each of which matters."""
        if self.num_blocks < 8:
            return 0.0
        return 0.2 if self.embed_dim >= 192 else 0.1

    # --- windows -----------------------------------------------------------------------------------------------------

    @property
    def largest_windows(self) -> tuple[Size, ...]:
        """The window of each stage on a map that is large enough."""
        return ((self.window_size, self.window_size),) * len(self.depths)

    def maps(self, image_size: Size) -> tuple[Size, ...]:
        """(height, width) of each stage's map in tokens, on images of `image_size`."""
        height, width = (-(-side // self.patch_size) for side in image_size)
        return tuple((-(-height // 2**stage), -(-width // 2**stage)) for stage in range(len(self.depths)))

    def windows(self, image_size: Size) -> tuple[Size, ...]:
        """The window of each stage on images of `image_size`: that of `largest_windows`, or the map if that is smaller."""
        return tuple(
            (min(window[0], height), min(window[1], width))
            for window, (height, width) in zip(self.largest_windows, self.maps(image_size))
        )

    def windows_divide(self, image_size: Size) -> bool:
        """Whether on images of `image_size` the window of each stage divides its map."""
        pairs = zip(self.windows(image_size), self.maps(image_size))
        return not any(height % window[0] or width % window[1] for window, (height, width) in pairs)

    def first_stages(self, num_stages: int) -> ShiftedWindowConfig:
        """As `EncoderConfig.first_stages`."""
        return replace(self, depths=self.depths[:num_stages], num_heads=self.num_heads[:num_stages])

    def check_groups(self, image_size: Size) -> None:
        """Groups are supported where no map is padded: padding would be attended to by tokens of every group.

        Raises:
            ValueError: naming windows that divide all maps.
        """
        if any(side % self.strides[-1] for side in image_size):
            raise ValueError(
                f"images of {image_size[0]}×{image_size[1]} px on one canvas: give multiples of the last stage's stride, "
                f"{self.strides[-1]} px"
            )
        if not self.windows_divide(image_size):
            sides = range(1, 2 * self.window_size)
            fitting = [side for side in sides if replace(self, window_size=side).windows_divide(image_size)]
            nearest = min(fitting, key=lambda side: abs(side - self.window_size))
            raise ValueError(
                f"window_size is {self.window_size}, which pads the maps of images of "
                f"{image_size[0]}×{image_size[1]} px: several images on one canvas need windows that divide every map, "
                f"for instance {nearest}"
            )


def as_pair(size: int | Size) -> Size:
    """(height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else size
