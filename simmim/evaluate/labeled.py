"""Labeled images as training and test vectors for several draws of labels. Each image is encoded once.

Shape letters: N images, T of them to train on, D values of a feature vector. Labels are class indices from 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import LabeledSource
from simmim.data.held_out import number_files
from simmim.data.labels import describe_shortage
from simmim.encoders.base import Encoder
from simmim.evaluate.embeddings import DEFAULT_PASS, Embeddings, EncoderPass, collect_embeddings, embed_batches
from simmim.evaluate.features import AnyFeature
from simmim.messages import notify

if TYPE_CHECKING:
    import datasets


class LabeledRows(NamedTuple):
    """Rows of a dataset and their labels, (N,) int64 each, class by class."""

    rows: np.ndarray
    labels: np.ndarray


class Draw(NamedTuple):
    """A random choice of images to train on and to test with.

    Attributes:
        seed: that it was drawn with.
        train: rows of `LabeledSource.train`.
        test: rows of `LabeledSource.validation`, or of `train` where there is no such part.
    """

    seed: int
    train: LabeledRows
    test: LabeledRows


def draw_labels(source: LabeledSource, labels_per_class: int | None, seed: int, max_images: int | None = None) -> Draw:
    """The images that `simmim finetune` uses with the same seed.

    Args:
        labels_per_class: training images per class; None for all. A class with fewer, of which all are taken, is a `Notice`.
        max_images: upper limit of training images and of test images, chosen evenly over the classes; None for all.

    Raises:
        ValueError: as `simmim.data.read_labeled_images`.
    """
    parts = []
    for rows in source.draw_rows(labels_per_class, seed):
        labels = np.repeat(np.arange(len(source.classes)), [len(rows[name]) for name in source.classes])
        labeled = LabeledRows(np.array([row for name in source.classes for row in rows[name]]), labels)
        parts.append(labeled)
    if shortage := describe_shortage(np.bincount(parts[0].labels), labels_per_class):
        notify(shortage)
    return Draw(seed, *(subsample(part, max_images) for part in parts))


def subsample(labeled: LabeledRows, max_images: int | None) -> LabeledRows:
    """At most `max_images` rows, evenly spaced from the first to the last. Rows are class by class, so each class keeps its
    share."""
    if max_images is None or len(labeled.rows) <= max_images:
        return labeled
    kept = np.linspace(0, len(labeled.rows) - 1, max_images).round().astype(np.int64)
    return LabeledRows(labeled.rows[kept], labeled.labels[kept])


class Split(NamedTuple):
    """The vectors of one draw.

    Attributes:
        seed: of the draw.
        train, test: (T, D) and (N, D) by name of the feature.
        train_labels, test_labels: (T,) and (N,) class indices.
        train_files: (T,), the file that each training image is a page of; None where each is a file of its own.
    """

    seed: int
    train: Mapping[str, np.ndarray]
    train_labels: Sequence[int] | np.ndarray
    test: Mapping[str, np.ndarray]
    test_labels: Sequence[int] | np.ndarray
    train_files: np.ndarray | None = None


@dataclass(frozen=True)
class Pool:
    """Rows of a dataset that one or more draws use, each once.

    Attributes:
        data: only these rows, with the column `image`.
        rows: (N,) int64, ascending, their numbers in the whole dataset.
    """

    data: datasets.Dataset
    rows: np.ndarray

    @functools.cached_property
    def files(self) -> np.ndarray | None:
        """The number of each row's file, (N,); None where each is a file of its own."""
        return number_files(self.data)

    def locate(self, rows: np.ndarray, embedded: Embeddings) -> tuple[np.ndarray, np.ndarray]:
        """Where the vectors of some rows are.

        Args:
            rows: (N,) numbers in the whole dataset.
            embedded: of this pool.

        Returns:
            Whether each could be read, (N,) bool, and the positions in `embedded` of those that could.
        """
        position = np.full(len(self.rows), -1)
        position[embedded.rows] = np.arange(len(embedded.rows))
        positions = position[np.searchsorted(self.rows, rows)]
        return positions >= 0, positions[positions >= 0]


@dataclass(frozen=True)
class Pools:
    """The images that must be encoded for some draws: no image twice, and none that no draw uses.

    Attributes:
        train, test: the same object where test images are held out of the training part.
    """

    train: Pool
    test: Pool

    @property
    def parts(self) -> tuple[Pool, ...]:
        """The one pool or both."""
        return (self.train,) if self.test is self.train else (self.train, self.test)

    def split(self, draw: Draw, embedded: Sequence[Embeddings]) -> Split:
        """Vectors and labels of one draw, without the images that could not be read.

        Args:
            embedded: of each of `parts`.

        Raises:
            ValueError: when none of its training or of its test images could be read, or only one class of the former.
        """
        train_embedded, test_embedded = embedded[0], embedded[-1]
        readable, positions = self.train.locate(draw.train.rows, train_embedded)
        test_readable, test_positions = self.test.locate(draw.test.rows, test_embedded)
        for part, found in (("training", readable), ("test", test_readable)):
            if not found.any():
                raise ValueError(f"none of the {len(found)} {part} images of seed {draw.seed} can be read")
        train_labels = draw.train.labels[readable]
        if len(np.unique(train_labels)) == 1 < len(np.unique(draw.train.labels)):
            path, reason = next(iter(train_embedded.unreadable.items()))
            raise ValueError(
                f"the training images of seed {draw.seed} that can be read are all of one class; of the others the "
                f"first, {path}: {reason}"
            )
        files = self.train.files
        return Split(
            draw.seed,
            {name: vectors[positions] for name, vectors in train_embedded.vectors.items()},
            train_labels,
            {name: vectors[test_positions] for name, vectors in test_embedded.vectors.items()},
            draw.test.labels[test_readable],
            None if files is None else files[np.searchsorted(self.train.rows, draw.train.rows[readable])],
        )


def pool_draws(source: LabeledSource, draws: Sequence[Draw]) -> Pools:
    """The images of all draws together."""
    if source.validation is None:
        both = pool_rows(source.train, [part.rows for draw in draws for part in (draw.train, draw.test)])
        return Pools(both, both)
    return Pools(
        pool_rows(source.train, [draw.train.rows for draw in draws]),
        pool_rows(source.validation, [draw.test.rows for draw in draws]),
    )


def pool_rows(data: datasets.Dataset, rows: Sequence[np.ndarray]) -> Pool:
    """The rows that are in any of `rows`."""
    union = np.unique(np.concatenate(rows))
    return Pool(data.select(union), union)


def embed_pools(
    encoder: Encoder,
    preprocessing: Preprocessing,
    pools: Pools,
    features: Sequence[AnyFeature],
    options: EncoderPass = DEFAULT_PASS,
    progress: Callable[[int], object] | None = None,
) -> list[Embeddings]:
    """Vectors of each of the pools' parts.

    Args:
        progress: as of `collect_embeddings`.

    Raises:
        ValueError: as `embed_batches` and `collect_embeddings`.
    """
    return [
        collect_embeddings(embed_batches(encoder, preprocessing, part.data, features, options), progress)
        for part in pools.parts
    ]


def unreadable_images(embedded: Sequence[Embeddings]) -> Mapping[str, str]:
    """Reason by path of each image that could not be read."""
    return {path: reason for part in embedded for path, reason in part.unreadable.items()}
