"""Coordinates of the position bias: what is new in the second version (section 3.3 of the paper).

They are cached here as the rest of the geometry is in `simmim.encoders.shifted_windows.geometry`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simmim.encoders.base import Size
from simmim.execution import cached_constant


@cached_constant(maxsize=256)
def log_spaced_coords(window: Size, pretrained: Size, device: torch.device) -> Tensor:
    """Log-spaced coordinates of all offsets between two tokens of a window, equation 4 of the paper.

    An offset is scaled to x, such that those of the pre-training window are from −8 to 8. Its coordinate is
    sign(x) · log2(1 + |x|) / log2(8).

    Returns:
        ((2·height − 1) · (2·width − 1), 2) float32, rows first.
    """
    axes = [
        torch.arange(1 - side, side, dtype=torch.float32, device=device) * 8 / max(reference - 1, 1)
        for side, reference in zip(window, pretrained)
    ]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.sign(coords) * torch.log2(1 + coords.abs()) / math.log2(8)
