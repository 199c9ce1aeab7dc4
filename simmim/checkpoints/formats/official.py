"""The authors' checkpoints (Swin-Transformer and SimMIM repositories): `.pth` files with `model` and `config`."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import ExportOptions
from simmim.checkpoints.formats.foreign import ForeignFormat, Rows


class OfficialRows(Rows):
    """An encoder family of the authors' repositories."""

    @abstractmethod
    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The part of the authors' training configuration that describes the model, as plain values."""


class OfficialFormat(ForeignFormat):
    """A folder with model.pth, and a config.json of this toolkit beside it where this toolkit has written it."""

    name = "official"
    title = "the authors' code"
    library = "pytorch"
    weight_names = ("model.pth",)
    families: ClassVar[dict[str, str]] = {"swinv2": "simmim.checkpoints.formats.swinv2.official"}
    methods = ("simmim",)
    prefers_pretraining = True

    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        rows: OfficialRows = self.rows_for(checkpoint.config)
        # Clones, because a file holds the whole storage of a tensor.
        weights = {name: value.detach().cpu().clone() for name, value in rows.state(checkpoint, form).items()}
        torch.save({"model": weights, "config": rows.settings(checkpoint)}, folder / "model.pth")
        self.write_config(checkpoint, form, folder, options)

    def folder_config(self, checkpoint: Checkpoint, form: str, options: ExportOptions) -> dict[str, Any]:
        return {"format": self.name}

    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        return (
            "import torch\n\n"
            f"state = torch.load({path + '/model.pth'!r}, weights_only=True)['model']  # for the authors' modules, strictly"
        )
