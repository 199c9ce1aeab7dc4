"""The unlabeled images of a run: opened, and cleared of those that are labeled or that judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from simmim.data import measure_images, open_images
from simmim.data.decode import STRETCHED
from simmim.data.duplicates import RowDigests
from simmim.data.labels import class_indices
from simmim.messages import counted
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

UNKNOWN = -1


class Labels(Protocol):
    """What learns and what judges: labeled images, or scenes.

    Attributes:
        train, validation: column `image`, undecoded, and `label` where an image has a class.
    """

    @property
    def train(self) -> datasets.Dataset: ...

    @property
    def validation(self) -> datasets.Dataset: ...


@dataclass(frozen=True)
class UnlabeledImages:
    """The unlabeled images of a run.

    Attributes:
        images: columns `image`, undecoded, and `label`: the true class where the labeled source happens to tell it, for
            the log alone, else −1.
        num_labeled: images left out because the run learns from their labels.
        num_judging: images left out because they are validation images.
        channels: of the images.
        decoded_mib: estimated size of all images decoded.
        digests: hashes of the files of all images of the source that do not judge, those left out as labeled among them.
    """

    images: datasets.Dataset
    num_labeled: int
    num_judging: int
    channels: int
    decoded_mib: float
    digests: frozenset[bytes] = field(default=frozenset(), repr=False)

    def lines(self) -> list[str]:
        """Their number and what was left out, for the user to read."""
        counts = {"labeled": self.num_labeled, "validation": self.num_judging}
        left_out = [
            f"{count:,} of the unlabeled images are {kind} ones and left out" for kind, count in counts.items() if count
        ]
        return ["; ".join([f"{counted(len(self.images), 'unlabeled image')}", *left_out])]


def open_unlabeled(
    path: str,
    labels: Labels,
    everything: Labels,
    reading: Reading = STRETCHED,
    column: str | None = None,
) -> UnlabeledImages:
    """The images at `path` whose files are identical to no labeled and no validation image.

    Args:
        path: a folder of images, or any other source that pre-training reads.
        labels: what the run learns from, and what judges it.
        everything: the whole labeled source, before labels are drawn and folds are held out. Its validation images judge
            too; its other images may be among the unlabeled ones.
        reading: how values become pictures, as for the labeled images.
        column: of images, in sources that have columns; detected by default.

    Raises:
        ValueError: when there are no images or no such column at `path`, none is left, or none can be read.
    """
    images = open_images(path, column, reading, setting="data.unlabeled_column")
    digests = file_digests(images)
    labeled = set(file_digests(labels.train))
    judging = set(file_digests(labels.validation) + file_digests(everything.validation))
    is_labeled = np.array([digest in labeled for digest in digests])
    is_judging = np.array([digest in judging for digest in digests]) & ~is_labeled
    kept = np.flatnonzero(~is_labeled & ~is_judging)
    if not len(kept):
        raise ValueError(
            f"data.unlabeled: all {counted(len(images), 'image')} of {path!r} are labeled or validation images: give others"
        )
    class_of = {}
    if "label" in everything.train.column_names:
        class_of = dict(zip(file_digests(everything.train), class_indices(everything.train).tolist()))
    known = [class_of.get(digest, UNKNOWN) for digest in digests]
    # In this order no image is copied.
    rows = images.add_column("label", known).select(kept)
    measured = measure_images(rows, reading=reading)
    counts = int(is_labeled.sum()), int(is_judging.sum())
    return UnlabeledImages(rows, *counts, measured.channels, measured.decoded_mib, frozenset(digests) - judging)


def check_channels(unlabeled: UnlabeledImages, channels: int) -> None:
    """Refuse unlabeled images that the encoder cannot read.

    Args:
        channels: of the encoder. Gray and color stand in for one another.

    Raises:
        ValueError: with both numbers.
    """
    if unlabeled.channels != channels and not {unlabeled.channels, channels} <= {1, 3}:
        raise ValueError(
            f"data.unlabeled has images of {counted(unlabeled.channels, 'channel')}, the encoder reads {channels}: give "
            "unlabeled images of the same kind as the labeled ones"
        )


def file_digests(images: datasets.Dataset) -> list[bytes]:
    """A hash of each image's file. A missing file equals no other."""
    digests = map(RowDigests(images).digest, range(len(images)))
    return [digest if any(digest) else f"missing: {id(images)}/{row}".encode() for row, digest in enumerate(digests)]
