"""Key tables: this toolkit's name of each tensor and another format's, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from simmim.checkpoints.fitting import shapes_of
from simmim.encoders.base import EncoderConfig, State

Row = tuple[str, str]


@dataclass(frozen=True)
class KeyTable:
    """Rows of (our name, their name) for one encoder family in one format.

    {i} and {j} stand for numbers, of a stage and a block for instance; {next} stands for i + 1. A name of theirs with a
    choice, "self.(query|key|value).weight", stands for tensors that are ours when they are joined along the first axis.

    Args:
        encoder: rows of the encoder's tensors.
        pretraining: rows of SimMIM's mask token and decoder, for formats that hold them.
        head: rows of a classifier's head.
    """

    encoder: tuple[Row, ...]
    pretraining: tuple[Row, ...] = ()
    head: tuple[Row, ...] = ()

    def names(self, config: EncoderConfig) -> dict[str, tuple[str, ...]]:
        """Every tensor of an encoder: our name to theirs, one or several.

        Raises:
            ValueError: if the format has no place for a tensor.
        """
        names = {our_name: self.their_names(our_name) for our_name in shapes_of(config)}
        missing = [our_name for our_name, theirs in names.items() if not theirs]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"this format has no place for {missing[0]}{more}: export as safetensors")
        return names

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], str]]:
        """The rows of `encoder` with a pattern for our name: "{i}" matches a number."""

        def pattern(ours: str) -> re.Pattern[str]:
            return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(ours)))

        return [(pattern(ours), theirs) for ours, theirs in self.encoder]

    def their_names(self, our_name: str) -> tuple[str, ...]:
        """What one tensor of ours is called; empty if there is no row for it."""
        for pattern, theirs in self.patterns:
            match = pattern.fullmatch(our_name)
            if match:
                numbers = {letter: int(number) for letter, number in match.groupdict().items()}
                numbers["next"] = numbers.get("i", 0) + 1
                return tuple(name.format(**numbers) for name in choices(theirs))
        return ()

    def from_ours(self, state: State, config: EncoderConfig, prefix: str = "") -> State:
        """An encoder's weights under their names."""
        theirs = {}
        for our_name, names in self.names(config).items():
            for name, part in zip(names, state[our_name].chunk(len(names))):
                theirs[prefix + name] = part
        return theirs

    def to_ours(self, tensors: Mapping[str, Tensor], config: EncoderConfig, prefix: str = "") -> tuple[State, list[str]]:
        """The encoder's weights in `tensors` under our names, all that are there; and the names that are left over.

        Raises:
            ValueError: if parts of one of our tensors differ in shape.
        """
        state: State = {}
        used: set[str] = set()
        for our_name, names in self.names(config).items():
            prefixed = [prefix + name for name in names]
            if all(name in tensors for name in prefixed):
                used.update(prefixed)
                parts = [tensors[name] for name in prefixed]
                if any(part.shape != parts[0].shape for part in parts):
                    shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(prefixed, parts))
                    raise ValueError(f"{shapes} are parts of {our_name} and differ in shape")
                state[our_name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return state, [name for name in tensors if name not in used]


def all_or_none(rows: tuple[Row, ...], tensors: Mapping[str, Tensor], source: Path) -> State:
    """Tensors that are useful only together, under our names; {} if a file holds none of them.

    Raises:
        ValueError: naming what is missing, if the file holds only some.
    """
    state = {ours: tensors[theirs] for ours, theirs in rows if theirs in tensors}
    missing = [theirs for ours, theirs in rows if ours not in state]
    if state and missing:
        present = ", ".join(theirs for ours, theirs in rows if ours in state)
        raise ValueError(f"{source} holds {present} and no {', '.join(missing)}: expected all or none; fetch it again")
    return state


def prefix_of(tensors: Mapping[str, Tensor], anchor: str) -> str:
    """What stands before the encoder's names, in front of `anchor`, the end of a name that every encoder has."""
    return next(name for name in tensors if name.endswith(anchor)).removesuffix(anchor)


def choices(name: str) -> list[str]:
    """ "a.(b|c).d" as "a.b.d" and "a.c.d"."""
    match = re.search(r"\(([^)]+)\)", name)
    return [name] if not match else [name.replace(match[0], choice) for choice in match[1].split("|")]


def same_names(*templates: str) -> tuple[Row, ...]:
    """Rows of names that are alike in both formats."""
    return tuple((name, name) for name in templates)


def weight_and_bias(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of the weight and the bias of a layer."""
    return tuple((f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias"))
