"""Key tables: our name of each tensor against another format's, one table a format, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import State, shapes_of
from simmim.encoders.swinv2 import SwinV2Config


@dataclass(frozen=True)
class KeyTable:
    """Rows of (our name, their name). {i} is the stage, {j} the block, {next} the stage after; a name of theirs with a
    choice, "self.(query|key|value).weight", stands for tensors that are ours when joined along their first axis. Names
    outside the encoder, `pretraining` and `head`, stand in tables of their own."""

    encoder: tuple[tuple[str, str], ...]
    pretraining: tuple[tuple[str, str], ...] = ()
    head: tuple[tuple[str, str], ...] = ()

    def names(self, config: SwinV2Config) -> dict[str, tuple[str, ...]]:
        """Every tensor of an encoder: our name to theirs, one or several."""
        ours, theirs = list(shapes_of(config)), {}
        for our_name in ours:
            stage, block = (re.search(pattern, our_name) for pattern in (r"layers\.(\d+)", r"blocks\.(\d+)"))
            i, j = (int(found[1]) if found else -1 for found in (stage, block))
            template = re.sub(r"layers\.\d+", "layers.{i}", re.sub(r"blocks\.\d+", "blocks.{j}", our_name))
            row = next((their for our, their in self.encoder if our == template), None)
            if row is not None:
                theirs[our_name] = tuple(name.format(i=i, j=j, next=i + 1) for name in choices(row))
        missing = [name for name in ours if name not in theirs]
        if missing:
            raise ValueError(
                f"this format has no place for {missing[0]} and {len(missing) - 1} more: extra norms on the main path (huge "
                "and giants) are for the formats safetensors and official alone"
            )
        return theirs

    def from_ours(self, state: State, config: SwinV2Config, prefix: str = "") -> State:
        """An encoder's weights under their names."""
        theirs = {}
        for our_name, names in self.names(config).items():
            for name, part in zip(names, state[our_name].chunk(len(names))):
                theirs[prefix + name] = part
        return theirs

    def to_ours(self, tensors: Mapping[str, Tensor], config: SwinV2Config, prefix: str = "") -> tuple[State, list[str]]:
        """As many of an encoder's weights as `tensors` has, under our names; and the names that nothing was made of.

        Raises:
            ValueError: when parts of one of our tensors do not go together.
        """
        state, used = {}, set()
        for our_name, names in self.names(config).items():
            names = [prefix + name for name in names]
            if all(name in tensors for name in names):
                used.update(names)
                parts = [tensors[name] for name in names]
                if any(part.shape != parts[0].shape for part in parts):
                    shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(names, parts))
                    raise ValueError(f"{shapes} are parts of {our_name} and differ in shape")
                state[our_name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return state, [name for name in tensors if name not in used]


def all_or_none(rows: tuple[tuple[str, str], ...], tensors: Mapping[str, Tensor], source: Path) -> State:
    """Tensors that are of use together, under our names; {} where a file holds none of them.

    Raises:
        ValueError: naming what is missing where it holds some.
    """
    found = {ours: tensors[theirs] for ours, theirs in rows if theirs in tensors}
    missing = [theirs for ours, theirs in rows if ours not in found]
    if found and missing:
        beside = ", ".join(theirs for ours, theirs in rows if ours in found)
        raise ValueError(f"{source} holds {beside} and no {', '.join(missing)}: expected all or none; fetch it again")
    return found


def choices(name: str) -> list[str]:
    """ "a.(b|c).d" as "a.b.d" and "a.c.d"."""
    found = re.search(r"\(([^)]+)\)", name)
    return [name] if not found else [name.replace(found[0], choice) for choice in found[1].split("|")]


def same(*templates: str) -> tuple[tuple[str, str], ...]:
    """Rows of names that are alike in both formats."""
    return tuple((name, name) for name in templates)


def both(name: str) -> tuple[str, str]:
    """The weight and the bias of a layer."""
    return f"{name}.weight", f"{name}.bias"


def with_suffixes(ours: str, theirs: str) -> tuple[tuple[str, str], ...]:
    """Rows for the weight and the bias of a layer."""
    return tuple(zip(both(ours), both(theirs)))
