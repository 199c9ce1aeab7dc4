"""The arms of a study: encoders that are fine-tuned alike and compared."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from simmim.finetune.classification.settings import ClassificationSettings


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: as the table shows it.
        settings: of its runs; the study sets data, labels, seed and run folder.
        fingerprint: checksum of the weights that it starts from. Stored results of other weights are not used.
    """

    name: str
    settings: ClassificationSettings
    fingerprint: int = 0


def scratch_settings(settings: ClassificationSettings) -> ClassificationSettings:
    """Settings of the twin from scratch: the same architecture, preprocessing, data and length, without the weights."""
    return replace(settings, init="none", encoder=replace(settings.encoder, like=settings.init))


def pretrained_and_scratch(
    settings: ClassificationSettings, scratch_lr: float, scratch_layer_decay: float
) -> tuple[Arm, Arm]:
    """The encoder of `settings.init` and its twin from scratch, which has its own learning rate and layer decay."""
    scratch = scratch_settings(settings)
    optim = replace(scratch.optim, lr=scratch_lr, layer_decay=scratch_layer_decay)
    return Arm("pre-trained", settings), Arm("from scratch", replace(scratch, optim=optim))


def fingerprint_of(state: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of all weights, in the order of their names."""
    import torch

    checksum = 0
    for _, tensor in sorted(state.items()):
        checksum = zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(), checksum)  # type: ignore[arg-type]
    return checksum
