"""The configuration of a Swin Transformer V2, and the presets of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from simmim.encoders.base import EncoderConfig, Size, State, with_fields
from simmim.encoders.swinv2.weights import infer_architecture
from simmim.messages import did_you_mean

HEAD_DIM = 32  # channels of a head of the published models
WHOLE_MAP = 2**15  # a window that is larger than every map


@dataclass(frozen=True)
class SwinV2Config(EncoderConfig):
    """The architecture of one Swin Transformer V2.

    Args:
        embed_dim: C, channels of the first stage. Each further stage doubles them.
        depths: number of blocks of each stage; 1 to 5 stages.
        num_heads: number of attention heads of each stage. It divides the stage's channels.
        window_size: side of the attention windows in tokens. Where the feature map is smaller, the window is the map.
        pretrained_window_sizes: the window that each stage was pre-trained with, one number or (height, width). It scales
            the coordinates of the position bias. None scales by the window in use, as in pre-training.
        patch_size: side of a patch in pixels.
        in_channels: channels of the images.
        mlp_ratio: hidden channels of a block's MLP per channel.
        drop_path_rate: stochastic-depth probability of the last block. It rises linearly from 0 at the first block.
        extra_norm_every: number of blocks between the paper's additional layer norms on the main path of the third stage
            (6 for huge and giants); 0 for none.
        shift_before_padding: if windows do not divide the map, shift it first and pad it then, as timm does. Otherwise pad
            first, as transformers and published dense-prediction code do.

    Raises:
        ValueError: for a setting out of range, saying what was expected.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 8
    pretrained_window_sizes: tuple[int | Size, ...] | None = None
    patch_size: int = 4
    in_channels: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    extra_norm_every: int = 0
    shift_before_padding: bool = False

    input_projection: ClassVar[str] = "patch_embed.proj.weight"
    size_fields: ClassVar[tuple[str, ...]] = ("embed_dim", "depths", "num_heads", "mlp_ratio", "extra_norm_every")
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
        if self.extra_norm_every < 0:
            raise ValueError(f"extra_norm_every is {self.extra_norm_every}: give 0 for none, or a number of blocks")

    def _check_types(self) -> None:
        """Values from YAML and JSON may have any type. Lists become tuples."""
        for name in ("embed_dim", "window_size", "patch_size", "in_channels", "extra_norm_every"):
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
        if self.pretrained_window_sizes is not None:
            if not isinstance(self.pretrained_window_sizes, list | tuple):
                raise ValueError(
                    f"pretrained_window_sizes is {self.pretrained_window_sizes!r}: give a list with one size per stage"
                )
            sizes = tuple(tuple(size) if isinstance(size, list) else size for size in self.pretrained_window_sizes)
            object.__setattr__(self, "pretrained_window_sizes", sizes)

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
        if self.pretrained_window_sizes is not None:
            sides = [side for window in map(as_pair, self.pretrained_window_sizes) for side in window]
            whole = all(isinstance(side, int) and side > 0 for side in sides)
            if len(sides) != 2 * len(self.depths) or not whole:
                raise ValueError(
                    f"pretrained_window_sizes is {self.pretrained_window_sizes}: give one positive size per stage, "
                    f"{len(self.depths)} in all"
                )

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

    def describe(self) -> str:
        """Window, the windows of pre-training where they are recorded, and patch."""
        trained = f" (pre-trained with {list(self.pretrained_window_sizes)})" if self.pretrained_window_sizes else ""
        return f"window {self.window_size}{trained}, patch {self.patch_size} px"

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> SwinV2Config:
        """A row of `PRESETS` with some fields replaced.

        Raises:
            ValueError: for an unknown preset or field, naming the nearest known one.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}")
        return with_fields(PRESETS[preset], **overrides)

    # --- windows -----------------------------------------------------------------------------------------------------

    def windows(self, image_size: Size) -> tuple[Size, ...]:
        """The window of each stage on images of `image_size`: `window_size`, or the feature map if that is smaller."""
        height, width = (-(-side // self.patch_size) for side in image_size)
        windows = []
        for _ in self.depths:
            windows.append((min(self.window_size, height), min(self.window_size, width)))
            height, width = -(-height // 2), -(-width // 2)
        return tuple(windows)

    def windows_divide(self, image_size: Size) -> bool:
        """Whether on images of `image_size` the window of each stage divides its map."""
        height, width = (-(-side // self.patch_size) for side in image_size)
        for window in self.windows(image_size):
            if height % window[0] or width % window[1]:
                return False
            height, width = -(-height // 2), -(-width // 2)
        return True

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

    def decoder_config(self, dim: int, depth: int) -> SwinV2Config:
        """One stage whose window is the whole map and whose position bias tells the places. Heads have 32 channels.

        Raises:
            ValueError: when heads of 32 channels do not divide `dim`.
        """
        if dim < 1 or dim % HEAD_DIM:
            raise ValueError(f"decoder_dim is {dim}: give a multiple of {HEAD_DIM}, the channels of a head")
        return SwinV2Config(
            dim, (depth,), (dim // HEAD_DIM,), window_size=WHOLE_MAP, patch_size=1, in_channels=self.dims[-1]
        )

    def fields_for_size(self, image_size: Size) -> dict[str, Any]:
        """A window of a quarter of the first stage's map, as published (12 at 192 px and patch 4), at least 4."""
        return {"window_size": max(min(image_size) // self.patch_size // 4, 4)}

    def adapt_to_size(self, trained_size: Size, image_size: Size) -> SwinV2Config:
        """A copy whose window covers the same share of the image: 12 at 192 px, 14 at 224 px."""
        return replace(self, window_size=max(1, round(self.window_size * min(image_size) / min(trained_size))))

    def with_training_size(self, image_size: Size) -> SwinV2Config:
        """A copy that records the windows of pre-training, unless they are recorded already.

        Weights that are loaded with another window then get a position bias scaled as they were trained with.
        """
        if self.pretrained_window_sizes is not None:
            return self
        sizes = tuple(height if height == width else (height, width) for height, width in self.windows(image_size))
        return replace(self, pretrained_window_sizes=sizes)

    def without_training_size(self) -> SwinV2Config:
        """A copy without windows of pre-training."""
        return replace(self, pretrained_window_sizes=None)

    # --- weights -----------------------------------------------------------------------------------------------------

    @classmethod
    def infer_fields(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields that follow from names and shapes of weights (`infer_architecture`)."""
        return infer_architecture(state)

    def adapt_weights(self, state: State, config: SwinV2Config) -> tuple[State, tuple[str, ...]]:
        """As `EncoderConfig.adapt_weights`. Another window needs no change: the position bias is continuous."""
        state, notes = super().adapt_weights(state, config)
        if config.window_size != self.window_size:
            trained = ", ".join(map(str, config.pretrained_window_sizes or ("in use",)))
            change = f"window {self.window_size} to {config.window_size}"
            notes += (f"{change}, position bias scaled by the pre-trained windows {trained}",)
        return state, notes


def as_pair(size: int | Size) -> Size:
    """(height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else size


# Tiny to large: Table 6 of arXiv 2103.14030, kept by Swin V2 (section 3.5). Huge and giant: section 3.5 of
# arXiv 2111.09883, heads of 32 channels, one extra norm on the main path every 6 blocks. giant-1b: the 1-billion model
# of arXiv 2206.04664. Nano and micro are ours, for small images and laptops: heads of 16 channels.
PRESETS = {
    "nano": SwinV2Config(48, (2, 2), (3, 6), window_size=4),
    "micro": SwinV2Config(48, (2, 2, 6, 2), (3, 6, 12, 24)),
    "tiny": SwinV2Config(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": SwinV2Config(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": SwinV2Config(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": SwinV2Config(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "huge": SwinV2Config(352, (2, 2, 18, 2), (11, 22, 44, 88), extra_norm_every=6),
    "giant-1b": SwinV2Config(448, (2, 2, 18, 2), (14, 28, 56, 112), extra_norm_every=6),
    "giant-3b": SwinV2Config(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_every=6),
}
