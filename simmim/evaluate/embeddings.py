"""Images to feature vectors: read, cropped and scaled as in evaluation, encoded. One pass gives several features. Where
evaluation looks at several views of an image, its vector is their mean.

    embeddings = collect_embeddings(embed_batches(encoder, preprocessing, open_images("photos")))

Shape letters: N images, B of a batch, D values of a feature vector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import (
    UNREADABLE,
    EvaluationView,
    default_num_workers,
    describe_error,
    evaluation_views,
    normalize,
    open_picture,
)
from simmim.data.loading import ignore_signals
from simmim.data.tiles import is_empty
from simmim.encoders.base import Encoder
from simmim.evaluate.features import AnyFeature, Feature
from simmim.messages import counted
from simmim.reading import Reading, TileSettings

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class EncoderPass:
    """Options of a pass over images. They do not change the vectors, except that batch size and autocast change rounding.

    Args:
        batch_size: images per forward pass.
        workers: processes that read images; 0 reads in this process, None chooses for this machine.
        device: where the encoder is moved to.
        autocast: type to compute in, `torch.bfloat16` for instance; vectors are float32 in any case.

    Raises:
        ValueError: for a batch size or a number of workers out of range.
    """

    batch_size: int = 64
    workers: int | None = None
    device: str | torch.device = "cpu"
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give 0 to read in the main process, or more")


DEFAULT_PASS = EncoderPass()


# --- vectors -----------------------------------------------------------------------------------------------------------


class EmbeddedBatch(NamedTuple):
    """Vectors of consecutive rows of a source.

    Attributes:
        rows: (B,) int64, row numbers in the source of the images that could be read.
        paths: their paths; "row 7" for an image without a path.
        vectors: (B, D) float32 by name of the feature.
        unreadable: (path, reason) of each image that could not be read.
        num_empty: tiles that were left out as background.
    """

    rows: np.ndarray
    paths: list[str]
    vectors: dict[str, np.ndarray]
    unreadable: list[tuple[str, str]]
    num_empty: int = 0


@dataclass(frozen=True)
class Embeddings:
    """Vectors of all images of a source that could be read, in its order.

    Attributes:
        rows: (N,) int64, row numbers in the source, by which labels are found: `np.asarray(source["label"])[rows]`.
        paths: their paths; "row 7" for an image without a path.
        vectors: (N, D) float32 by name of the feature.
        unreadable: reason by path of each image that could not be read.
    """

    rows: np.ndarray
    paths: tuple[str, ...]
    vectors: dict[str, np.ndarray]
    unreadable: dict[str, str]


def collect_embeddings(batches: Iterable[EmbeddedBatch], progress: Callable[[int], object] | None = None) -> Embeddings:
    """All batches of a pass in one object.

    Args:
        progress: called after each batch with its number of images, readable or not.

    Raises:
        ValueError: when no image could be read.
    """
    kept: list[EmbeddedBatch] = []
    unreadable: dict[str, str] = {}
    for batch in batches:
        record_unreadable(unreadable, batch.unreadable)
        kept.append(batch)
        if progress:
            progress(len(batch.rows) + len(batch.unreadable))
    check_any_readable(sum(len(batch.rows) for batch in kept), unreadable)
    return Embeddings(
        np.concatenate([batch.rows for batch in kept]),
        tuple(path for batch in kept for path in batch.paths),
        {name: np.concatenate([batch.vectors[name] for batch in kept]) for name in kept[0].vectors},
        unreadable,
    )


def embed_batches(
    encoder: Encoder,
    preprocessing: Preprocessing,
    source: datasets.Dataset,
    features: Sequence[AnyFeature] = (Feature(),),
    options: EncoderPass = DEFAULT_PASS,
    tiles: TileSettings | None = None,
) -> Iterator[EmbeddedBatch]:
    """Vectors of the images of `source`, batch by batch. A batch without a readable image is returned too.

    Args:
        encoder: moved to the device; in evaluation mode during the pass.
        tiles: where the rows are tiles, which of them are empty and left out.
        source: with a column `image`, undecoded, as from `simmim.data.open_images`.
        features: one or more; `all_features` lists every one.

    Raises:
        ValueError: for a source without rows, and for a feature of a stage that the encoder does not have.
    """
    for feature in features:
        feature.dim(encoder.config)
    views = load_views(preprocessing, encoder.config.in_channels, source, options, tiles)
    return encode_views(encoder, preprocessing, views, features, options)


def encode_views(
    encoder: Encoder,
    preprocessing: Preprocessing,
    views: Iterable[ViewBatch],
    features: Sequence[AnyFeature],
    options: EncoderPass = DEFAULT_PASS,
) -> Iterator[EmbeddedBatch]:
    """Vectors of views that have been loaded.

    The encoder is in evaluation mode until the iterator ends, and its weights must not change meanwhile. Its mode is then
    as it was before.
    """
    device = torch.device(options.device)
    encoder.to(device)
    was_training = encoder.training
    dtype = next(encoder.parameters()).dtype
    needs_stages = any(feature.stage is not None for feature in features)
    no_vectors = {feature.name: np.empty((0, feature.dim(encoder.config)), np.float32) for feature in features}

    def encode(images: Tensor) -> dict[str, Tensor]:
        """(B, channels, height, width), uint8 or float32, to vectors by name."""
        # The context is not around the loop: it would hold in the caller too between two batches. It is not inference mode:
        # training must be able to use what the pass leaves behind, of a sharded encoder for instance.
        with torch.no_grad():
            images = normalize(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
            with torch.autocast(device.type, dtype=options.autocast) if options.autocast else contextlib.nullcontext():
                output = encoder(images.to(dtype), return_stages=needs_stages)
            return {feature.name: feature.extract(images, output) for feature in features}

    def encode_all(images: Tensor) -> dict[str, np.ndarray]:
        """(B, views, channels, height, width) to the means over views, by name. One view at a time, for memory's sake."""
        vectors = [encode(view) for view in images.unbind(1)]
        if len(vectors) == 1:
            return {name: values.cpu().numpy() for name, values in vectors[0].items()}
        return {name: torch.stack([one[name] for one in vectors]).mean(0).cpu().numpy() for name in vectors[0]}

    try:
        encoder.eval()
        with encoder.fixed_weights():
            for batch in views:
                vectors = encode_all(batch.images) if batch.rows else no_vectors
                rows = np.array(batch.rows, np.int64)
                yield EmbeddedBatch(rows, batch.paths, vectors, batch.unreadable, batch.num_empty)
    finally:
        encoder.train(was_training)


