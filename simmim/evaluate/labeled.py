"""Labeled images as training and test vectors, of several draws of labels, every image encoded once.

Shape letters: N images, T of them to train on, D values of a vector. Labels are class indices from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import LabeledSource
from simmim.encoders.base import Encoder
from simmim.evaluate.vectors import DEFAULT_PASS, Embeddings, EncoderPass, Vector, embeddings

if TYPE_CHECKING:
    import datasets


class Rows(NamedTuple):
    """Rows of a dataset and their labels, two times (N,) int64, class by class."""

    rows: np.ndarray
    labels: np.ndarray


class Draw(NamedTuple):
    """What to train on and what to test with, by rows of a `LabeledSource`; test rows are of its `validation`, or where
    there is none of its `train`."""

    seed: int
    train: Rows
    test: Rows


def draw(source: LabeledSource, labels_per_class: int | None, seed: int, at_most: int | None = None) -> Draw:
    """The images that `simmim finetune` takes for the same seed.

    Args:
        labels_per_class: training images of each class; None for all.
        at_most: of training and of test images each so many, evenly over the classes; None for all.

    Raises:
        ValueError: as `simmim.data.read_labeled_images`.
    """
    parts = []
    for rows in source.draw_rows(labels_per_class, seed):
        labels = np.repeat(np.arange(len(source.classes)), [len(rows[name]) for name in source.classes])
        parts.append(subsample(Rows(np.array([row for name in source.classes for row in rows[name]]), labels), at_most))
    return Draw(seed, *parts)


def subsample(part: Rows, at_most: int | None) -> Rows:
    """Every so manieth row, from the first to the last; as they are class by class, each class keeps its share."""
    if at_most is None or len(part.rows) <= at_most:
        return part
    kept = np.linspace(0, len(part.rows) - 1, at_most).round().astype(np.int64)
    return Rows(part.rows[kept], part.labels[kept])


class Split(NamedTuple):
    """A draw's vectors, by the features' names (T, D) and (N, D), and labels, (T,) and (N,)."""

    seed: int
    train: dict[str, np.ndarray]
    train_labels: np.ndarray
    test: dict[str, np.ndarray]
    test_labels: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Some rows of a dataset, each once, that several draws take theirs from.

    Attributes:
        data: these rows alone, with the column `image`.
        rows: (N,) int64, ascending, their numbers in the dataset they are of.
    """

    data: datasets.Dataset
    rows: np.ndarray

    def found(self, rows: np.ndarray, embedded: Embeddings) -> tuple[np.ndarray, np.ndarray]:
        """Of the asked rows whether each could be read, (N,) bool, and where those that could are in `embedded`."""
        place = np.full(len(self.rows), -1)
        place[embedded.rows] = np.arange(len(embedded.rows))
        places = place[np.searchsorted(self.rows, rows)]
        return places >= 0, places[places >= 0]


@dataclass(frozen=True)
class Pools:
    """What has to be encoded for some draws: no image twice, and none that no draw has.

    Attributes:
        train, test: may be the same object, where test images are held out of the training part.
    """

    train: Pool
    test: Pool

    @property
    def parts(self) -> tuple[Pool, ...]:
        """The one pool or both."""
        return (self.train,) if self.test is self.train else (self.train, self.test)

    def split(self, drawn: Draw, embedded: Sequence[Embeddings]) -> Split:
        """One draw's vectors and labels, without the images that could not be read.

        Args:
            embedded: of each of `parts`.

        Raises:
            ValueError: when nothing of its training or of its test images could be read, or only one class of the former.
        """
        values = []
        for which, part, pool, found in (
            ("training", drawn.train, self.train, embedded[0]),
            ("test", drawn.test, self.test, embedded[-1]),
        ):
            readable, places = pool.found(part.rows, found)
            if not len(places):
                raise ValueError(f"none of the {len(part.rows)} {which} images of seed {drawn.seed} can be read")
            if which == "training" and len(np.unique(part.labels[readable])) == 1 < len(np.unique(part.labels)):
                path, why = next(iter(found.unreadable.items()))
                raise ValueError(
                    f"the training images of seed {drawn.seed} that can be read are all of one class; of the others the "
                    f"first, {path}: {why}"
                )
            values += [{name: vectors[places] for name, vectors in found.vectors.items()}, part.labels[readable]]
        return Split(drawn.seed, *values)


def pooled(source: LabeledSource, draws: Sequence[Draw]) -> Pools:
    """The images of all draws together."""
    if source.validation is None:
        both = pool(source.train, [part.rows for drawn in draws for part in (drawn.train, drawn.test)])
        return Pools(both, both)
    return Pools(
        pool(source.train, [drawn.train.rows for drawn in draws]),
        pool(source.validation, [drawn.test.rows for drawn in draws]),
    )


def pool(data: datasets.Dataset, rows: Sequence[np.ndarray]) -> Pool:
    """The rows that are in any of `rows`."""
    union = np.unique(np.concatenate(rows))
    return Pool(data.select(union), union)


def embed_pools(
    encoder: Encoder,
    preprocessing: Preprocessing,
    pools: Pools,
    features: Sequence[Vector],
    how: EncoderPass = DEFAULT_PASS,
    progress: Callable[[int], object] | None = None,
) -> list[Embeddings]:
    """Embeddings of each of the pools' parts.

    Raises:
        ValueError: as `embeddings`.
    """
    return [embeddings(encoder, preprocessing, part.data, features, how, progress) for part in pools.parts]


def all_unreadable(embedded: Sequence[Embeddings]) -> Mapping[str, str]:
    """Reason by path of every image that could not be read."""
    return {path: why for part in embedded for path, why in part.unreadable.items()}
