"""How the tokens of a map fall into windows, as indices: what kernels read instead of rolled and padded copies."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from simmim.encoders.base import Size
from simmim.encoders.swinv2.geometry import partition, relative_position_index, shift_regions


class Windows(NamedTuple):
    """The windows of one image, and what belongs to pairs of their tokens.

    Attributes:
        token_of: (M, N) int32, the token, row by row, at each place of each window; -1 for padding.
        region_of: (M, N) uint8 as from `shift_regions`; None where windows are not shifted.
        offset_of: (N · N,) int64 as from `relative_position_index`.
    """

    token_of: Tensor
    region_of: Tensor | None
    offset_of: Tensor


@lru_cache(maxsize=64)
def window_indices(
    size: Size, window: Size, shift: Size, padded: Size, shift_before_padding: bool, device: torch.device
) -> Windows:
    """`SwinV2Block.windowed_attention`'s way of padding, shifting and partitioning a map, as indices."""
    with torch.inference_mode(False), torch.no_grad():
        tokens = torch.arange(1, 1 + size[0] * size[1], device=device).view(1, *size, 1)
        placed = partition(tokens, window, shift, padded, shift_before_padding).squeeze(-1) - 1
        regions = shift_regions(padded, window, shift, device).to(torch.uint8) if any(shift) else None
        return Windows(placed.int(), regions, relative_position_index(window, device))
