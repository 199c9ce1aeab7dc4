"""The protocol between file formats and the rest of the toolkit.

Reading, export, model cards and inspection go through `Format` and know no format by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.source import Source
from simmim.encoders import registry as encoders
from simmim.encoders.base import EncoderConfig
from simmim.encoders.heads import is_attentive
from simmim.methods.registry import METHODS, method_named

# Forms are what an exported folder holds: the encoder alone, a classifier, or, under the name of a method of pre-training,
# the encoder and that method's own weights.
ENCODER, CLASSIFIER = "encoder", "classifier"


def form_names() -> tuple[str, ...]:
    """Every form that some format can hold."""
    return (ENCODER, *METHODS, CLASSIFIER)


@dataclass(frozen=True)
class ExportOptions:
    """What an export may be asked for beside its form; a format uses what applies to it.

    Args:
        license: for the folder's description.
        features: of ONNX: pooled, or stages for every stage's map.
        dynamic_size: of ONNX: images of any size.
    """

    license: str = "unknown"
    features: str = "pooled"
    dynamic_size: bool = False


class Format(ABC):
    """One file format.

    Attributes:
        name: as it stands in settings and files.
        title: as it stands in texts: "transformers".
        library: what loads the folder, as model hubs name it.
        weight_names: names of the format's weight files in a folder, the preferred one first.
        families: the encoder families that the format can hold: name to the module that holds its `ROWS` of the format's
            tables. None for a format that holds every family.
        methods: the methods of pre-training whose own weights the format can hold, by name; None for all.
        keeps_everything: whether each form holds all that a checkpoint holds.
        attentive_heads: whether it has a place for attentive heads of classifiers, beside linear ones.
        prefers_pretraining: whether the method's own weights are written unless another form is asked for.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    library: ClassVar[str]
    weight_names: ClassVar[tuple[str, ...]]
    families: ClassVar[dict[str, str] | None] = None
    methods: ClassVar[tuple[str, ...] | None] = ()
    keeps_everything: ClassVar[bool] = False
    attentive_heads: ClassVar[bool] = False
    prefers_pretraining: ClassVar[bool] = False

    def rows_for(self, config: EncoderConfig) -> Any:
        """The rows of an encoder's family in the format's tables.

        Raises:
            ValueError: if the format has no place for the family.
        """
        family = encoders.family_of(config)
        if self.families is None or family.name not in self.families:
            raise ValueError(f"{self.title} has no {family.title} encoder: export as safetensors")
        return import_module(self.families[family.name]).ROWS

    # --- reading -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def detect(self, source: Source) -> bool:
        """Whether a file is of this format."""

    @abstractmethod
    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        """The content of a file that `detect` has recognized.

        Args:
            overrides: fields of the configuration that the user gives, for files that do not store them.

        Raises:
            ValueError: if weights are missing, left over or of another shape, or the architecture is not known.
        """

    # --- writing -----------------------------------------------------------------------------------------------------

    def holds_method(self, name: str) -> bool:
        """Whether the format has a place for the own weights of a method."""
        return self.methods is None or name in self.methods

    def holds_head(self, checkpoint: Checkpoint) -> bool:
        """Whether the format has a place for a head of that kind."""
        return self.attentive_heads or not is_attentive(checkpoint.head)

    def forms(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The forms in which the format can hold `checkpoint`."""
        pretraining = bool(checkpoint.pretraining) and self.holds_method(checkpoint.method)
        return (
            ENCODER,
            *((checkpoint.method,) if pretraining else ()),
            *((CLASSIFIER,) if checkpoint.head and self.holds_head(checkpoint) else ()),
        )

    def default_form(self, checkpoint: Checkpoint) -> str:
        """The form to write unless another is asked for: the classifier if there is one, else what the format is used for
        most."""
        forms = self.forms(checkpoint)
        if CLASSIFIER in forms:
            return CLASSIFIER
        return checkpoint.method if self.prefers_pretraining and checkpoint.method in forms else ENCODER

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint to write: one that computes the same at its image size and whose weights have the shapes that the
        other library expects there.

        Raises:
            ValueError: if there is none.
        """
        return checkpoint

    def limits(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        """What the other library computes or keeps differently than this toolkit, one note each.

        Raises:
            ValueError: if the format cannot represent the model.
        """
        if self.families is not None:
            self.rows_for(checkpoint.config)
        return (*self.differences(checkpoint, form), *self.omissions(checkpoint, form))

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        """The part of `limits` that is the format's own: what the other library computes differently.

        Raises:
            ValueError: as `limits`.
        """
        return ()

    def omissions(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        """The part of `limits` about what the form does not hold."""
        if self.keeps_everything:
            return ()
        notes = []
        if checkpoint.pretraining and form != checkpoint.method:
            notes.append(f"left out: {method_named(checkpoint.method).own_parts}")
        if checkpoint.head and form != CLASSIFIER:
            notes.append("left out: the classifier's head")
        if (views := checkpoint.preprocessing.views) > 1 and form == CLASSIFIER:
            notes.append(f"simmim predict classifies, and validation judged, by the mean over {views} crops of an image")
        return tuple(notes)

    @abstractmethod
    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        """Write the format's files into an empty folder.

        Args:
            checkpoint, form: a pair that `limits` accepts.
        """

    @abstractmethod
    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        """Lines of Python that load the exported folder `path`, ready to paste."""
