"""The tokens of each window as indices. Kernels read them instead of rolled, padded and partitioned copies of the map."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from simmim.encoders.base import Size
from simmim.encoders.shifted_windows.geometry import partition, relative_position_index, shift_regions, window_labels
from simmim.execution import cached_constant


class Windows(NamedTuple):
    """The windows of an image, M of N tokens each.

    Attributes:
        token_of: (M, N) int32, the token, row by row, at each place of each window; -1 for padding.
        region_of: (M, N) uint8 as from `shift_regions`, or (B · M, N) as from `window_labels`, each image its own; None
            where all tokens of a window attend to one another.
        offset_of: (N · N,) int64 as from `relative_position_index`.
    """

    token_of: Tensor
    region_of: Tensor | None
    offset_of: Tensor


@lru_cache(maxsize=64)
def window_indices(
    size: Size, window: Size, shift: Size, padded: Size, shift_before_padding: bool, device: torch.device
) -> Windows:
    """Indices for the padding, shift and partition of `SwinV2Block.windowed_attention`. The arguments are `partition`'s."""
    token_of = token_indices(size, window, shift, padded, shift_before_padding, device)
    regions = region_labels(padded, window, shift, device) if any(shift) else None
    return Windows(token_of, regions, relative_position_index(window, device))


@cached_constant(maxsize=64)
def token_indices(
    size: Size, window: Size, shift: Size, padded: Size, shift_before_padding: bool, device: torch.device
) -> Tensor:
    """`Windows.token_of`."""
    numbers = torch.arange(1, 1 + size[0] * size[1], device=device).view(1, *size, 1)
    # Padding is 0, so numbers begin at 1.
    return (partition(numbers, window, shift, padded, shift_before_padding).squeeze(-1) - 1).int()


@cached_constant(maxsize=64)
def region_labels(padded: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """`Windows.region_of`, where windows are shifted."""
    return shift_regions(padded, window, shift, device).to(torch.uint8)


def grouped_windows(windows: Windows, groups: Tensor | None, window: Size, shift: Size) -> Windows:
    """`windows` with the labels of groups of tokens, (B, H, W) uint8, that do not attend to one another; None for none."""
    return windows if groups is None else windows._replace(region_of=window_labels(groups, window, shift))
