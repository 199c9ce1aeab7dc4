"""Vectors that somebody else computed, from a Parquet file, for the images of labels.

A file has a column of paths and a column of vectors, as `simmim.evaluate.write_embeddings` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from simmim.data.records import paths_of
from simmim.evaluate.embeddings import Embeddings
from simmim.evaluate.labeled import Pools
from simmim.messages import name_some

if TYPE_CHECKING:
    import pyarrow as pa

PATHS = ("path", "paths", "file", "file_name", "filename", "image", "image_path")
VECTORS = ("vector", "vectors", "embedding", "embeddings", "feature", "features")
NAME = "vectors"  # of the feature in tables


@dataclass(frozen=True)
class VectorFile:
    """The content of a file.

    Attributes:
        source: the file.
        paths: of the images, one per row.
        vectors: (N, D) float32.
        origin: what the file says of the encoder, as `write_embeddings` stores it; empty in other files.
    """

    source: Path
    paths: tuple[str, ...]
    vectors: np.ndarray
    origin: Mapping[str, Any] = field(default_factory=dict)

    def of_pools(self, pools: Pools) -> list[Embeddings]:
        """The vectors of the images of each of the pools' parts.

        Raises:
            ValueError: when an image has no vector, or several rows could be its.
        """
        found = [paths_of(part.data) for part in pools.parts]
        nameless = sum(path is None for part in found for path in part)
        if nameless:
            raise ValueError(
                f"{nameless:,} of the labeled images have no path, by which {self.source} could tell their vectors: give "
                "images as files"
            )
        wanted = [[path for path in part if path is not None] for part in found]
        rows = self.rows_of([path for part in wanted for path in part])
        return [
            Embeddings(np.arange(len(part)), tuple(part), {NAME: self.vectors[[rows[path] for path in part]]}, {})
            for part in wanted
        ]

    def rows_of(self, paths: Sequence[str]) -> dict[str, int]:
        """The row of each path.

        Paths are compared as they are; else as absolute ones; else by their last folders and name, as few as tell all rows
        apart.

        Raises:
            ValueError: as `of_pools`.
        """
        best: list[str] = list(paths)
        for key in (str, absolute, *(last_parts(count) for count in (4, 3, 2, 1))):
            keyed: dict[str, int] = {}
            for row, path in enumerate(self.paths):
                keyed[key(path)] = row if key(path) not in keyed else -1
            missing = [path for path in paths if keyed.get(key(path), -1) < 0]
            if not missing and len({key(path) for path in paths}) == len(set(paths)):
                return {path: keyed[key(path)] for path in paths}
            best = min(best, missing, key=len) if missing else best
        raise ValueError(
            f"{self.source} has no vector for {len(best):,} of {len(paths):,} images of the labels ({name_some(best, 2)}): "
            "compute theirs too; paths are compared whole, else by their last folders and name"
        )


def absolute(path: str) -> str:
    """A path from the root."""
    return str(Path(path).expanduser().resolve())


def last_parts(count: int) -> Callable[[str], str]:
    """The function that keeps the last folders of a path and its name, `count` in all."""
    return lambda path: "/".join(PurePath(path).parts[-count:])


def read_vectors(path: str | Path) -> VectorFile:
    """Paths and vectors of a Parquet file.

    Raises:
        ValueError: when there is no such file, it is no Parquet, lacks a column, or its vectors differ in length or are not
            finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = Path(path).expanduser()
    if not source.is_file():
        raise ValueError(f"no vectors at {str(path)!r}: there is no such file")
    try:
        table = pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source} is no Parquet file: expected columns path and vector ({error})") from error
    names = column_of(table, PATHS, is_text, source, "paths (text)")
    values = column_of(table, VECTORS, is_list, source, "vectors (lists of numbers)")
    stored = (table.schema.metadata or {}).get(b"simmim")
    return VectorFile(
        source,
        tuple(map(str, table[names].to_pylist())),
        as_matrix(table[values], source),
        json.loads(stored) if stored else {},
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def column_of(table: pa.Table, names: Sequence[str], fits: Callable[[pa.DataType], bool], source: Path, what: str) -> str:
    """The column of the right type that has one of the usual names; else the only one of that type.

    Args:
        what: such columns hold, for the message.

    Raises:
        ValueError: when there is none, or more than one.
    """
    right = [field.name for field in table.schema if fits(field.type)]
    named = [name for name in names if name in right] or (right if len(right) == 1 else [])
    if not named:
        raise ValueError(
            f"{source} has the columns {', '.join(table.column_names)}: expected one of {what}, called {names[0]}, as "
            "simmim embed writes it"
        )
    return named[0]


def as_matrix(column: pa.ChunkedArray, source: Path) -> np.ndarray:
    """(N, D) float32.

    Raises:
        ValueError: when lists differ in length, are empty, or hold anything but finite numbers.
    """
    import pyarrow.compute as pc

    lengths = np.unique(pc.list_value_length(column).to_numpy()) if len(column) else np.array([0])
    if column.null_count or len(lengths) != 1 or not lengths[0]:
        raise ValueError(f"the vectors of {source} differ in length or are missing: expected as many numbers in each row")
    try:
        values = pc.list_flatten(column).to_numpy().astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the vectors of {source} are no numbers: expected lists of numbers") from error
    matrix = values.reshape(len(column), int(lengths[0]))
    if not np.isfinite(matrix).all():
        raise ValueError(f"vectors of {source} are not finite: leave these rows out")
    return matrix
