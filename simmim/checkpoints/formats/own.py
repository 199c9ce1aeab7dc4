"""This toolkit's own folder as a format. It holds every encoder, every method's weights and a classifier, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER, ExportOptions, Format
from simmim.checkpoints.own_files import WEIGHTS, read_checkpoint, save_checkpoint
from simmim.checkpoints.source import Source


class OwnFormat(Format):
    """encoder.safetensors and what lies beside it (`simmim.checkpoints.own_files`)."""

    name = "safetensors"
    title = "this toolkit"
    library = "simmim"
    weight_names = (WEIGHTS,)
    methods = None
    keeps_everything = True
    attentive_heads = True
    prefers_pretraining = True

    def detect(self, source: Source) -> bool:
        return source.file.name == WEIGHTS

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        return read_checkpoint(source.folder)

    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        save_checkpoint(folder, checkpoint)

    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        classes = (
            "\n\nfrom simmim.finetune import load_classifier\n\n"
            f"classifier = load_classifier({path!r})\n"
            "classes = [classifier.classes[number] for number in classifier.model(images).argmax(dim=1)]"
        )
        return (
            "import torch\n"
            "from simmim.checkpoints import read_encoder\n\n"
            f"saved = read_encoder({path!r})\n"
            "height, width = saved.preprocessing.image_size\n"
            "# Your images, normalized by saved.preprocessing:\n"
            "images = torch.randn(1, saved.encoder.config.in_channels, height, width)\n"
            "features = saved.encoder.features(images)  # (batch, channels)"
        ) + (classes if form == CLASSIFIER else "")
