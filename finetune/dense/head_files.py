"""A head's files beside its encoder's: its weights, a description, and what a run takes over of its source's head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing, SavedEncoder
from simmim.checkpoints.fitting import mismatches
from simmim.checkpoints.own_files import save_encoder
from simmim.checkpoints.reading import local_path
from simmim.checkpoints.weight_files import read_safetensors, write_safetensors
from simmim.files import read_json, write_json
from simmim.finetune.dense.model import DenseModel
from simmim.finetune.task import ReportLine
from simmim.messages import counted

Parsed = TypeVar("Parsed")


class SavedModel(Protocol):
    """A model as it was read from its files: in evaluation mode, and how to feed it.

    Attributes:
        short_side: pixels to which the shorter side of an image is resized; 0 keeps images as they are.
    """

    @property
    def model(self) -> DenseModel: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def short_side(self) -> int: ...


@dataclass(frozen=True)
class HeadFiles:
    """The files TASK.safetensors and TASK.json of a task beside those of an encoder. Readers of the encoder ignore them.

    Args:
        task: name of the task.
        kind: what its models are called in messages.
    """

    task: str
    kind: str

    @property
    def weights(self) -> str:
        """Name of the file of weights."""
        return f"{self.task}.safetensors"

    @property
    def description(self) -> str:
        """Name of the file that says what the weights are of."""
        return f"{self.task}.json"

    def find(self, path: str | Path) -> Path | None:
        """The folder of a model's files: `path` itself or its folder encoder/; None where neither holds one."""
        path = local_path(path)
        path = path.parent if path.is_file() else path
        return next((folder for folder in (path, path / "encoder") if (folder / self.description).is_file()), None)

    def save(self, folder: Path, saved: SavedModel, description: dict[str, Any], provenance: dict) -> None:
        """Write encoder and head into `folder`.

        Args:
            description: what it takes to build the head again, as plain values.
        """
        save_encoder(folder, saved.model.encoder, saved.preprocessing, provenance)
        write_safetensors(folder / self.weights, saved.model.head_state())
        write_json(folder / self.description, {"task": self.task, **description})

    def read(self, path: str | Path, parse: Callable[[dict[str, Any]], Parsed]) -> tuple[SavedEncoder, Path, Parsed]:
        """The encoder of a model in evaluation mode, the folder of the files, and their description.

        Args:
            path: as of `find`.
            parse: what the description says; raises KeyError or TypeError for one that lacks something.

        Raises:
            ValueError: when there is no model, or its description is damaged.
        """
        folder = self.find(path)
        saved = read_encoder(path if folder is None else folder)
        if folder is None:
            raise ValueError(f"{str(path)!r} holds an encoder but no {self.kind}: give a run of simmim finetune {self.task}")
        try:
            return saved, folder, parse(read_json(folder / self.description))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / self.description} is damaged ({error}): fine-tune again") from error

    def load_weights(self, model: DenseModel, folder: Path) -> None:
        """Put the weights of `folder` into a model's norms and heads, all or none.

        Raises:
            ValueError: when they are not exactly the model's.
        """
        load_head_state(model, read_safetensors(folder / self.weights), folder / self.weights)

    def load_source_head(
        self,
        model: DenseModel,
        source: str,
        classes: tuple[str, ...],
        load: Callable[[str], tuple[DenseModel, tuple[str, ...]]],
        report_line: ReportLine | None,
    ) -> None:
        """Load the head of the model that the encoder was read from, where shape and classes are the same; else keep the
        fresh one. Either is reported. A source without a head is not.

        Args:
            load: reads a model and its classes.
        """
        if self.find(source) is None:
            return
        found, names = load(source)
        if names == tuple(classes) and found.shape == model.shape:
            load_head_state(model, found.head_state(), Path(source))
            text = f"head of the same {counted(len(classes), 'class')} loaded"
        else:
            text = f"head of {counted(len(names), 'class')} replaced by a fresh one of {len(classes)}"
        if report_line:
            report_line(f"adapted    {text}")


def load_head_state(model: DenseModel, state: dict, source: Path) -> None:
    """Put weights into a model's norms and heads, all or none.

    Raises:
        ValueError: when they are not exactly the model's.
    """
    problems = mismatches({name: tuple(value.shape) for name, value in model.head_state().items()}, state)
    if problems:
        raise ValueError(f"{source} does not fit its description: {problems}")
    nn.Module.load_state_dict(model, state, strict=False)
