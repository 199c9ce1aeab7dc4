"""The configuration of a Swin Transformer, and the presets of the papers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from simmim.encoders.base import Size, State
from simmim.encoders.position_tables import move_table
from simmim.encoders.shifted_windows.config import HEAD_DIM, ShiftedWindowConfig
from simmim.encoders.shifted_windows.weights import infer_stages

LEAST_WINDOW = 4  # tokens, of the default
TABLE = re.compile(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table")


@dataclass(frozen=True)
class SwinConfig(ShiftedWindowConfig):
    """The architecture of one Swin Transformer.

    Its position bias is a table for one window a stage. The window cannot be larger later; on a smaller map the bias is that
    of a moved table (`simmim.encoders.position_tables`).

    Args:
        embed_dim, depths, num_heads, window_size, patch_size, in_channels, mlp_ratio, drop_path_rate, shift_before_padding:
            as of `ShiftedWindowConfig`.
        image_size: (height, width) in pixels of the images that the tables are for: a stage whose map is smaller than
            `window_size` there has a smaller window. None for tables of `window_size` in every stage.

    Raises:
        ValueError: for a setting out of range, saying what was expected.
    """

    image_size: Size | None = None

    def _check_types(self) -> None:
        super()._check_types()
        if self.image_size is None:
            return
        size = self.image_size
        if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"image_size is {size!r}: give height and width in pixels")
        object.__setattr__(self, "image_size", tuple(size))

    def describe(self) -> str:
        """Window and patch."""
        return f"window {self.window_size}, patch {self.patch_size} px"

    @property
    def largest_windows(self) -> tuple[Size, ...]:
        """The window of each stage's tables."""
        side = self.window_size
        if self.image_size is None:
            return ((side, side),) * len(self.depths)
        return tuple((min(side, height), min(side, width)) for height, width in self.maps(self.image_size))

    def fields_for_size(self, image_size: Size) -> dict[str, Any]:
        """A window of an eighth of the first stage's map, as published (6 at 192 px, 7 at 224 px, patch 4), at least 4."""
        return {"window_size": max(min(image_size) // self.patch_size // 8, LEAST_WINDOW), "image_size": tuple(image_size)}

    def adapt_to_size(self, trained_size: Size, image_size: Size) -> SwinConfig:
        """A copy for these images whose window covers the same share of the image: 6 at 192 px, 7 at 224 px."""
        window = max(1, round(self.window_size * min(image_size) / min(trained_size)))
        return replace(self, window_size=window, image_size=image_size)

    def decoder_config(self, dim: int, depth: int) -> SwinConfig:
        """One stage whose window is the whole map of `image_size`, with a table for it. Heads have 32 channels.

        Raises:
            ValueError: when heads of 32 channels do not divide `dim`, or the encoder is for images of no certain size.
        """
        if dim < 1 or dim % HEAD_DIM:
            raise ValueError(f"decoder_dim is {dim}: give a multiple of {HEAD_DIM}, the channels of a head")
        if self.image_size is None:
            raise ValueError("image_size of this encoder is open, and a decoder needs a table for its map: give image_size")
        grid = self.maps(self.image_size)[-1]
        return SwinConfig(
            dim, (depth,), (dim // HEAD_DIM,), max(grid), patch_size=1, in_channels=self.dims[-1], image_size=grid
        )

    # --- weights -----------------------------------------------------------------------------------------------------

    @classmethod
    def infer_fields(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields that follow from names and shapes of weights."""
        return infer_stages(state, "Swin Transformer", "attn.relative_position_bias_table")

    def adapt_weights(self, state: State, config: SwinConfig) -> tuple[State, tuple[str, ...]]:
        """As `EncoderConfig.adapt_weights`, and tables moved to other windows."""
        state, notes = super().adapt_weights(state, config)
        before, after = self.largest_windows, config.largest_windows
        if before == after or len(before) != len(after):
            return state, notes
        moved = dict(state)
        for name, value in state.items():
            if match := TABLE.fullmatch(name):
                stage = int(match[1])
                moved[name] = move_table(value, before[stage], after[stage])
        windows = (", ".join("×".join(map(str, window)) for window in sizes) for sizes in (before, after))
        return moved, (*notes, "windows {} to {}, position biases interpolated".format(*windows))


# Tiny to large: Table 6 of arXiv 2103.14030; SimMIM pre-trains base and large. Nano and micro are ours, for small images and
# laptops: heads of 16 channels.
PRESETS = {
    "swin-nano": SwinConfig(48, (2, 2), (3, 6), window_size=4),
    "swin-micro": SwinConfig(48, (2, 2, 6, 2), (3, 6, 12, 24), window_size=4),
    "swin-tiny": SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin-small": SwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin-base": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin-large": SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
