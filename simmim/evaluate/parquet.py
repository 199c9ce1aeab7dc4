"""Feature vectors to a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from simmim.checkpoints.checkpoint import SavedEncoder
from simmim.data import open_images
from simmim.encoders.registry import config_as_dict
from simmim.evaluate.embeddings import DEFAULT_PASS, EncoderPass, check_any_readable, embed_batches, record_unreadable
from simmim.evaluate.features import Feature
from simmim.files import atomic_write

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

ROW_GROUP_BYTES = 32 * 2**20  # of vectors in memory before they are written, and the least that a reader reads at once
SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class WrittenEmbeddings:
    """What `write_embeddings` has written.

    Attributes:
        count: rows of the file, one per image that could be read.
        dim: values of a vector.
        unreadable: reason by path of each image that could not be read.
    """

    count: int
    dim: int
    unreadable: dict[str, str]


def write_embeddings(
    saved: SavedEncoder,
    images: str | Path | Sequence[str] | datasets.Dataset,
    out: str | Path,
    stage: int | None = None,
    pooling: str = "mean",
    options: EncoderPass = DEFAULT_PASS,
) -> WrittenEmbeddings:
    """Write the vector of every image to the Parquet file `out`, whole or not at all.

    Columns are `path`, text, and `vector`, a list of D float32. Rows are in the order of the images. Vectors of about 32 MiB
    are in memory, whatever the number of images. The schema's metadata has a key `simmim`, whose JSON names encoder,
    preprocessing and feature.

    Args:
        images: as of `simmim.data.open_images`, or a dataset that it has opened.
        stage, pooling: as of `Feature`.

    Raises:
        ValueError: when `out` exists or does not end in .parquet, when no image can be read, and as `embed_batches`.
    """
    import pyarrow.parquet as pq

    out = Path(out).expanduser()
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{str(out)!r} is no Parquet file's name: end it in .parquet")
    if out.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    feature = Feature(stage, pooling)
    dim = feature.dim(saved.encoder.config)
    if isinstance(images, Path):
        images = str(images)
    source: Any = (
        images if hasattr(images, "column_names") else open_images(images, reading=saved.preprocessing.reading_or_default)
    )
    batches = embed_batches(saved.encoder, saved.preprocessing, source, (feature,), options)
    schema = embeddings_schema(saved, feature)
    count = 0
    unreadable: dict[str, str] = {}
    with atomic_write(out) as temporary:
        # No dictionary encoding: hardly any two values are equal.
        with (
            pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer,
            tqdm(total=len(source), desc="embedding", unit="image") as bar,
        ):
            rows = RowGroupWriter(writer, schema, dim)
            for batch in batches:
                record_unreadable(unreadable, batch.unreadable)
                count += len(batch.rows)
                rows.add(batch.paths, batch.vectors[feature.name])
                bar.update(len(batch.rows) + len(batch.unreadable))
            rows.write()
        check_any_readable(count, unreadable)
    return WrittenEmbeddings(count, dim, unreadable)


def embeddings_schema(saved: SavedEncoder, feature: Feature) -> pa.Schema:
    """The columns `path` and `vector`, and as metadata where the vectors come from."""
    import pyarrow as pa

    origin = {
        "encoder": str(saved.report.source),
        "provenance": saved.provenance,
        "architecture": config_as_dict(saved.encoder.config),
        "preprocessing": saved.preprocessing.as_dict(),
        "stage": feature.stage,
        "pooling": feature.pooling,
    }
    return pa.schema(
        {"path": pa.string(), "vector": pa.list_(pa.float32(), feature.dim(saved.encoder.config))},
        metadata={"simmim": json.dumps(origin, default=str)},
    )


class RowGroupWriter:
    """Collects paths and vectors and writes them as row groups of about `ROW_GROUP_BYTES`.

    Args:
        dim: values of a vector.
    """

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, dim: int) -> None:
        self.writer, self.schema, self.dim = writer, schema, dim
        self.rows_per_group = max(1, ROW_GROUP_BYTES // (4 * dim))
        self.paths: list[str] = []
        self.vectors: list[np.ndarray] = []

    def add(self, paths: Sequence[str], vectors: np.ndarray) -> None:
        """Collect the vectors, (B, dim) float32, of some images, and write once they are enough."""
        self.paths += paths
        self.vectors.append(vectors)
        if len(self.paths) >= self.rows_per_group:
            self.write()

    def write(self) -> None:
        """Write what is collected as one row group; nothing where nothing is."""
        import pyarrow as pa

        if self.paths:
            values = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(self.vectors).reshape(-1)), self.dim)
            columns = [pa.array(self.paths, pa.string()), values]
            table = pa.Table.from_arrays(columns, schema=self.schema)
            self.writer.write_table(table, row_group_size=len(self.paths))
        self.paths, self.vectors = [], []
