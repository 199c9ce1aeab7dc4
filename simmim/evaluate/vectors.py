"""Images to vectors: read, seen as in evaluation, encoded, several vectors an image in one pass.

Shape letters: N images, B of a batch, D values of a vector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import UNREADABLE, CenterView, default_num_workers, describe_error, normalize, open_picture
from simmim.data.samples import ignore_signals
from simmim.encoders.base import Encoder
from simmim.evaluate.features import Feature, Pixels

if TYPE_CHECKING:
    import datasets


Vector = Feature | Pixels


@dataclass(frozen=True)
class EncoderPass:
    """How images go through an encoder. The vectors depend on none of it but, by rounding, on batch and autocast.

    Args:
        batch_size: images at a time.
        workers: reading processes; 0 reads in this one, None chooses for this machine.
        device: where the encoder is moved to.
        autocast: a type to compute in, `torch.bfloat16` for instance; vectors are float32 in any case.

    Raises:
        ValueError: for a batch size or a number of workers out of range.
    """

    batch_size: int = 64
    workers: int | None = None
    device: str | torch.device = "cpu"
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size is {self.batch_size}: give 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give 0 to read in the main process, or more")


DEFAULT_PASS = EncoderPass()


class EmbeddedBatch(NamedTuple):
    """Some consecutive rows of a source.

    Attributes:
        rows: (B,) int64, their place in the source, of the images that could be read.
        paths: of the same; "row 7" for an image without a path.
        vectors: by the features' names, (B, D) float32.
        unreadable: (path, reason) of the others.
    """

    rows: np.ndarray
    paths: list[str]
    vectors: dict[str, np.ndarray]
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Embeddings:
    """All images of a source that could be read, in its order.

    Attributes:
        rows: (N,) int64, their place in the source, by which labels are found: `np.asarray(source["label"])[rows]`.
        paths: as in the source; "row 7" for an image without a path.
        vectors: by the features' names, (N, D) float32.
        unreadable: reason by path of every image that could not be read.
    """

    rows: np.ndarray
    paths: tuple[str, ...]
    vectors: dict[str, np.ndarray]
    unreadable: dict[str, str]


def embeddings(
    encoder: Encoder,
    preprocessing: Preprocessing,
    source: datasets.Dataset,
    features: Sequence[Vector] = (Feature(),),
    how: EncoderPass = DEFAULT_PASS,
    progress: Callable[[int], object] | None = None,
) -> Embeddings:
    """Vectors of all images of `source`, several an image in one pass, held in memory.

    Args:
        encoder: moved to the device; in evaluation mode during the pass.
        source: with a column `image`, undecoded, as from `simmim.data.open_images`.
        features: which vectors; `all_features` gives every one.
        progress: called with the number of images, readable or not, that each batch has dealt with.

    Raises:
        ValueError: for a source without rows, or of which nothing can be read; a stage that the encoder does not have.
    """
    return collected(embedded_batches(encoder, preprocessing, source, features, how), progress)


def collected(batches: Iterable[EmbeddedBatch], progress: Callable[[int], object] | None = None) -> Embeddings:
    """All batches of a pass as one.

    Raises:
        ValueError: when nothing could be read.
    """
    kept, unreadable = [], {}
    for batch in batches:
        note_unreadable(unreadable, batch.unreadable)
        kept.append(batch)
        if progress:
            progress(len(batch.rows) + len(batch.unreadable))
    check_any_read(sum(len(batch.rows) for batch in kept), unreadable)
    return Embeddings(
        np.concatenate([batch.rows for batch in kept]),
        tuple(path for batch in kept for path in batch.paths),
        {name: np.concatenate([batch.vectors[name] for batch in kept]) for name in kept[0].vectors},
        unreadable,
    )


def embedded_batches(
    encoder: Encoder,
    preprocessing: Preprocessing,
    source: datasets.Dataset,
    features: Sequence[Vector] = (Feature(),),
    how: EncoderPass = DEFAULT_PASS,
) -> Iterator[EmbeddedBatch]:
    """As `embeddings`, batch by batch as they come; a batch without a readable image comes too.

    Raises:
        ValueError: as `embeddings`, except that an all unreadable source is the caller's to notice.
    """
    for feature in features:
        feature.dim(encoder.config)
    views = view_batches(preprocessing, encoder.config.in_channels, source, how)
    return encoded(encoder, preprocessing, views, tuple(features), how)


def view_batches(
    preprocessing: Preprocessing, channels: int, source: datasets.Dataset, how: EncoderPass = DEFAULT_PASS
) -> DataLoader:
    """What the encoder is to see of the images, `ViewBatch` batches, as often as they are gone through. Nothing is drawn from
    torch's global generator.

    Raises:
        ValueError: for a source without rows.
    """
    if not len(source):
        raise ValueError("the source holds no images: give one with at least one")
    count, size, device = len(source), how.batch_size, torch.device(how.device)
    pieces = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return DataLoader(
        ViewedRows(source, evaluation_view(preprocessing), channels),
        batch_size=None,
        sampler=pieces,
        num_workers=min(default_num_workers(device.type) if how.workers is None else how.workers, len(pieces)),
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )


def encoded(
    encoder: Encoder,
    preprocessing: Preprocessing,
    views: Iterable[ViewBatch],
    features: tuple[Vector, ...],
    how: EncoderPass = DEFAULT_PASS,
) -> Iterator[EmbeddedBatch]:
    """The views' vectors; the encoder's mode is as before when they end. Meanwhile nobody may change its weights."""
    device = torch.device(how.device)
    encoder.to(device)
    was_training = encoder.training
    kind = next(encoder.parameters()).dtype
    stages = any(feature.stage is not None for feature in features)
    nothing = {feature.name: np.empty((0, feature.dim(encoder.config)), np.float32) for feature in features}

    def encode(images: Tensor) -> dict[str, np.ndarray]:
        """(B, channels, height, width) uint8 to vectors by name."""
        # Not around the loop: between two batches of a generator its caller would be without gradients as well. And not
        # inference mode: whatever is kept of the pass, by a sharded encoder for instance, training must be able to use.
        with torch.no_grad():
            images = normalize(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
            with torch.autocast(device.type, dtype=how.autocast) if how.autocast else contextlib.nullcontext():
                output = encoder(images.to(kind), return_stages=stages)
            return {feature.name: feature.of(images, output).cpu().numpy() for feature in features}

    try:
        encoder.eval()
        with encoder.position_bias_kept():
            for viewed in views:
                vectors = encode(viewed.images) if viewed.rows else nothing
                yield EmbeddedBatch(np.array(viewed.rows, np.int64), viewed.paths, vectors, viewed.unreadable)
    finally:
        encoder.train(was_training)


def evaluation_view(preprocessing: Preprocessing) -> CenterView:
    """What an encoder's preprocessing sees of an image."""
    return CenterView(preprocessing.image_size, preprocessing.crop, preprocessing.interpolation, preprocessing.fit)


