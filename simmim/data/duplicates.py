"""Byte-identical images of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from simmim.data.inspection import process_rows
from simmim.data.records import record_name

if TYPE_CHECKING:
    import datasets


class RowDigests(Dataset):
    """The hashes of the files of an array of rows, (rows, 2) uint64; zeros for a missing file."""

    def __init__(self, source: datasets.Dataset) -> None:
        self.source = source

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.frombuffer(b"".join(self.digest(int(row)) for row in rows), dtype=np.uint64).reshape(-1, 2)

    def digest(self, row: int) -> bytes:
        """16 bytes. Two different files of a collection do not share them in practice."""
        record = self.source[row]["image"]
        if record["bytes"] is not None:
            return hashlib.blake2b(record["bytes"], digest_size=16).digest()
        hasher = hashlib.blake2b(digest_size=16)
        try:
            with open(record["path"], "rb") as file:
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
