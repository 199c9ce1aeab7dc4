"""Images that are kept out of training, to judge by."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simmim.data.sources import Source

if TYPE_CHECKING:
    import datasets

HELD_OUT = 1  # the third word of the seed, so that the draw is that of no epoch's order, which has two


class HeldOut(NamedTuple):
    """A source in two parts without a row in common.

    Attributes:
        source: the images to train on, in their order.
        images: those that are kept out, in their order.
    """

    source: Source
    images: datasets.Dataset


def hold_out(source: Source, amount: float, seed: int) -> HeldOut:
    """Keep images out of a source.

    Which rows they are is a function of their number, `amount` and `seed` alone.

    Args:
        source: not streaming.
        amount: a share below 1, of which at least one image comes, or a number of images.

    Raises:
        ValueError: when nothing is left to train on.
    """
    assert not source.streaming, "rows of a stream have no numbers"
    total = source.num_images
    count = max(1, round(amount * total)) if amount < 1 else round(amount)
    if count >= total:
        raise ValueError(f"data.validation is {amount:g} and there are {total:,} images: nothing is left to train on")
    order = np.random.default_rng([seed, 0, HELD_OUT]).permutation(total)
    kept, held_out = (source.head.select(np.sort(rows)) for rows in (order[count:], order[:count]))
    return HeldOut(Source(kept, len(kept), kept, streaming=False), held_out)