class ViewBatch(NamedTuple):
    """Rows read: `images` (B, channels, height, width) uint8; the rest is as in `EmbeddedBatch`."""

    rows: list[int]
    paths: list[str]
    images: Tensor
    unreadable: list[tuple[str, str]]


class ViewedRows(Dataset):
    """By a range of rows their images' views; a batch at a time, so that one tensor leaves the process, not many."""

    def __init__(self, source: datasets.Dataset, view: CenterView, channels: int) -> None:
        self.source, self.view, self.channels = source, view, channels

    def __getitem__(self, rows: range) -> ViewBatch:
        read, paths, views, unreadable = [], [], [], []
        for row in rows:
            record = self.source[row]["image"]
            path = record["path"] or f"row {row}"
            try:
                views.append(self.view(open_picture(record, self.channels)))
            except UNREADABLE as error:
                unreadable.append((path, describe_error(error)))
                continue
            read.append(row)
            paths.append(path)
        images = torch.stack(views) if views else torch.empty((0, self.channels, *self.view.size), dtype=torch.uint8)
        return ViewBatch(read, paths, images, unreadable)


def as_it_is(viewed: ViewBatch) -> ViewBatch:
    """For a loader whose samples are batches already."""
    return viewed


def note_unreadable(noted: dict[str, str], found: Sequence[tuple[str, str]]) -> None:
    """Add reasons by path. Shards may hold several images of one name; each is kept, so that the count is right."""
    for path, why in found:
        name, number = path, 2
        while name in noted:
            name, number = f"{path} ({number})", number + 1
        noted[name] = why


def check_any_read(count: int, unreadable: Mapping[str, str]) -> None:
    """Refuse a source of which nothing could be read.

    Raises:
        ValueError: with the first image's reason.
    """
    if not count:
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(unreadable)} images can be read; the first, {path}: {why}")
