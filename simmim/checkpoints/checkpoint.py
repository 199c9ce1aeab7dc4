"""What a checkpoint is, whatever the file format: an architecture, its weights, and how to use them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from simmim.encoders.base import Encoder, EncoderConfig, State
from simmim.messages import counted
from simmim.methods.registry import default_method
from simmim.reading import Reading


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder's images must look like.

    Args:
        image_size: (height, width) in pixels of the images in training; other sizes work.
        mean, std: one value per channel, for pixel values in [0, 1].
        interpolation: how images are resized: nearest, bilinear, bicubic or lanczos, antialiased.
        crop: share of the sides of the largest central crop that evaluation uses.
        fit: crop, to keep the image's proportions; squash, to resize the whole image to `image_size`.
        views: of an image over which evaluation averages, as of `simmim.data.evaluation_views`: 1, 5 or 10.
        reading: how files become pictures; None where the file does not say, which means as version 0.1 read them, and in
            fine-tuning as suits the labeled images.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop: float = 1.0
    fit: str = "crop"
    reading: Reading | None = None
    views: int = 1

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.reading, dict):  # of a file
            object.__setattr__(self, "reading", Reading(**self.reading))

    @property
    def reading_or_default(self) -> Reading:
        """`reading`, or that of version 0.1."""
        return self.reading or Reading()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file, of which `Preprocessing(**values)` is equal to this."""
        left_out = {"reading": None, "views": 1}  # as in files of before these fields
        return {name: value for name, value in asdict(self).items() if name not in left_out or value != left_out[name]}

    def describe(self) -> str:
        """Channels, size, resizing and values in a few words: "3 channels, 224×224 px, bicubic, central crop 0.875"."""
        height, width = self.image_size
        crop = "central crop" if self.views == 1 else f"{self.views} crops of"
        fit = f"{crop} {self.crop:g}" if self.fit == "crop" else "squashed"
        values = self.reading_or_default.describe()
        text = f"{counted(len(self.mean), 'channel')}, {height}×{width} px, {self.interpolation}, {fit}"
        return f"{text}, {values}" if values else text


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file in any format, under this toolkit's names.

    Tensors may be memory-mapped from the file. While they are in use the file may be replaced, as all of this toolkit's
    writing does, but not overwritten in place. An encoder that is built from a checkpoint has tensors of its own.

    Args:
        config: the encoder's architecture.
        encoder: its weights.
        preprocessing: what its images must look like.
        source: the file or folder that was read.
        format: the file's format, as `simmim.checkpoints.formats.registry` names it.
        provenance: how the weights were made, as far as the file records it.
        method: the method of pre-training that `pretraining` belongs to, as `simmim.methods.registry` names it.
        pretraining: the method's own weights, for instance SimMIM's mask token and decoder; empty if the file has none.
        head: weight (classes, C) and bias (classes,) of a classifier; empty if the file has none.
        classes: the names of the classifier's classes.
        notes: what was concluded and not read, one sentence each.
    """

    config: EncoderConfig
    encoder: State
    preprocessing: Preprocessing
    source: Path
    format: str = "safetensors"
    provenance: dict = field(default_factory=dict)
    method: str = field(default_factory=default_method)
    pretraining: State = field(default_factory=dict)
    head: State = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors. Every tensor of the encoder was loaded; otherwise there is an error and no report.

    Args:
        source: the file or folder that was read.
        format_title: its format in words.
        tensors, values: how many the encoder has.
        adapted: what was changed to fit, one sentence each.
        missing: parts that the file does not have. They start with random values where they are needed.
        unexpected: parts of the file that the encoder does not use.
    """

    source: Path
    format_title: str
    tensors: int
    values: int
    adapted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """A word and a text per line of the report."""
        loaded = (
            f"{self.tensors} of {self.tensors} tensors, {self.values / 1e6:.2f} M values, "
            f"from {self.source} ({self.format_title})"
        )
        return [("loaded", loaded)] + [
            (name, text) for name in ("adapted", "missing", "unexpected") for text in getattr(self, name)
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<10} {text}" for name, text in self.rows())


@dataclass(frozen=True)
class SavedEncoder:
    """An encoder that was read.

    Args:
        encoder: the module, in evaluation mode.
        preprocessing: what its images must look like.
        provenance: how the weights were made.
        checkpoint: everything that the file holds.
        report: what was loaded and what was adapted.
    """

    encoder: Encoder
    preprocessing: Preprocessing
    provenance: dict
    checkpoint: Checkpoint
    report: LoadReport
