"""A toy file format, and an example for a new one: weights in a NumPy archive, the description in JSON beside it.

`registry.FORMATS["toy"] = ("toy_format", "ToyFormat")` registers it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simmim.checkpoints import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import check_state
from simmim.checkpoints.formats.base import CLASSIFIER, ENCODER, ExportOptions, Format
from simmim.checkpoints.source import Source
from simmim.encoders.registry import config_as_dict, config_from_dict


class ToyFormat(Format):
    """A folder with toy.npz and toy.json. It holds every encoder and every method's weights."""

    name = "toy"
    title = "toy archives"
    library = "numpy"
    weight_names = ("toy.npz",)
    methods = None

    def detect(self, source: Source) -> bool:
        return source.file.suffix == ".npz"

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        description = json.loads((source.folder / "toy.json").read_text())
        config = config_from_dict(description["architecture"])
        with np.load(source.file) as archive:
            tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
        parts = {
            part: {name.removeprefix(f"{part}:"): value for name, value in tensors.items() if name.startswith(f"{part}:")}
            for part in ("encoder", "pretraining", "head")
        }
        check_state(config, parts["encoder"], source.file)
        return Checkpoint(
            config,
            preprocessing=Preprocessing(**description["preprocessing"]),
            source=source.file,
            format=self.name,
            provenance=description["provenance"],
            method=description["method"],
            classes=tuple(description["classes"]),
            **parts,
        )

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        if checkpoint.config.in_channels == 2:
            raise ValueError("toy archives have no place for two channels: export as safetensors")
        return ("NumPy computes nothing",)

    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        parts = {"encoder": checkpoint.encoder}
        if form == CLASSIFIER:
            parts["head"] = checkpoint.head
        elif form != ENCODER:
            parts["pretraining"] = checkpoint.pretraining
        arrays = {f"{part}:{name}": value.numpy() for part, state in parts.items() for name, value in state.items()}
        np.savez(folder / "toy.npz", **arrays)
        description = {
            "architecture": config_as_dict(checkpoint.config),
            "preprocessing": checkpoint.preprocessing.as_dict(),
            "provenance": checkpoint.provenance,
            "method": checkpoint.method,
            "classes": checkpoint.classes if form == CLASSIFIER else (),
        }
        (folder / "toy.json").write_text(json.dumps(description))

    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        return f"import numpy\n\nweights = numpy.load({path + '/toy.npz'!r})"
