"""The parts of a foreign file that are not the encoder: a classifier's head, and SimMIM's mask token and decoder.

Other libraries keep the mask token as (1, 1, C) and the decoder as a 1 × 1 convolution; here they are (C,) and linear.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER
from simmim.checkpoints.formats.key_tables import KeyTable, Row, all_or_none
from simmim.checkpoints.weight_files import WeightFile
from simmim.encoders.base import State

SIMMIM = "simmim"  # the method whose weights other libraries have a place for


def read_head(table: KeyTable, tensors: Mapping[str, Tensor], file: WeightFile) -> State:
    """A classifier's weight and bias under the names of a linear layer; {} if there is none.

    Raises:
        ValueError: if only one of the two is there.
    """
    return {name.removeprefix("head."): value for name, value in all_or_none(table.head, tensors, file.source).items()}


def class_names(stored: list | tuple | None, head: State) -> tuple[str, ...]:
    """The stored names of a head's classes; numbers if there are no names or another number of them."""
    if "weight" not in head:
        return ()
    names = tuple(map(str, stored or ()))
    count = len(head["weight"])
    return names if len(names) == count else tuple(f"class {number}" for number in range(count))


def read_simmim(rows: tuple[Row, ...], tensors: Mapping[str, Tensor], file: WeightFile) -> tuple[State, tuple[str, ...]]:
    """Mask token and decoder in our shapes, {} if there is no decoder; and notes.

    Raises:
        ValueError: if some of their tensors are missing.
    """
    their_name = dict(rows)
    if not rows or not any(their_name[part] in tensors for part in ("decoder.weight", "decoder.bias")):
        has_token = any(name.endswith("mask_token") for name in tensors)
        return {}, ("mask token ignored: there is no decoder",) if has_token else ()
    parts = all_or_none(rows, tensors, file.source)
    return {
        "mask_token": parts["mask_token"].flatten(),
        "decoder.weight": parts["decoder.weight"].flatten(1),
        "decoder.bias": parts["decoder.bias"],
    }, ()


def parts_of_form(table: KeyTable, checkpoint: Checkpoint, form: str) -> State:
    """What a form holds beside the encoder, under the format's names and in its shapes."""
    if form == CLASSIFIER:
        return {theirs: checkpoint.head[ours.removeprefix("head.")] for ours, theirs in table.head}
    if form == SIMMIM:
        parts = {
            "mask_token": checkpoint.pretraining["mask_token"].view(1, 1, -1),
            "decoder.weight": checkpoint.pretraining["decoder.weight"][:, :, None, None],
            "decoder.bias": checkpoint.pretraining["decoder.bias"],
        }
        return {theirs: parts[ours] for ours, theirs in table.pretraining}
    return {}
