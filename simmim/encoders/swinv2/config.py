"""The configuration of a Swin Transformer V2, and the presets of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from simmim.encoders.base import Size, State, with_fields
from simmim.encoders.shifted_windows.config import HEAD_DIM, ShiftedWindowConfig, as_pair
from simmim.encoders.swinv2.weights import infer_architecture
from simmim.messages import did_you_mean

WHOLE_MAP = 2**15  # a window that is larger than every map
LARGEST_WINDOW = 24  # to which larger images make a window grow, as published; attention's cost grows with its square


@dataclass(frozen=True)
class SwinV2Config(ShiftedWindowConfig):
    """The architecture of one Swin Transformer V2.

    Args:
        embed_dim, depths, num_heads, window_size, patch_size, in_channels, mlp_ratio, drop_path_rate, shift_before_padding:
            as of `ShiftedWindowConfig`.
        pretrained_window_sizes: the window that each stage was pre-trained with, one number or (height, width). It scales
            the coordinates of the position bias. None scales by the window in use, as in pre-training.
        extra_norm_every: number of blocks between the paper's additional layer norms on the main path of the third stage
            (6 for huge and giants); 0 for none.

    Raises:
        ValueError: for a setting out of range, saying what was expected.
    """

    window_size: int = 8
    pretrained_window_sizes: tuple[int | Size, ...] | None = None
    extra_norm_every: int = 0

    size_fields: ClassVar[tuple[str, ...]] = (*ShiftedWindowConfig.size_fields, "extra_norm_every")
    changeable_fields: ClassVar[tuple[str, ...]] = ("window_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extra_norm_every < 0:
            raise ValueError(f"extra_norm_every is {self.extra_norm_every}: give 0 for none, or a number of blocks")

    def _check_types(self) -> None:
        super()._check_types()
        if not isinstance(self.extra_norm_every, int):
            raise ValueError(f"extra_norm_every is {self.extra_norm_every!r}: give a whole number")
        if self.pretrained_window_sizes is not None:
            if not isinstance(self.pretrained_window_sizes, list | tuple):
                raise ValueError(
                    f"pretrained_window_sizes is {self.pretrained_window_sizes!r}: give a list with one size per stage"
                )
            sizes = tuple(tuple(size) if isinstance(size, list) else size for size in self.pretrained_window_sizes)
            object.__setattr__(self, "pretrained_window_sizes", sizes)

    def _check_stages(self) -> None:
        super()._check_stages()
        if self.pretrained_window_sizes is not None:
            sides = [side for window in map(as_pair, self.pretrained_window_sizes) for side in window]
            whole = all(isinstance(side, int) and side > 0 for side in sides)
            if len(sides) != 2 * len(self.depths) or not whole:
                raise ValueError(
                    f"pretrained_window_sizes is {self.pretrained_window_sizes}: give one positive size per stage, "
                    f"{len(self.depths)} in all"
                )

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

    def first_stages(self, num_stages: int) -> SwinV2Config:
        """As `EncoderConfig.first_stages`."""
        trained = self.pretrained_window_sizes
        heads = self.num_heads[:num_stages]
        return replace(
            self,
            depths=self.depths[:num_stages],
            num_heads=heads,
            pretrained_window_sizes=trained and trained[:num_stages],
        )

    def fields_for_size(self, image_size: Size) -> dict[str, Any]:
        """A window of a quarter of the first stage's map, as published (12 at 192 px and patch 4), at least 4; of half of it
        where most stages have one block, so that no shifted window follows to join the others."""
        share = 2 if 2 * self.depths.count(1) > len(self.depths) else 4
        return {"window_size": max(min(image_size) // self.patch_size // share, 4)}

    def adapt_to_size(self, trained_size: Size, image_size: Size) -> SwinV2Config:
        """A copy whose window covers the same share of the image, 12 at 192 px, 14 at 224 px, up to `LARGEST_WINDOW`."""
        window = max(1, round(self.window_size * min(image_size) / min(trained_size)))
        return replace(self, window_size=min(window, max(self.window_size, LARGEST_WINDOW)))

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


# Tiny to large: Table 6 of arXiv 2103.14030, kept by Swin V2 (section 3.5). Huge and giant: section 3.5 of
# arXiv 2111.09883, heads of 32 channels, one extra norm on the main path every 6 blocks. giant-1b: the 1-billion model
# of arXiv 2206.04664. Pico, nano and micro are ours: nano for small images, the others for laptops.
PRESETS = {
    "pico": SwinV2Config(32, (1, 1, 2, 1), (1, 2, 4, 8)),
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
