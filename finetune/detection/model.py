"""A detector: a feature pyramid on the maps of an encoder's stages, and how it is saved and loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.checkpoints.weight_files import read_safetensors, write_safetensors
from simmim.data import normalize
from simmim.encoders.base import Encoder
from simmim.files import read_json, write_json
from simmim.finetune.detection.inference import Found, find_boxes
from simmim.finetune.detection.pyramid import Predictions, PyramidHead
from simmim.finetune.head_files import find_description, load_head_state

WEIGHTS, DESCRIPTION = "detection.safetensors", "detection.json"


@dataclass(frozen=True)
class HeadShape:
    """What it takes to build a detector's head.

    Args:
        width, convolutions, num_above: as of `PyramidHead`.
    """

    width: int = 256
    convolutions: int = 4
    num_above: int = 0


class Detector(nn.Module):
    """An encoder, a norm on each stage's map, and a pyramid head on all maps.

    The last map's norm is the encoder's own; the others' are fresh, as all norms are in Swin's published dense predictions.
    """

    def __init__(self, encoder: Encoder, num_classes: int, shape: HeadShape) -> None:
        super().__init__()
        self.encoder, self.shape = encoder, shape
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in encoder.channels[:-1])
        self.head = PyramidHead(
            encoder.channels, encoder.strides, num_classes, shape.width, shape.convolutions, shape.num_above
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.head.classify.out_channels

    def forward(self, images: Tensor) -> Predictions:
        """Normalized images, (B, channels, height, width), to predictions of every point."""
        return self.head(self.maps(images))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The stages' maps, each normalized, the finest first."""
        output = self.encoder(images, return_stages=True)
        normalized = [
            rearrange(norm(rearrange(stage, "b c h w -> b h w c")), "b h w c -> b c h w")
            for norm, stage in zip(self.norms, output.stages)
        ]
        return [*normalized, output.features]

    def head_state(self) -> dict[str, Tensor]:
        """All weights that are not the encoder's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}


# --- On disk -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedDetector:
    """A detector as it was read: the model in evaluation mode, its classes, and how to feed it.

    Attributes:
        thresholds: score of each class from which boxes are shown: the one with the best F1 on the validation images.
        short_side: pixels to which the shorter side of an image is resized; 0 keeps images as they are.
        inference: whole, tiles or auto.
    """

    model: Detector
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    preprocessing: Preprocessing
    short_side: int
    inference: str

    def find(self, images: Tensor) -> list[Found]:
        """The boxes in each image, in its pixels, of any score; `thresholds` say which to trust.

        Args:
            images: (B, channels, height, width), uint8 or float32 as the preprocessing reads them, at the scale that
                `short_side` says, on the model's device.
        """
        normalized = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        with torch.inference_mode():
            return find_boxes(self.model, normalized, self.preprocessing.image_size, self.inference)


def save_detector(folder: Path, saved: SavedDetector, provenance: dict) -> None:
    """Write encoder and head into `folder`. Readers of the encoder alone ignore the head's files."""
    save_encoder(folder, saved.model.encoder, saved.preprocessing, provenance)
    write_safetensors(folder / WEIGHTS, saved.model.head_state())
    description = {
        "task": "detection",
        "classes": list(saved.classes),
        "thresholds": list(saved.thresholds),
        "head": asdict(saved.model.shape),
        "short_side": saved.short_side,
        "inference": saved.inference,
    }
    write_json(folder / DESCRIPTION, description)


def find_detector(path: str | Path) -> Path | None:
    """The folder of a detector's files: `path` itself or its folder encoder/; None where neither holds one."""
    return find_description(path, DESCRIPTION)


def load_detector(path: str | Path) -> SavedDetector:
    """A fine-tuned detector, from its run folder or its folder encoder/.

    Raises:
        ValueError: when there is none, or its weights do not fit.
    """
    folder = find_detector(path)
    saved = read_encoder(path if folder is None else folder)
    if folder is None:
        raise ValueError(f"{str(path)!r} holds an encoder but no detector: give a run of simmim finetune detection")
    description = read_json(folder / DESCRIPTION)
    try:
        classes, thresholds = tuple(description["classes"]), tuple(description["thresholds"])
        shape = HeadShape(**description["head"])
        short_side, inference = description["short_side"], description["inference"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged ({error}): fine-tune again") from error
    model = Detector(saved.encoder, len(classes), shape)
    load_head_state(model, read_safetensors(folder / WEIGHTS), folder / WEIGHTS)
    return SavedDetector(model.eval(), classes, thresholds, saved.preprocessing, short_side, inference)
