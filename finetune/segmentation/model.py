"""Semantic segmentation: UPerNet on the encoder's stages, cross entropy over pixels, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing, mismatches, read_json, read_tensors, save_encoder, write_tensors
from simmim.data import normalize
from simmim.data.label_maps import ClassScheme
from simmim.encoders.base import Encoder
from simmim.files import write_json
from simmim.finetune.augment.color import ColorSettings, recolor
from simmim.finetune.segmentation.iou import iou_by_class, mean_iou, pixel_accuracy
from simmim.finetune.segmentation.sliding import best_class, dense_logits, enlarged
from simmim.finetune.segmentation.upernet import FCN, POOL_SCALES, UPerNet
from simmim.finetune.settings import OptimSettings
from simmim.training.module import TrainingModule

WEIGHTS, DESCRIPTION = "segmentation.safetensors", "segmentation.json"
SHOWN_IMAGES = 6  # of the first validation batches, in pictures


@dataclass(frozen=True)
class HeadShape:
    """What it takes to build a segmenter's heads.

    Args:
        width: channels of UPerNet; the auxiliary head has half as many, as published.
        norm: as of `UPerNet`.
        dropout: as of `UPerNet`.
        auxiliary: whether there is an auxiliary head.
        pool_scales: as of `UPerNet`.
    """

    width: int = 512
    norm: str = "batch"
    dropout: float = 0.1
    auxiliary: bool = True
    pool_scales: tuple[int, ...] = POOL_SCALES

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool_scales", tuple(self.pool_scales))


class SegmenterOutput(NamedTuple):
    """Logits at resolutions of the encoder's maps.

    Attributes:
        logits: (B, classes, H, W) of the finest map.
        auxiliary: (B, classes, H, W) of the last map but one; None where they are not asked for or there is no such head.
    """

    logits: Tensor
    auxiliary: Tensor | None


class Segmenter(nn.Module):
    """An encoder, a norm on each stage's map, UPerNet on all maps, and in training an auxiliary head on one.

    The last map's norm is the encoder's own; the others' start anew, as all norms do in Swin's published dense predictions.
    """

    def __init__(self, encoder: Encoder, classes: int, shape: HeadShape) -> None:
        super().__init__()
        self.encoder, self.shape = encoder, shape
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in encoder.channels[:-1])
        self.head = UPerNet(encoder.channels, classes, shape.width, shape.norm, shape.pool_scales, shape.dropout)
        self.auxiliary_stage = max(0, len(encoder.channels) - 2)
        channels = encoder.channels[self.auxiliary_stage]
        width = max(16, shape.width // 2)
        self.auxiliary = FCN(channels, classes, width, shape.norm, shape.dropout) if shape.auxiliary else None

    @property
    def classes(self) -> int:
        """How many."""
        return self.head.classify.out_channels

    def forward(self, images: Tensor, with_auxiliary: bool = False) -> Tensor | SegmenterOutput:
        """Normalized images, (B, channels, height, width), to logits, (B, classes, H, W) of the finest map, or to those of
        both heads."""
        maps = self.maps(images)
        logits = self.head(maps)
        if not with_auxiliary:
            return logits
        return SegmenterOutput(logits, None if self.auxiliary is None else self.auxiliary(maps[self.auxiliary_stage]))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The stages' maps, each with its norm, the finest first."""
        output = self.encoder(images, return_stages=True)
        normed = [
            rearrange(norm(rearrange(stage, "b c h w -> b h w c")), "b h w c -> b c h w")
            for norm, stage in zip(self.norms, output.stages)
        ]
        return [*normed, output.features]

    def head_state(self) -> dict[str, Tensor]:
        """All weights that are not the encoder's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}


def pixel_loss(logits: Tensor, masks: Tensor, ignored: int, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy over the pixels that count, weighted by their classes; 0 where none does.

    Args:
        logits: (B, classes, H, W) at any resolution; enlarged to the masks'.
        masks: (B, height, width) numbers of classes, and `ignored`.
        weights: (classes,).
    """
    masks = masks.long()
    total = F.cross_entropy(
        enlarged(logits, masks.shape[1:]),
        masks,
        weight=weights,
        ignore_index=ignored,
        reduction="sum",
        label_smoothing=smoothing,
    )
    counted = masks[masks != ignored]
    count = counted.numel() if weights is None else weights[counted].sum()
    # Not the mean that torch takes: a crop may hold nothing that counts, and 0 / 0 would spoil the step.
    return total / torch.as_tensor(count, device=total.device, dtype=total.dtype).clamp(min=1e-6)


