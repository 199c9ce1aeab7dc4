"""Predictions of a fine-tuned classifier for a folder of images, to CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from simmim.data import open_images
from simmim.encoders.base import EncoderConfig, EncoderOutput
from simmim.encoders.heads import head_input
from simmim.evaluate import EncoderPass, embed_batches
from simmim.evaluate.single_files import see_crops, suit_model
from simmim.files import atomic_write
from simmim.finetune.classification.model import SavedClassifier, load_classifier
from simmim.messages import counted
from simmim.training.devices import device_type


def predict(
    run: str | Path,
    images: str | Path,
    out: str | Path,
    batch_size: int = 64,
    workers: int | None = None,
    views: int | None = None,
    crop: float | None = None,
) -> tuple[int, dict[str, str]]:
    """Classify every image of a source and write path, class and probabilities to `out`, a row per image, in the source's
    order.

    Args:
        run: a run of `simmim finetune`, its folder encoder/, or a classifier in any format that `load_encoder` reads.
        images: a folder, or any other source of images that pre-training reads.
        out: CSV file to write, whole or not at all; must not exist yet.
        batch_size: images per forward pass.
        workers: processes that load images; by default what suits the machine.
        views, crop: the crops of each image over which logits are averaged, as of `see_crops`; by default as the classifier
            was judged.

    Returns:
        The number of classified images, and by path why each other image could not be read.

    Raises:
        ValueError: when `run` is no classifier, there are no images, none can be read, or `out` exists.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    encoder_pass = EncoderPass(batch_size, workers, device_type())
    saved = see_crops(suit_model(load_classifier(run), images), views, crop)
    source = open_images(images, reading=saved.preprocessing.reading_or_default)
    count = 0
    unreadable: dict[str, str] = {}
    with atomic_write(out) as temporary:
        with (
            temporary.open("w", newline="", encoding="utf-8") as file,
            tqdm(total=len(source), desc="predicting", unit="image") as bar,
        ):
            writer = csv.writer(file)
            writer.writerow(["path", "class", *(f"probability {name}" for name in saved.classes)])
            for paths, probabilities, not_read in classify(saved, source, encoder_pass):
                writer.writerows(prediction_rows(paths, probabilities, saved.classes))
                count += len(paths)
                unreadable |= dict(not_read)
                bar.update(len(paths) + len(not_read))
        if not count:
            path, reason = next(iter(unreadable.items()))
            raise ValueError(f"none of {counted(len(unreadable), 'image')} can be read; the first, {path}: {reason}")
    return count, unreadable


@dataclass(frozen=True)
class HeadInput:
    """What a classifier's linear layer reads, as a feature of the last map (`simmim.evaluate.Feature`)."""

    head: nn.Linear
    stage: ClassVar[None] = None  # needs no map before the last
    name: ClassVar[str] = "head"

    def dim(self, config: EncoderConfig) -> int:
        """Values of the vector."""
        return self.head.in_features

    def extract(self, images: Tensor, output: EncoderOutput) -> Tensor:
        """The vectors of a batch, (B, D) float32."""
        return head_input(self.head.to(images.device), output).float()


def classify(
    saved: SavedClassifier, source, encoder_pass: EncoderPass
) -> Iterator[tuple[list[str], Tensor, list[tuple[str, str]]]]:
    """Batch by batch: paths, probabilities, (B, classes) float32 on the CPU, and (path, reason) of unreadable images.

    The head is applied to vectors as of `simmim embed`, so that both see images alike.
    """
    head = saved.model.head
    feature = HeadInput(head)
    for batch in embed_batches(saved.model.encoder, saved.preprocessing, source, (feature,), encoder_pass):
        with torch.inference_mode():
            probabilities = head(torch.from_numpy(batch.vectors[feature.name]).to(head.weight)).softmax(dim=1)
        yield batch.paths, probabilities, batch.unreadable


def prediction_rows(paths: Sequence[str], probabilities: Tensor, classes: Sequence[str]) -> Iterator[list[str]]:
    """Rows of the CSV file: path, most likely class, probabilities with six digits."""
    for path, best, values in zip(paths, probabilities.argmax(dim=1).tolist(), probabilities.tolist()):
        yield [path, classes[best], *(f"{value:.6f}" for value in values)]
