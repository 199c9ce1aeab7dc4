"""Feature vectors to a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from simmim.checkpoints.checkpoint import SavedEncoder
from simmim.data import open_images
from simmim.data.addresses import without_tile
from simmim.data.tiles import TileWalk, check_overlap, plan_tiles
from simmim.encoders.registry import config_as_dict
from simmim.evaluate.embeddings import DEFAULT_PASS, EncoderPass, check_any_readable, embed_batches, record_unreadable
from simmim.evaluate.features import Feature
from simmim.evaluate.single_files import see_crops, suit_model
from simmim.files import atomic_write
from simmim.reading import Reading, TileSettings

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

ROW_GROUP_BYTES = 32 * 2**20  # of vectors in memory before they are written, and the least that a reader reads at once
SUFFIXES = (".parquet", ".pq")
PLACE = ("x", "y", "width", "height")  # columns of tiles


@dataclass(frozen=True)
class WrittenEmbeddings:
    """What `write_embeddings` has written.

    Attributes:
        count: rows of the file, one per image that could be read.
        dim: values of a vector.
        unreadable: reason by path of each image that could not be read.
        num_empty: tiles that were left out as background.
    """

    count: int
    dim: int
    unreadable: dict[str, str]
    num_empty: int = 0


def write_embeddings(
    saved: SavedEncoder,
    images: str | Path | Sequence[str] | datasets.Dataset,
    out: str | Path,
    stage: int | None = None,
    pooling: str = "mean",
    options: EncoderPass = DEFAULT_PASS,
    tiles: TileSettings | None = None,
    overlap: float = 0.0,
) -> WrittenEmbeddings:
    """Write the vector of every image to the Parquet file `out`, whole or not at all.

    Columns are `path`, text, and `vector`, a list of D float32; of tiles also `x`, `y`, `width` and `height`, their place in
    pixels of the full resolution. Rows are in the order of the images. Vectors of about 32 MiB are in memory, whatever the
    number of images. The schema's metadata has a key `simmim`, whose JSON names encoder, preprocessing and feature.

    Args:
        images: as of `simmim.data.open_images`, or a dataset that it has opened.
        stage, pooling: as of `Feature`.
        tiles: a vector for each tile of an image in place of one for the image; empty ones are left out.
        overlap: of neighboring tiles, as a share of their sides.

    Raises:
        ValueError: when `out` exists or does not end in .parquet, when no image can be read, and as `embed_batches`.
    """
    import pyarrow.parquet as pq

    out = check_new_file(out)
    feature = Feature(stage, pooling)
    dim = feature.dim(saved.encoder.config)
    source: Any = images
    if not hasattr(images, "column_names"):
        saved = suit_model(saved, images)
        source = open_images(images, reading=saved.preprocessing.reading_or_default)
    walk = None
    if tiles is not None:
        saved = see_crops(saved, 1, 1.0 if saved.preprocessing.views > 1 else None)  # a tile is a crop already
        source = walk = walk_over(source, tiles, overlap, saved.preprocessing.reading_or_default)
    batches = embed_batches(saved.encoder, saved.preprocessing, source, (feature,), options, tiles)
    schema = embeddings_schema(saved, feature, tiles)
    written = WrittenEmbeddings(0, dim, {})
    with atomic_write(out) as temporary:
        # No dictionary encoding: hardly any two values are equal.
        with (
            pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer,
            tqdm(total=len(source), desc="embedding", unit="tile" if tiles else "image") as bar,
        ):
            rows = RowGroupWriter(writer, schema, dim)
            for batch in batches:
                record_unreadable(written.unreadable, batch.unreadable)
                written = replace(
                    written, count=written.count + len(batch.rows), num_empty=written.num_empty + batch.num_empty
                )
                rows.add(batch.paths, batch.vectors[feature.name], None if walk is None else places_of(walk, batch.rows))
                bar.update(len(batch.rows) + len(batch.unreadable) + batch.num_empty)
            rows.write()
        if written.num_empty and not written.count:
            raise ValueError(f"all of {written.num_empty:,} tiles are background: give max_background, 1 leaves out none")
        check_any_readable(written.count, written.unreadable)
    return written


def check_new_file(out: str | Path) -> Path:
    """The Parquet file to write.

    Raises:
        ValueError: for one that exists, or has another ending.
    """
    out = Path(out).expanduser()
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{str(out)!r} is no Parquet file's name: end it in .parquet")
    if out.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    return out


def walk_over(source: datasets.Dataset, tiles: TileSettings, overlap: float, reading: Reading) -> TileWalk:
    """The tiles that cover the images of a source.

    Raises:
        ValueError: for an overlap out of range, and as `plan_tiles`.
    """
    check_overlap(overlap)  # before files are opened
    return TileWalk(source, plan_tiles(source, tiles, reading), overlap)


def places_of(walk: TileWalk, numbers: np.ndarray) -> np.ndarray:
    """The places of tiles, (B, 4) int32 of x, y, width and height in pixels of the full resolution."""
    return np.array([walk.place(number) for number in numbers.tolist()], np.int32).reshape(-1, len(PLACE))


def embeddings_schema(saved: SavedEncoder, feature: Feature, tiles: TileSettings | None = None) -> pa.Schema:
    """The columns `path` and `vector`, and as metadata where the vectors come from."""
    import pyarrow as pa

    origin = {
        "encoder": str(saved.report.source),
        "provenance": saved.provenance,
        "architecture": config_as_dict(saved.encoder.config),
        "preprocessing": saved.preprocessing.as_dict(),
        "stage": feature.stage,
        "pooling": feature.pooling,
        **({"tiles": vars(tiles)} if tiles else {}),
    }
    places = dict.fromkeys(PLACE, pa.int32()) if tiles else {}
    return pa.schema(
        {"path": pa.string(), **places, "vector": pa.list_(pa.float32(), feature.dim(saved.encoder.config))},
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
        self.places: list[np.ndarray] = []

    def add(self, paths: Sequence[str], vectors: np.ndarray, places: np.ndarray | None = None) -> None:
        """Collect the vectors, (B, dim) float32, of some images, and write once they are enough.

        Args:
            places: (B, 4) int32 of tiles.
        """
        self.paths += paths if places is None else map(without_tile, paths)
        self.vectors.append(vectors)
        if places is not None:
            self.places.append(places)
        if len(self.paths) >= self.rows_per_group:
            self.write()

    def write(self) -> None:
        """Write what is collected as one row group; nothing where nothing is."""
        import pyarrow as pa

        if self.paths:
            values = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(self.vectors).reshape(-1)), self.dim)
            places = list(np.concatenate(self.places).T) if self.places else []
            columns = [pa.array(self.paths, pa.string()), *map(pa.array, places), values]
            table = pa.Table.from_arrays(columns, schema=self.schema)
            self.writer.write_table(table, row_group_size=len(self.paths))
        self.paths, self.vectors, self.places = [], [], []
