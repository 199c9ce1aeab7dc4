"""What formats of other libraries share: tables of rows by encoder family, and this toolkit's description in config.json."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.formats.base import CLASSIFIER, ExportOptions, Format
from simmim.checkpoints.source import CONFIG, DESCRIPTION, Source
from simmim.encoders import registry as encoders
from simmim.encoders.base import Config, State
from simmim.files import write_json


class Rows(ABC):
    """One encoder family in one format: its rows of the format's tables."""

    @abstractmethod
    def detect(self, source: Source) -> bool:
        """Whether a file holds an encoder of this family in this format."""

    @abstractmethod
    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        """As `Format.read`."""

    @abstractmethod
    def state(self, checkpoint: Checkpoint, form: str) -> State:
        """Every tensor of the format's weight file, under the format's names."""

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        """As `Format.fitted`."""
        return checkpoint

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        """As `Format.differences`."""
        return ()


class ForeignFormat(Format):
    """A format of another library that is read, too. Its `families` have `Rows`."""

    families: ClassVar[dict[str, str]]

    def detect(self, source: Source) -> bool:
        return any(rows.detect(source) for rows in self.all_rows())

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        return next(rows for rows in self.all_rows() if rows.detect(source)).read(source, overrides)

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        return self.rows_for(checkpoint.config).fitted(checkpoint)

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        return self.rows_for(checkpoint.config).differences(checkpoint, form)

    @abstractmethod
    def folder_config(self, checkpoint: Checkpoint, form: str, options: ExportOptions) -> dict[str, Any]:
        """The config.json of an exported folder, without this toolkit's description."""

    def write_config(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        """Write config.json."""
        config = self.folder_config(checkpoint, form, options)
        write_json(folder / CONFIG, {**config, DESCRIPTION: description_of(checkpoint, form)})

    def all_rows(self) -> Iterator[Rows]:
        """The rows of every family."""
        return (import_module(module).ROWS for module in self.families.values())


# --- this toolkit's description in config.json -----------------------------------------------------------------------


def description_of(checkpoint: Checkpoint, form: str) -> dict[str, Any]:
    """What this toolkit writes under its key of another library's config.json, so that reading restores what the format has
    no place for."""
    return {
        "architecture": encoders.config_as_dict(checkpoint.config),
        "preprocessing": checkpoint.preprocessing.as_dict(),
        "provenance": checkpoint.provenance,
        "classes": list(checkpoint.classes) if form == CLASSIFIER else [],
    }


def read_description(source: Source, expected: type[Config]) -> tuple[Config, Preprocessing]:
    """The architecture and preprocessing in the description of a folder that this toolkit exported.

    Args:
        expected: the class of configurations of the family whose weights the folder holds.

    Raises:
        ValueError: if they are damaged, or describe another encoder.
    """
    try:
        config = encoders.config_from_dict(source.description["architecture"])
        preprocessing = Preprocessing(**source.description["preprocessing"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source.folder / CONFIG} is damaged ({error}): export the encoder again") from error
    if not isinstance(config, expected):
        title = next(family.title for family in map(encoders.load_family, encoders.FAMILIES) if family.config is expected)
        raise ValueError(f"{source.folder / CONFIG} describes another encoder than the weights, which are a {title}'s")
    return config, preprocessing
