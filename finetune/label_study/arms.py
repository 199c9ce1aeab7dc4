"""The arms of a study: encoders that are fine-tuned alike and compared, with and without unlabeled images."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from simmim.finetune.label_study.results import Side
from simmim.finetune.label_study.settings import PLAIN, PRETRAINED, SCRATCH, SEMI, StudyFields
from simmim.finetune.settings import Settings, TransferSettings


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: as the table shows it.
        settings: of its runs; the study sets data, labels, seed and run folder.
        fingerprint: checksum of the weights that it starts from. Stored results of other weights are not used.
        start: what it starts from, as the table shows it; by default its name.
        recipe: plain, or semi with unlabeled images.
        rates_of: name of the arm whose rates it takes; by default it chooses its own.
        pools: seeds that share no training image, of scenes; by default they may.
    """

    name: str
    settings: Any  # of the task's class
    fingerprint: int = 0
    start: str = ""
    recipe: str = PLAIN
    rates_of: str = ""
    pools: Sequence[int] = ()

    @property
    def side(self) -> Side:
        """Start and recipe."""
        return Side(self.start or self.name, self.recipe)


def scratch_settings(settings: Settings) -> Settings:
    """Settings of the twin from scratch: the same architecture, preprocessing, data and length, without the weights."""
    return replace(settings, init="none", encoder=replace(settings.encoder, like=settings.init))


def pretrained_and_scratch(settings: TransferSettings, scratch_lr: float, scratch_layer_decay: float) -> tuple[Arm, Arm]:
    """The encoder of `settings.init` and its twin from scratch, which has its own learning rate and layer decay."""
    scratch = scratch_settings(settings)
    optim = replace(scratch.optim, lr=scratch_lr, layer_decay=scratch_layer_decay)
    return Arm(PRETRAINED, settings), Arm(SCRATCH, replace(scratch, optim=optim))


def build_arms(settings: StudyFields, fingerprints: Mapping[str, int], recipes: Sequence[str] = ()) -> list[Arm]:
    """The arms of each recipe, in each recipe one per encoder, and one from scratch where it is asked for.

    Args:
        fingerprints: of the encoders' weights, by the names of the starts.
        recipes: by default those of the settings.
    """
    arms = []
    for recipe in recipes or settings.recipes:
        run = settings.recipe_settings(recipe)
        starts = {start: replace(run, init=path) for start, path in settings.start_names().items()}
        if settings.scratch:
            starts[SCRATCH] = scratch_settings(run)  # its architecture is that of the first start
        for start, chosen in starts.items():
            name = start if recipe == PLAIN else f"{start} {recipe}"
            rates_of = start if recipe == SEMI and not settings.tune_arms else ""
            pools = tuple(settings.all_seeds) if settings.disjoint else ()
            fingerprint = fingerprints[PRETRAINED if start == SCRATCH else start]
            arms.append(Arm(name, chosen, fingerprint, start, recipe, rates_of, pools))
    return arms


def fingerprint_of(state: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of all weights, in the order of their names."""
    import torch

    checksum = 0
    for _, tensor in sorted(state.items()):
        checksum = zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(), checksum)  # type: ignore[arg-type]
    return checksum
