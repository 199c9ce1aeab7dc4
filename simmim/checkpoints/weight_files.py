"""Weight files of any origin as plain tensors and plain values. No code that a file brings along is ever run."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import in_full, read_json, read_tensors

PICKLE_START = b"\x80"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFile:
    """One file read: its tensors by name, and the values stored beside them (a training configuration, say)."""

    source: Path
    tensors: dict[str, Tensor]
    values: dict = field(default_factory=dict)


# The only names a checkpoint may mention besides tensors and containers. All build values and can do nothing else. yacs'
# configuration node, a dict with settings of its own, arrives as a plain dict with the node's settings as attributes.
HARMLESS = [(OrderedDict, "yacs.config.CfgNode"), (set, "__builtin__.set"), (set, "builtins.set")]


def read_weight_file(path: Path) -> WeightFile:
    """Tensors and values of a safetensors file, a shards' index, or a PyTorch file of any age.

    Raises:
        ValueError: when the file is none of these, is torn, holds no tensors, or would run code.
    """
    if path.name.endswith(".index.json"):
        return WeightFile(path, sharded(path))
    with path.open("rb") as file:
        start = file.read(9)
    if zipfile.is_zipfile(path) or start[:2] == b"PK" or start[:1] == PICKLE_START:
        return read_torch_file(path)
    if len(start) == 9 and start[8:9] == b"{":
        return WeightFile(path, read_tensors(path))
    if path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".ckpt"):
        raise ValueError(f"{path} is not a whole weight file: expected safetensors or a PyTorch checkpoint; fetch it again")
    raise ValueError(f"{path} is no weight file: expected safetensors or a PyTorch checkpoint (.pth, .pt, .bin)")


def sharded(index: Path) -> dict[str, Tensor]:
    """The tensors that an index lists, each from the shard it names.

    Raises:
        ValueError: when the index lists none, or one is not where it should be.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise ValueError(f"{index} lists no weights: expected a weight_map of tensors' names and files")
    tensors = {}
    for shard in sorted(set(places.values())):
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index} names {shard}, which is not beside it: fetch all files of the folder")
        tensors |= read_weight_file(index.parent / shard).tensors
    absent = [name for name in places if name not in tensors]
    if absent:
        raise ValueError(f"{index} promises {', '.join(absent[:3])}, which no shard holds: fetch the folder again")
    return tensors


def read_torch_file(path: Path) -> WeightFile:
    """A file of `torch.save`.

    Raises:
        ValueError: as `read_weight_file`.
    """
    return unpacked(unpickled(path), path)


def unpickled(path: Path):
    """The content of a file of `torch.save`, read by an interpreter that knows tensors and containers only.

    Raises:
        ValueError: when the file is torn, or asks for more than these.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS):
            # Mapped, so that an optimizer's state, twice the size of the weights, is never read.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole PyTorch file ({first[:120]}): fetch it again") from None


def refusal(path: Path, message: str) -> str:
    """Why unpickling stopped, in one line."""
    named = re.search(r"(?:global|GLOBAL) (\S+)", message) or re.search(r"function (\S+)", message)
    name = named[1].rstrip(".,") if named else None
    if name:
        return f"{path} asks to call {name} when it is read, which plain weights do not: refused, and nothing of it was run"
    return f"{path} is not a whole PyTorch file, or asks for more than plain weights need: fetch it again"


def unpacked(content, path: Path) -> WeightFile:
    """The weights among what was stored, and the rest as values.

    Raises:
        ValueError: when there are none.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected weights by name")
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(content.get(name), Mapping) and holds_tensors(content[name]):
            return WeightFile(path, tensors_of(content[name]), {key: content[key] for key in content if key != name})
    if holds_tensors(content):
        return WeightFile(path, tensors_of(content))
    kinds = {"optimizer", "optimizer_states", "param_groups", "lr_scheduler"}
    if kinds & content.keys() or "state" in content:
        raise ValueError(f"{path} holds the state of an optimizer and no model: give the file of the model")
    keys = ", ".join(map(str, list(content)[:5]))
    raise ValueError(f"{path} holds no weights: expected tensors by name, found {keys or 'nothing'}")


def holds_tensors(content: Mapping) -> bool:
    """Whether a mapping is from names to tensors, wholly or, with a few other values among them, mostly."""
    return sum(isinstance(value, Tensor) for value in content.values()) * 2 > len(content) > 0


def tensors_of(content: Mapping) -> dict[str, Tensor]:
    """Its tensors, half precisions as float32, without the prefix that data-parallel training or compiling leaves."""
    tensors = {str(name): in_full(value.detach()) for name, value in content.items() if isinstance(value, Tensor)}
    wrappers = ("module.", "_orig_mod.")
    while tensors and (prefix := next((one for one in wrappers if all(name.startswith(one) for name in tensors)), None)):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def plain(value):
    """Nested values as plain dicts, lists, text and numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=str)
