"""What a folder's model card tells of the training, and what the rows of all libraries share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.source import Source
from simmim.encoders.base import State

CARD = "README.md"
# A line of a card, "- **Pretrain Dataset:** LVD-142M", as timm's cards have it.
DATASET_LINE = re.compile(r"^\W*(?:pretrain(?:ing)? )?datasets?\W*:\W*(.+?)\W*$", re.IGNORECASE | re.MULTILINE)
SINGLE_FILE = ".safetensors"


def holds_safetensors(source: Source) -> bool:
    """Whether the weights are safetensors, one file or shards. Others are not read: they might run code."""
    return source.file.suffix == SINGLE_FILE or source.file.name.endswith(f"{SINGLE_FILE}.index.json")


def refuse_export(checkpoint: Checkpoint, title: str) -> None:
    """Refuse a format of another library.

    Raises:
        ValueError: always, naming what can be done.
    """
    options = checkpoint.config.as_dict()
    raise ValueError(
        f"{options['architecture']} of {options['library']} is written in this toolkit's format alone, not {title}'s: "
        "export as safetensors"
    )


def named_as_ours(state: Mapping[str, Any]) -> State:
    """A network's weights under the names of the encoder that holds it, as float32."""
    return {f"network.{name}": value.detach() for name, value in state.items()}


def check_complete(missing: Iterable[str], source: Source) -> None:
    """Refuse weights of which the network lacks some.

    Raises:
        ValueError: naming them.
    """
    missing = list(missing)
    if missing:
        more = ", …" if len(missing) > 3 else ""
        raise ValueError(
            f"{source.file} lacks {len(missing)} weights of the network ({', '.join(missing[:3])}{more}): fetch it again, "
            "or correct its config.json"
        )


def origin_of(library: str, architecture: str, folder: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a network: the library, and what its model card tells.

    Args:
        extra: further entries; None for unknown ones, which are left out.
    """
    front, text = read_card(folder / CARD)
    datasets = front.get("datasets") or []
    named = [datasets] if isinstance(datasets, str) else [str(name) for name in datasets]
    named = named or list(dict.fromkeys(match[1] for match in DATASET_LINE.finditer(text)))
    entries = {
        "origin": library,
        "architecture": architecture,
        "trained_on": ", ".join(named) or None,
        "license": front.get("license"),
        **extra,
    }
    return {name: value for name, value in entries.items() if value is not None}


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a model card; empty where there is none that can be read."""
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        front = {}
    return front if isinstance(front, dict) else {}, text[match.end() :] if match else text
