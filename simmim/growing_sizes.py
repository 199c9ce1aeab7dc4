"""Image sizes that follow one another in a run: as they are given, and as texts name them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

from simmim.defaults import as_size

SHARES_TOLERANCE = 1e-6  # of their sum: thirds are rounded


def as_given(size: int | Sequence[int]) -> int | tuple[int, int]:
    """One number, or height and width as a tuple."""
    if isinstance(size, int):
        return size
    height, width = size
    return height, width


def check_growth(sizes: Sequence[int | tuple[int, int]]) -> None:
    """Check that there are two sizes or more and that each is larger than the one before.

    Raises:
        ValueError: naming the first one that is not.
    """
    if len(sizes) < 2:
        raise ValueError(f"image_sizes is {list(sizes)}: give two sizes or more, as [96, 128, 192], or image_size")
    if any(not all(isinstance(side, int) and side > 0 for side in as_size(size)) for size in sizes):
        raise ValueError(f"image_sizes is {list(sizes)}: give pixels, one number or height and width for each size")
    for before, after in zip(map(as_size, sizes), map(as_size, sizes[1:])):
        if after == before or after[0] < before[0] or after[1] < before[1]:
            raise ValueError(
                f"image_sizes has {size_text(after)} px after {size_text(before)} px: give growing sizes, the smallest "
                "first, as [96, 128, 192]"
            )


def check_count(name: str, values: Sequence[object], sizes: Sequence[object]) -> None:
    """Check that a setting has a value for each size.

    Raises:
        ValueError: naming the setting.
    """
    if len(values) != len(sizes):
        raise ValueError(f"{name} has {len(values)} entries and image_sizes has {len(sizes)}: give one for each size")


def check_shares(shares: Sequence[float] | None) -> None:
    """Check the shares of a run's steps.

    Raises:
        ValueError: for some that are not positive, or do not sum to 1.
    """
    if shares is None:
        return
    if min(shares) <= 0 or abs(math.fsum(shares) - 1) > SHARES_TOLERANCE:
        raise ValueError(
            f"image_size_shares is {list(shares)}, with the sum {math.fsum(shares):g}: give positive shares that sum to 1"
        )


def size_text(size: int | tuple[int, int]) -> str:
    """96, or 96×128 where the sides differ."""
    height, width = as_size(size)
    return str(height) if height == width else f"{height}×{width}"


def shares_of(sizes: Sequence[object], shares: Sequence[float] | None) -> list[float]:
    """Share of the run's steps at each size: those that are given, else equal ones."""
    return list(shares or [1 / len(sizes)] * len(sizes))


@contextlib.contextmanager
def naming(size: int | tuple[int, int]) -> Iterator[None]:
    """A context whose errors say at which size they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"at {size_text(size)} px of image_sizes: {error}") from error
