"""What a path holds, before its format is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from simmim.checkpoints.weight_files import WeightFile, read_weight_file
from simmim.files import read_json

CONFIG = "config.json"
DESCRIPTION = "simmim"  # the key of another library's config.json under which this toolkit keeps what that has no place for


@dataclass(frozen=True)
class Source:
    """A weight file and the folder around it.

    Attributes:
        file: the weight file.
        config: the content of config.json beside it; empty if there is none.
        weights: the file's tensors and values, read when they are first used.
    """

    file: Path

    @property
    def folder(self) -> Path:
        """Where the file is."""
        return self.file.parent

    @cached_property
    def config(self) -> dict:
        path = self.folder / CONFIG
        return read_json(path) if path.is_file() else {}

    @property
    def description(self) -> dict:
        """What this toolkit wrote into config.json when it exported the folder; empty for other folders."""
        return self.config.get(DESCRIPTION) or {}

    @cached_property
    def weights(self) -> WeightFile:
        return read_weight_file(self.file)