def balanced_weights(pixels: Sequence[int]) -> tuple[float, ...]:
    """One over the root of each class's share of the pixels, with a mean of 1 over the pixels."""
    shares = [count / sum(pixels) for count in pixels]
    weights = [1 / math.sqrt(share) for share in shares]
    mean = sum(share * weight for share, weight in zip(shares, weights))
    return tuple(weight / mean for weight in weights)


@dataclass(frozen=True)
class Shown:
    """One validation image for pictures: (channels, height, width) uint8, and numbers of classes at the mask's size."""

    image: Tensor
    given: Tensor
    predicted: Tensor


class SegmentationFinetuning(TrainingModule):
    """Trains a `Segmenter`, the encoder layer-wise slower than the heads.

    After a validation `confusion` holds its confusion matrix and `shown` its first images.

    Args:
        model: what is trained.
        preprocessing: by whose statistics images are normalized; saved with the model.
        scheme: the classes.
        inference: whole, slide or auto, as of `dense_logits`.
        learning_rate: as a function of the optimizer step, from 0.
        optim: decay, smoothing, clipping.
        auxiliary: weight of the auxiliary head's loss.
        class_weights: of each class in the loss.
        jitter: of colors, see `ColorSettings`.
    """

    def __init__(
        self,
        model: Segmenter,
        preprocessing: Preprocessing,
        scheme: ClassScheme,
        inference: str,
        learning_rate: Callable[[int], float],
        optim: OptimSettings,
        auxiliary: float = 0.4,
        class_weights: Sequence[float] | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model, learning_rate, optim.weight_decay, optim.clip, optim.layer_decay)
        self.preprocessing, self.scheme, self.inference = preprocessing, scheme, inference
        self.label_smoothing, self.auxiliary = optim.label_smoothing, auxiliary
        self.color = ColorSettings(jitter=jitter)
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.counts = MulticlassConfusionMatrix(len(scheme.classes), ignore_index=scheme.ignored_id, validate_args=False)
        self.confusion: Tensor | None = None
        self.shown: list[Shown] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross entropy of both heads over the pixels that count."""
        images = batch["image"]
        if self.color.active:
            images = recolor(images, batch["seed"], [[] for _ in images], self.color)
        normalized = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        output = self.model(normalized, with_auxiliary=True)
        loss = self.loss(output.logits, batch["label_map"])
        if output.auxiliary is not None:
            loss = loss + self.auxiliary * self.loss(output.auxiliary, batch["label_map"])
        self.log("loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """As it is trained by."""
        return pixel_loss(logits, masks, self.scheme.ignored_id, self.class_weights, self.label_smoothing)

    def on_validation_epoch_start(self) -> None:
        """Forget the pictures of the validation before."""
        self.shown = []

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Count pixels by given and predicted class at the masks' own size."""
        images = normalize(batch["image"], self.preprocessing.mean, self.preprocessing.std)
        masks = batch["label_map"].long()
        logits = dense_logits(self.model, images, self.preprocessing.image_size, self.inference)
        predicted = best_class(logits, masks.shape[1:])
        self.counts.update(predicted, masks)
        loss = pixel_loss(logits, masks, self.scheme.ignored_id)
        self.log("validation_loss", loss, on_epoch=True, batch_size=len(images), sync_dist=True)
        for row in range(min(len(images), SHOWN_IMAGES - len(self.shown))):
            self.shown.append(Shown(*(part[row].cpu() for part in (batch["image"], masks, predicted))))

    def on_validation_epoch_end(self) -> None:
        """Mean and by class; of all devices together."""
        self.confusion = self.counts.compute().cpu()
        self.counts.reset()
        values = {"mean_iou": mean_iou(self.confusion), "pixel_accuracy": pixel_accuracy(self.confusion)}
        # Every device has the same numbers already; not to average them would be warned of.
        self.log_dict(values, prog_bar=True, sync_dist=True)
        by_class = zip(self.scheme.classes, iou_by_class(self.confusion).tolist())
        self.log_dict({f"iou/{name}": value for name, value in by_class if not math.isnan(value)}, sync_dist=True)


