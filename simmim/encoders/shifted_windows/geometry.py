"""Indices and attention masks of windows: what depends on sizes alone (section 3.2 of arXiv 2103.14030).

They are cached here instead of in buffers. One model then supports any image size, and a checkpoint holds learned weights
only.

Shape letters: B images, H W height and width of a feature map in tokens, C channels, M windows of one image, N tokens of one
window. Sizes are (height, width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from simmim.encoders.base import Size
from simmim.encoders.layers import RowIndex
from simmim.execution import cached_constant, has_atomic_sums

# Added to the logit of two tokens that only the cyclic shift brought into one window. The value of the references. In Swin
# V2 it is below every logit at the initial temperature (−10 to 26), but not at the lowest (−100 to 116).
MASKED_LOGIT = -100.0
# Added to the logit of two tokens of different groups, which then have no weight whatever the temperature.
OTHER_GROUP_LOGIT = -1e30
# Labels of tokens are REGIONS · group + region. Kernels compare the bits of the group.
REGIONS = 4


@cached_constant(maxsize=256)
def relative_position_index(window: Size, device: torch.device) -> Tensor:
    """The number of the offset of each pair of tokens in a window, counted row by row: (N · N,) int64."""
    height, width = window
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    row_offset = rows[:, None] - rows[None, :] + height - 1
    column_offset = columns[:, None] - columns[None, :] + width - 1
    return (row_offset * (2 * width - 1) + column_offset).flatten()


@cached_constant(maxsize=256)
def pairs_of_offsets(window: Size, device: torch.device) -> Tensor:
    """The pairs of tokens of a window with each offset: `RowIndex.places_of` of `relative_position_index`.

    Returns:
        (offsets, N) int64, by the second token of a pair: the number of the pair, or N · N where there is no first token.
    """
    height, width = window
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    first_rows = torch.arange(1 - height, height, device=device)[:, None, None, None] + rows
    first_columns = torch.arange(1 - width, width, device=device)[:, None, None] + columns
    inside = (first_rows >= 0) & (first_rows < height) & (first_columns >= 0) & (first_columns < width)
    pairs = (first_rows * width + first_columns) * (height * width) + rows * width + columns
    return torch.where(inside, pairs, (height * width) ** 2).flatten(2).flatten(0, 1)


def offset_index(window: Size, device: torch.device) -> RowIndex:
    """The row of a position table, a row an offset, for each pair of tokens of a window."""
    pairs = pairs_of_offsets(window, device) if has_atomic_sums(device) else None
    return RowIndex(relative_position_index(window, device), pairs)


@cached_constant(maxsize=64)
def shift_regions(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """The region of each token of the shifted windows. Tokens of one window and region are neighbors in the image.

    Args:
        size: of the feature map, a multiple of the window.

    Returns:
        (M, N) int64, regions 0 to 3.
    """
    # The last `shift` rows and columns of the shifted map come from the other side of the image.
    rows, columns = (torch.arange(side, device=device) >= side - offset for side, offset in zip(size, shift))
    return rearrange(rows[:, None] * 2 + columns[None, :].long(), "(m p) (n q) -> (m n) (p q)", p=window[0], q=window[1])


@cached_constant(maxsize=64)
def shift_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """The attention mask of the shifted windows, (M, N, N) float32, by which tokens attend within their region only."""
    return additive_mask(shift_regions(size, window, shift, device))


def additive_mask(labels: Tensor) -> Tensor:
    """Labels, (M, N) or (B · M, N), to a mask that is added to the logits, (…, N, N) float32.

    0 within a region of a group, `MASKED_LOGIT` between regions of a group, `OTHER_GROUP_LOGIT` between groups.
    """
    mask = (labels[:, :, None] != labels[:, None, :]).to(torch.float32) * MASKED_LOGIT
    groups = labels // REGIONS
    return mask.masked_fill_(groups[:, :, None] != groups[:, None, :], OTHER_GROUP_LOGIT)


def window_labels(groups: Tensor, window: Size, shift: Size) -> Tensor:
    """Groups of tokens, (B, H, W) uint8, to the label of each token of the windows of all images: (B · M, N) uint8.

    The map is a multiple of the window. Labels are `REGIONS` · group + region, regions being those of `shift_regions`.
    """
    size: Size = groups.shape[1:]  # type: ignore[assignment]
    labels = partition(groups[..., None] * REGIONS, window, shift, size, False).squeeze(-1)
    if any(shift):
        labels += shift_regions(size, window, shift, groups.device).to(torch.uint8).repeat(len(groups), 1)
    return labels


# --- maps to windows ---------------------------------------------------------------------------------------------------


def partition(x: Tensor, window: Size, shift: Size, padded: Size, shift_before_padding: bool) -> Tensor:
    """(B, H, W, C) to windows, (B · M, N, C), of the map padded to the size `padded` and shifted up and left by `shift`."""
    back = (-shift[0], -shift[1])
    x = pad_to(roll(x, back), padded) if shift_before_padding else roll(pad_to(x, padded), back)
    return rearrange(x, "b (m p) (n q) c -> (b m n) (p q) c", p=window[0], q=window[1])


def merge_windows(
    windows: Tensor, window: Size, shift: Size, padded: Size, size: Size, shift_before_padding: bool
) -> Tensor:
    """The inverse of `partition`: windows, (B · M, N, C), to the map of `size` without padding, (B, H, W, C)."""
    rows, columns = padded[0] // window[0], padded[1] // window[1]
    x = rearrange(windows, "(b m n) (p q) c -> b (m p) (n q) c", m=rows, n=columns, p=window[0], q=window[1])
    if shift_before_padding:
        return roll(x[:, : size[0], : size[1]], shift)
    return roll(x, shift)[:, : size[0], : size[1]]


def roll(x: Tensor, shift: Size) -> Tensor:
    """(B, H, W, C), shifted cyclically down and right."""
    return x.roll(shift, dims=(1, 2)) if any(shift) else x


def pad_to(x: Tensor, size: Size) -> Tensor:
    """(B, H, W, C), padded to `size` with zeros at the bottom and right."""
    bottom, right = size[0] - x.shape[1], size[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x
