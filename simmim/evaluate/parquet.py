"""Vectors to a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from simmim.checkpoints.checkpoint import SavedEncoder
from simmim.data import open_images
from simmim.evaluate.features import Feature
from simmim.evaluate.vectors import DEFAULT_PASS, EncoderPass, check_any_read, embedded_batches, note_unreadable
from simmim.files import atomic_write

if TYPE_CHECKING:
    import datasets

ROW_GROUP_BYTES = 32 * 2**20  # of vectors held before they are written, and a reader's smallest piece


@dataclass(frozen=True)
class EmbedResult:
    """What `embed` has written.

    Attributes:
        count: rows of the file, one an image that could be read.
        dim: values of a vector.
        unreadable: reason by path of every image that could not be read.
    """

    count: int
    dim: int
    unreadable: dict[str, str]


def embed(
    saved: SavedEncoder,
    images: str | Path | Sequence[str] | datasets.Dataset,
    out: str | Path,
    stage: int | None = None,
    pooling: str = "mean",
    how: EncoderPass = DEFAULT_PASS,
) -> EmbedResult:
    """Write every image's vector to the Parquet file `out`, whole or not at all.

    Columns: `path`, text, and `vector`, a list of D float32; rows in the order of the images. A row group of
    about 32 MiB is in memory, whatever the number of images. The file's schema says under the key `simmim`, as JSON, which
    encoder, preprocessing and feature the vectors are from.

    Args:
        images: as `simmim.data.open_images` takes them, or a dataset that it has opened.
        stage, pooling: as of `Feature`.

    Raises:
        ValueError: when `out` exists, and as `embeddings`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = Path(out).expanduser()
    if out.suffix.lower() not in (".parquet", ".pq"):
        raise ValueError(f"{str(out)!r} is no Parquet file's name: end it in .parquet")
    if out.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    feature = Feature(stage, pooling)
    dim = feature.dim(saved.encoder.config)
    source = images if hasattr(images, "column_names") else open_images(images)
    batches = embedded_batches(saved.encoder, saved.preprocessing, source, (feature,), how)
    origin = {
        "encoder": str(saved.report.source),
        "provenance": saved.provenance,
        "architecture": saved.encoder.config.as_dict(),
        "preprocessing": asdict(saved.preprocessing),
        "stage": stage,
        "pooling": pooling,
    }
    schema = pa.schema(
        {"path": pa.string(), "vector": pa.list_(pa.float32(), dim)},
        metadata={"simmim": json.dumps(origin, default=str)},
    )
    rows_at_once = max(1, ROW_GROUP_BYTES // (4 * dim))
    count, unreadable, paths, vectors = 0, {}, [], []

    with atomic_write(out) as temporary:
        # No dictionary: hardly two values of the vectors are alike.
        with pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer:

            def write() -> None:
                """What is held, as one row group."""
                values = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors).reshape(-1)), dim)
                columns = [pa.array(paths, pa.string()), values]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(paths))
                paths.clear()
                vectors.clear()

            with tqdm(total=len(source), desc="embedding", unit="image") as bar:
                for batch in batches:
                    note_unreadable(unreadable, batch.unreadable)
                    count += len(batch.rows)
                    paths += batch.paths
                    vectors.append(batch.vectors[feature.name])
                    if len(paths) >= rows_at_once:
                        write()
                    bar.update(len(batch.rows) + len(batch.unreadable))
            if paths:
                write()
        check_any_read(count, unreadable)
    return EmbedResult(count, dim, unreadable)
