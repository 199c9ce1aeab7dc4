"""Images that are kept out of training, to judge by. Pages of one file resemble one another, and stay together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simmim.data.addresses import parse_address
from simmim.data.sources import Source
from simmim.messages import counted, notify

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
    """Keep images out of a source; of images that are pages of files, whole files.

    Which rows they are is a function of their number, `amount`, `seed` and, where files have several, the files' pages.

    Args:
        source: not streaming.
        amount: a share below 1, of which at least one image comes, or a number of images. Of files of several pages as many
            are taken as reach it, which is a `Notice` where there are more images in them.

    Raises:
        ValueError: when nothing is left to train on.
    """
    assert not source.streaming, "rows of a stream have no numbers"
    total = source.num_images
    count = max(1, round(amount * total)) if amount < 1 else round(amount)
    if count >= total:
        raise ValueError(f"data.validation is {amount:g}, of {counted(total, 'image')}: nothing is left to train on")
    generator = np.random.default_rng([seed, 0, HELD_OUT])
    files = number_files(source.head)
    is_held_out = np.zeros(total, bool)
    if files is None:
        is_held_out[generator.permutation(total)[:count]] = True
    else:
        is_held_out = draw_files(files, count, amount, generator)
    kept, held_out = (source.head.select(np.flatnonzero(rows)) for rows in (~is_held_out, is_held_out))
    return HeldOut(Source(kept, len(kept), kept, streaming=False), held_out)


def draw_files(files: np.ndarray, count: int, amount: float, generator: np.random.Generator) -> np.ndarray:
    """Whether each row is held out: all rows of as few files as hold `count` images, in a random order.

    Args:
        files: (rows,), the number of each row's file.
        amount: as of `hold_out`, for the text.

    Raises:
        ValueError: when no file is left to train on.
    """
    sizes = np.bincount(files)
    order = generator.permutation(len(sizes))
    num_files = int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1
    if num_files >= len(sizes):
        raise ValueError(
            f"data.validation is {amount:g}, and images are pages of {counted(len(sizes), 'file')}, which are held out "
            "whole: nothing is left to train on; give more files, or a smaller part"
        )
    is_held_out = np.isin(files, order[:num_files])
    if (found := int(is_held_out.sum())) != count:
        notify(
            f"data.validation holds out {found:,} images in place of {count:,}: all of {counted(num_files, 'file')}, since "
            "pages of one file resemble one another"
        )
    return is_held_out


def number_files(images: datasets.Dataset) -> np.ndarray | None:
    """The number of each row's file, (rows,) from 0; None where each row is a file of its own.

    Args:
        images: with a column `image`, undecoded. The pages of a file are rows in a row, as `arrange` makes them.
    """
    import pyarrow.compute

    # Flattened, so that the files' bytes are not read with their paths.
    paths = images.select_columns(["image"]).flatten().select_columns(["image.path"]).with_format("arrow")[:]["image.path"]
    if not pyarrow.compute.any(pyarrow.compute.match_substring(paths, "#page=")).as_py():
        return None
    numbers, before = np.empty(len(images), np.int64), parse_address("")
    number = -1
    for row, path in enumerate(paths.to_pylist()):
        address = parse_address(path or "")
        goes_on = number >= 0 and address.page is not None and before.files == address.files
        # Files in memory may have no name, or the same; a page that does not follow is of another one.
        number += not (goes_on and (before.page or 0) < address.page)
        numbers[row], before = number, address
    return numbers