# --- views -------------------------------------------------------------------------------------------------------------


class ViewBatch(NamedTuple):
    """Images as the encoder sees them: `images` (B, views, channels, height, width), uint8 or float32; the rest as in
    `EmbeddedBatch`."""

    rows: list[int]
    paths: list[str]
    images: Tensor
    unreadable: list[tuple[str, str]]
    num_empty: int = 0


def load_views(
    preprocessing: Preprocessing,
    channels: int,
    source: datasets.Dataset,
    options: EncoderPass = DEFAULT_PASS,
    tiles: TileSettings | None = None,
) -> DataLoader:
    """A loader of `ViewBatch` over the rows of `source` in order. It draws nothing from torch's global generator.

    Args:
        channels: of the images that the encoder takes.
        tiles: as of `embed_batches`.

    Raises:
        ValueError: for a source without rows.
    """
    if not len(source):
        raise ValueError("the source holds no images: give one with at least one")
    count, size, device = len(source), options.batch_size, torch.device(options.device)
    ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]
    how = preprocessing
    views = evaluation_views(how.image_size, how.crop, how.views, how.interpolation, how.fit)
    workers = default_num_workers(device.type) if options.workers is None else options.workers
    return DataLoader(
        ViewDataset(source, views, channels, preprocessing.reading_or_default, tiles),
        batch_size=None,
        sampler=ranges,
        num_workers=min(workers, len(ranges)),
        collate_fn=return_unchanged,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )


class ViewDataset(Dataset):
    """Views of the images of a source. Each item is a whole batch, so that a process sends one tensor and not many."""

    def __init__(
        self,
        source: datasets.Dataset,
        views: Sequence[EvaluationView],
        channels: int,
        reading: Reading,
        tiles: TileSettings | None = None,
    ) -> None:
        self.source, self.views, self.channels, self.reading, self.tiles = source, views, channels, reading, tiles

    def __getitem__(self, rows: range) -> ViewBatch:
        readable, paths, views, unreadable, num_empty = [], [], [], [], 0
        for row in rows:
            record = self.source[row]["image"]
            path = record["path"] or f"row {row}"
            try:
                picture = open_picture(record, self.channels, reading=self.reading)
                if self.tiles and is_empty(picture, self.tiles):
                    num_empty += 1
                    continue
                views.append(torch.stack([view(picture) for view in self.views]))
            except UNREADABLE as error:
                unreadable.append((path, describe_error(error)))
                continue
            readable.append(row)
            paths.append(path)
        empty = (0, len(self.views), self.channels, *self.views[0].size)
        images = torch.stack(views) if views else torch.empty(empty, dtype=torch.uint8)
        return ViewBatch(readable, paths, images, unreadable, num_empty)


def return_unchanged(batch: Any) -> Any:
    """The `collate_fn` of a loader whose items are batches already."""
    return batch


# --- unreadable images -------------------------------------------------------------------------------------------------


def record_unreadable(reasons: dict[str, str], unreadable: Sequence[tuple[str, str]]) -> None:
    """Add (path, reason) pairs to reasons by path.

    Several images of one path, as shards may hold, get a number each, so that the count is right.
    """
    for path, reason in unreadable:
        name, number = path, 2
        while name in reasons:
            name, number = f"{path} ({number})", number + 1
        reasons[name] = reason


def check_any_readable(num_readable: int, reasons: Mapping[str, str]) -> None:
    """Check that at least one image could be read.

    Raises:
        ValueError: with the reason of the first image.
    """
    if not num_readable:
        path, reason = next(iter(reasons.items()))
        raise ValueError(f"none of {counted(len(reasons), 'image')} can be read; the first, {path}: {reason}")