# --- On disk -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedSegmenter:
    """A segmenter read: the model in evaluation mode, its classes, and how to feed it.

    Attributes:
        short_side: pixels to which images are brought, 0 for as they are.
        inference: whole, slide or auto.
    """

    model: Segmenter
    scheme: ClassScheme
    preprocessing: Preprocessing
    short_side: int
    inference: str

    def logits(self, images: Tensor) -> Tensor:
        """Scores of the classes for every pixel, (B, classes, height, width), to be had as masks by `best_class`.

        Args:
            images: (B, channels, height, width) uint8, at the scale that `short_side` says, on the model's device.
        """
        normalized = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        with torch.inference_mode():
            return dense_logits(self.model, normalized, self.preprocessing.image_size, self.inference)


def save_segmenter(folder: Path, saved: SavedSegmenter, provenance: dict) -> None:
    """Write encoder and heads into `folder`; what loads the encoder alone takes no notice of the heads' files."""
    save_encoder(folder, saved.model.encoder, saved.preprocessing, provenance)
    write_tensors(folder / WEIGHTS, saved.model.head_state())
    description = {
        "task": "segmentation",
        **asdict(saved.scheme),
        "head": asdict(saved.model.shape),
        "short_side": saved.short_side,
        "inference": saved.inference,
    }
    write_json(folder / DESCRIPTION, description)


def holds_segmenter(path: str | Path) -> bool:
    """Whether `path` is a run of segmentation, or what it exported."""
    return segmenter_folder(Path(path).expanduser()) is not None


def segmenter_folder(path: Path) -> Path | None:
    """Where a segmenter's files lie: `path` itself or its folder encoder/."""
    path = path.parent if path.is_file() else path
    return next((folder for folder in (path, path / "encoder") if (folder / DESCRIPTION).is_file()), None)


def load_segmenter(path: str | Path) -> SavedSegmenter:
    """A fine-tuned segmenter, from its run folder or its folder encoder/.

    Raises:
        ValueError: when there is none, or its weights do not fit.
    """
    folder = segmenter_folder(Path(path).expanduser())
    saved = read_encoder(path if folder is None else folder)
    if folder is None:
        raise ValueError(f"{str(path)!r} holds an encoder but no segmenter: give a run of simmim finetune segmentation")
    description = read_json(folder / DESCRIPTION)
    try:
        scheme = ClassScheme(tuple(description["classes"]), tuple(description["values"]), description["ignore_index"])
        shape = HeadShape(**description["head"])
        short_side, inference = description["short_side"], description["inference"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged ({error}): fine-tune again") from error
    model = Segmenter(saved.encoder, len(scheme.classes), shape)
    load_heads(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return SavedSegmenter(model.eval(), scheme, saved.preprocessing, short_side, inference)


def load_heads(model: Segmenter, state: dict[str, Tensor], source: Path) -> None:
    """Put weights into a segmenter's norms and heads, all or none.

    Raises:
        ValueError: when they are not exactly the model's.
    """
    problems = mismatches({name: tuple(value.shape) for name, value in model.head_state().items()}, state)
    if problems:
        raise ValueError(f"{source} does not fit its description: {problems}")
    model.load_state_dict(state, strict=False)
