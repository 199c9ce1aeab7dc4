"""Byte-identical images, of a source or of two."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from simmim.data.addresses import parse_address
from simmim.data.inspection import process_rows
from simmim.data.records import contents_of, num_bytes, record_name
from simmim.messages import notify

if TYPE_CHECKING:
    import datasets


COMPARE_S = 10.0  # at most, for the images that two sources share; a million sizes on a local disk take about as long
ROWS_AT_ONCE = 1000


class RowDigests(Dataset):
    """The hashes of the files of an array of rows, (rows, 2) uint64; zeros for a missing file."""

    def __init__(self, source: datasets.Dataset) -> None:
        self.source = source

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.frombuffer(b"".join(self.digest(int(row)) for row in rows), dtype=np.uint64).reshape(-1, 2)

    def digest(self, row: int) -> bytes:
        """16 bytes. Two different files of a collection do not share them in practice."""
        record = self.source[row]["image"]
        hasher = hashlib.blake2b(record["bytes"] or b"", digest_size=16)
        if (page := parse_address(record["path"] or "").page) is not None:
            hasher.update(f"page {page}".encode())
        try:
            for path in contents_of(record):
                with open(path, "rb") as file:
                    while part := file.read(2**20):
                        hasher.update(part)
        except OSError:
            return bytes(16)
        return hasher.digest()


def find_duplicates(source: datasets.Dataset, sizes: np.ndarray, workers: int, progress: bool = False) -> list[np.ndarray]:
    """Groups of rows of byte-identical images, in the order of the groups' first rows.

    Args:
        sizes: bytes of each row's file; rows of 0 bytes are left out.
        workers: reading processes.
        progress: show a progress bar.
    """
    by_size = np.unique(sizes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero((by_size[2][by_size[1]] > 1) & (sizes > 0))
    if not len(candidates):
        return []
    title = "comparing files of equal size" if progress else None
    digests = np.concatenate([part for _, part in process_rows(RowDigests(source), candidates, workers, title)])
    missing = ~digests.any(axis=1)
    digests[missing, 0] = np.flatnonzero(missing)  # missing files equal no other
    order = np.lexsort((candidates, digests[:, 1], digests[:, 0]))
    equals_previous = np.append(False, (digests[order][1:] == digests[order][:-1]).all(axis=1))
    in_group = equals_previous | np.append(equals_previous[1:], False)
    # Only rows in groups are split: a million different files would make a million arrays.
    starts = np.flatnonzero(~equals_previous[in_group])
    groups = np.split(candidates[order[in_group]], starts[1:]) if in_group.any() else []
    return sorted(groups, key=lambda group: group[0])


def list_groups(source: datasets.Dataset, groups: Iterable[np.ndarray], max_files: int) -> tuple[tuple[str, ...], ...]:
    """The names of the files in `groups`, of the first `max_files` files."""
    names, num_left = [], max_files
    for group in groups:
        if num_left < 2:
            break
        names.append(tuple(record_name(source[int(row)]["image"], int(row)) for row in group[:num_left]))
        num_left -= len(names[-1])
    return tuple(names)


# --- two sources -------------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """How many images of a source are in another one.

    Attributes:
        num_shared: images of the second source with a byte-identical one in the first, of those that were compared.
        complete: whether all were compared.
    """

    num_shared: int
    complete: bool


def count_shared(first: datasets.Dataset, second: datasets.Dataset, seconds: float = COMPARE_S) -> Shared:
    """How many images of `second` are byte-identical to one of `first`. Only files of equal size are read.

    Args:
        second: the smaller source.
        seconds: after which no further images are compared.
    """
    end, complete = time.perf_counter() + seconds, True
    rows_by_size: dict[int, list[int]] = {}
    for row, size in enumerate(file_sizes(second)):
        if time.perf_counter() > end:
            complete = False
            break
        if size:
            rows_by_size.setdefault(size, []).append(row)
    digests_of, digests_in = RowDigests(first), RowDigests(second)
    rows_by_digest: dict[bytes, list[int]] = {}  # of `second`, where the size has occurred in `first`
    shared: set[int] = set()
    for row, size in enumerate(file_sizes(first)):
        if time.perf_counter() > end:
            complete = False
            break
        if size in rows_by_size:
            for other in rows_by_size[size]:
                rows_by_digest.setdefault(digests_in.digest(other), []).append(other)
            rows_by_size[size] = []
            shared.update(rows_by_digest.get(digests_of.digest(row), ()))
    return Shared(len(shared), complete)


def report_shared(
    validation: datasets.Dataset, others: Mapping[str, datasets.Dataset | None], noun: str = "validation images"
) -> None:
    """A `Notice` for each other set that holds images of `validation`: files of equal content, under whatever names.

    Args:
        validation: with a column `image`, undecoded.
        others: the other sets by what they are, for the text. None for one that cannot be opened, which is passed over.
        noun: what `validation` holds, for the text.
    """
    for name, other in others.items():
        if other is None:
            continue
        shared = count_shared(other, validation)
        if shared.num_shared:
            verb = "is" if shared.num_shared == 1 else "are"
            least = "" if shared.complete else "at least "
            notify(
                f"{least}{shared.num_shared:,} of {len(validation):,} {noun} {verb} also among {name}: files of equal "
                "content, so that the score says less of images that were never seen"
            )
        elif not shared.complete:
            notify(
                f"whether {noun} are also among {name} is open: {COMPARE_S:g} s were not enough to compare all, and "
                "none was found by then"
            )


def file_sizes(source: datasets.Dataset) -> Iterator[int]:
    """The bytes of each row's file in order; 0 for a missing file."""
    images = source.select_columns(["image"])
    for first in range(0, len(images), ROWS_AT_ONCE):
        yield from map(num_bytes, images[first : first + ROWS_AT_ONCE]["image"])
