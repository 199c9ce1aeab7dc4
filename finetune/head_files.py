"""A head's files beside its encoder's, of segmentation and detection: where they are, and their weights into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from simmim.checkpoints.fitting import mismatches
from simmim.checkpoints.reading import local_path


class HeadedModel(Protocol):
    """A model whose weights beside the encoder's are a file of their own."""

    def head_state(self) -> dict[str, Tensor]:
        """All weights that are not the encoder's."""
        ...


def find_description(path: str | Path, name: str) -> Path | None:
    """The folder of a model's files: `path` itself or its folder encoder/; None where neither holds the file `name`."""
    path = local_path(path)
    path = path.parent if path.is_file() else path
    return next((folder for folder in (path, path / "encoder") if (folder / name).is_file()), None)


def load_head_state(model: HeadedModel, state: dict[str, Tensor], source: Path) -> None:
    """Put weights into a model's norms and heads, all or none.

    Raises:
        ValueError: when they are not exactly the model's.
    """
    problems = mismatches({name: tuple(value.shape) for name, value in model.head_state().items()}, state)
    if problems:
        raise ValueError(f"{source} does not fit its description: {problems}")
    assert isinstance(model, nn.Module)
    model.load_state_dict(state, strict=False)
