"""A classifier: a head on an encoder, and how it is saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.encoders.base import Encoder
from simmim.encoders.heads import build_head, head_input, head_of


class Classifier(nn.Module):
    """An encoder and a head on it: a linear layer on the pooled features, or on what queries gather of the last map.

    Args:
        head: one of `HEADS`, for a fresh one; or a head.
    """

    def __init__(self, encoder: Encoder, num_classes: int, head: str | nn.Linear = "linear") -> None:
        super().__init__()
        self.encoder = encoder
        self.head = build_head(head, encoder.dim, num_classes) if isinstance(head, str) else head

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images, (B, channels, height, width), to logits, (B, classes)."""
        return self.head(head_input(self.head, self.encoder(images)))


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier as it was read: the model in evaluation mode, the names of its classes, and how to feed it."""

    model: Classifier
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def save_classifier(
    folder: Path, model: Classifier, classes: tuple[str, ...], preprocessing: Preprocessing, provenance: dict
) -> None:
    """Write encoder and head into `folder`. Readers of the encoder alone ignore the head's files."""
    save_encoder(folder, model.encoder, preprocessing, provenance, head=model.head.state_dict(), classes=classes)


def load_classifier(path: str | Path) -> SavedClassifier:
    """A fine-tuned classifier, in evaluation mode, from its run folder or from a classifier in any format that
    `simmim.load_encoder` reads.

    Raises:
        ValueError: when there is none, or its weights do not fit.
    """
    saved = read_encoder(path)
    head, classes = saved.checkpoint.head, saved.checkpoint.classes
    if not head:
        raise ValueError(f"{str(path)!r} holds an encoder but no classifier: give a run of simmim finetune")
    model = Classifier(saved.encoder, len(classes), head_of(head, saved.encoder.dim))
    return SavedClassifier(model.eval(), classes, saved.preprocessing)
