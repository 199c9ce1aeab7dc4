"""Tables of relative position biases: a learned row for each offset between two tokens of a grid.

A table for one grid is moved to another by the rule of the SimMIM repository's fine-tuning (`move_table`). The same rule
serves maps of other sizes than a table is for, so that an encoder computes on them what it would compute with moved weights.

Shape letter: h heads. Grids are (height, width) in tokens. The rows of a table are in the order of
`simmim.encoders.shifted_windows.geometry.relative_position_index`.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from simmim.encoders.base import Size
from simmim.execution import at_least_float32, cached_constant

# Ratios of the geometric sequence between which the reference looks by bisection, and the width at which it stops.
SMALLEST_RATIO, LARGEST_RATIO, RATIO_TOLERANCE = 1.01, 1.5, 1e-6
DEGREE = 3  # of the splines


def num_offsets(grid: Size) -> int:
    """Number of offsets between two tokens of a grid: rows of its table."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def side_of_table(num_rows: int) -> int | None:
    """The side of the square grid with this number of offsets; None if there is none."""
    side = (math.isqrt(max(num_rows, 0)) + 1) // 2
    return side if side > 0 and num_offsets((side, side)) == num_rows else None


def move_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """A table for the grid `old`, (offsets, h), to one for the grid `new`.

    Along each axis the old offsets are put on a geometric sequence, dense in the middle, that ends where the new offsets
    end, and a cubic spline through their biases is read at the new offsets.
    """
    if old == new:
        return table
    # Not by einops, which torch.compile would see remember that it met a parameter, and compile again.
    values = at_least_float32(table).T.unflatten(1, (2 * old[0] - 1, -1))
    shapes = [(2 * after - 1, 2 * before - 1) for before, after in zip(old, new)]
    matrices = spline_matrices(old, new, values.device).to(values.dtype)
    rows, columns = (part.view(shape) for part, shape in zip(matrices.split(list(map(math.prod, shapes))), shapes))
    return rearrange(rows @ values @ columns.T, "h y x -> (y x) h").to(table.dtype)


@cached_constant(maxsize=64)
def spline_matrices(old: Size, new: Size, device: torch.device) -> Tensor:
    """The numbers of `spline_matrix` along both axes, float64."""
    return torch.cat([spline_matrix(*sides).flatten() for sides in zip(old, new)]).to(device)


def spline_matrix(old: int, new: int) -> Tensor:
    """The matrix from biases of offsets 1 − old … old − 1 along one axis to those of 1 − new … new − 1, float64."""
    positions = geometric_positions(old, new)
    targets = torch.arange(1 - new, new, dtype=torch.float64).clamp(positions[0], positions[-1])
    degree = min(DEGREE, len(positions) - 1)
    # Of as many functions as points: for a cubic spline all inner points but the outermost are knots ("not a knot").
    inner = positions[2:-2] if degree == DEGREE else positions[:0]
    knots = torch.cat((positions[:1].expand(degree + 1), inner, positions[-1:].expand(degree + 1)))
    at_positions, at_targets = (spline_basis(knots, degree, points) for points in (positions, targets))
    return torch.linalg.solve(at_positions.T, at_targets.T).T


def geometric_positions(old: int, new: int) -> Tensor:
    """Where the offsets 1 − old … old − 1 stand among those of the new grid, (2 · old − 1,) float64.

    The distance from one to the next grows by a ratio q, such that the last, 1 + q + … + q^(old − 2), is at new − 1. The
    ratio is not below 1.01, so that a smaller grid gets the middle of the old one.
    """
    left, right = SMALLEST_RATIO, LARGEST_RATIO
    ratio = left
    while right - left > RATIO_TOLERANCE:
        ratio = (left + right) / 2
        if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1:
            right = ratio
        else:
            left = ratio
    steps = torch.tensor(ratio, dtype=torch.float64) ** torch.arange(old - 1, dtype=torch.float64)
    distances = steps.cumsum(0)
    return torch.cat((-distances.flip(0), distances.new_zeros(1), distances))


def spline_basis(knots: Tensor, degree: int, points: Tensor) -> Tensor:
    """The values of all B-splines at `points`, (points, splines), by the recursion of Cox and de Boor."""
    num_splines = len(knots) - degree - 1
    interval = (torch.searchsorted(knots, points, right=True) - 1).clamp(degree, num_splines - 1)
    basis = torch.nn.functional.one_hot(interval, len(knots) - 1).to(points.dtype)
    for order in range(1, degree + 1):
        # Where knots coincide, the spline of lower order is zero, and so is its share.
        spans = knots[order:] - knots[:-order]
        spans = torch.where(spans > 0, spans, 1)
        rising = (points[:, None] - knots[: -order - 1]) / spans[:-1]
        falling = (knots[order + 1 :] - points[:, None]) / spans[1:]
        basis = rising * basis[:, :-1] + falling * basis[:, 1:]
    return basis
