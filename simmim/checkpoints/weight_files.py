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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from simmim.encoders.base import State
from simmim.execution import at_least_float32
from simmim.files import atomic_write, read_json

PICKLE_START = b"\x80"
INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class WeightFile:
    """The content of one file: its tensors by name, and the values stored beside them, such as a training configuration."""

    source: Path
    tensors: State
    values: dict = field(default_factory=dict)


# The only names that a file may ask for besides tensors and containers. They build values and can do nothing else. A yacs
# configuration node is a dict with settings of its own; it is read as a plain dict with these settings as attributes.
SAFE_GLOBALS: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), (set, "__builtin__.set"), (set, "builtins.set")]


def read_weight_file(path: Path) -> WeightFile:
    """Tensors and values of a safetensors file, an index of shards, or a PyTorch file of any version.

    Raises:
        ValueError: if the file is none of these, is damaged, holds no tensors, or would run code.
    """
    if path.name.endswith(".index.json"):
        return WeightFile(path, read_shards(path))
    with path.open("rb") as file:
        start = file.read(9)
    if zipfile.is_zipfile(path) or start[:2] == b"PK" or start[:1] == PICKLE_START:
        return extract_weights(read_torch_file(path), path)
    if len(start) == 9 and start[8:9] == b"{":
        return WeightFile(path, read_safetensors(path))
    if path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".ckpt"):
        raise ValueError(f"{path} is not a whole weight file: expected safetensors or a PyTorch checkpoint; fetch it again")
    raise ValueError(f"{path} is no weight file: expected safetensors or a PyTorch checkpoint (.pth, .pt, .bin)")


# --- safetensors -----------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> State:
    """All tensors of a safetensors file, half precisions as float32.

    Raises:
        ValueError: if the file is damaged or is not safetensors.
    """
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): export the encoder again") from error
    return {name: half_to_float32(value) for name, value in state.items()}


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Tensors to a safetensors file, atomically.

    Raises:
        OSError: if the disk is full, for instance.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(state, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def half_to_float32(value: Tensor) -> Tensor:
    """Half precisions as float32; everything else unchanged."""
    return at_least_float32(value) if value.is_floating_point() else value


def read_shards(index: Path) -> State:
    """The tensors that an index lists, from its shards.

    Raises:
        ValueError: if the index lists no tensors, or a tensor is not where the index says.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, Mapping) or not shard_of:
        raise ValueError(f"{index} lists no weights: expected a weight_map from tensor names to files")
    tensors: State = {}
    for shard in sorted(set(shard_of.values())):
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index} names {shard}, which is not beside it: fetch all files of the folder")
        tensors |= read_weight_file(index.parent / shard).tensors
    absent = [name for name in shard_of if name not in tensors]
    if absent:
        raise ValueError(f"{index} promises {', '.join(absent[:3])}, which no shard holds: fetch the folder again")
    return tensors


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`, read by an interpreter that knows tensors and containers only.

    Raises:
        ValueError: if the file is damaged, or asks for more than tensors and containers.
    """
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            # Mapped, so that an optimizer's state, twice the size of the weights, is never read.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(explain_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole PyTorch file ({first[:120]}): fetch it again") from None


def explain_refusal(path: Path, message: str) -> str:
    """Why unpickling stopped, in one line."""
    match = re.search(r"(?:global|GLOBAL) (\S+)", message) or re.search(r"function (\S+)", message)
    function = match[1].rstrip(".,") if match else None
    if function:
        return f"{path} asks to call {function} when it is read, which plain weights do not: refused, and nothing was run"
    return f"{path} is not a whole PyTorch file, or asks for more than plain weights need: fetch it again"


def extract_weights(content: Any, path: Path) -> WeightFile:
    """The weights in the content of a PyTorch file, and the rest as values.

    Raises:
        ValueError: if there are none.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected weights by name")
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(content.get(name), Mapping) and holds_tensors(content[name]):
            return WeightFile(path, extract_tensors(content[name]), {key: content[key] for key in content if key != name})
    if holds_tensors(content):
        return WeightFile(path, extract_tensors(content))
    optimizer_keys = {"optimizer", "optimizer_states", "param_groups", "lr_scheduler"}
    if optimizer_keys & content.keys() or "state" in content:
        raise ValueError(f"{path} holds the state of an optimizer and no model: give the file of the model")
    keys = ", ".join(map(str, list(content)[:5]))
    raise ValueError(f"{path} holds no weights: expected tensors by name, found {keys or 'nothing'}")


def holds_tensors(content: Mapping) -> bool:
    """Whether more than half of the values are tensors."""
    return sum(isinstance(value, Tensor) for value in content.values()) * 2 > len(content) > 0


def extract_tensors(content: Mapping) -> State:
    """The tensors, half precisions as float32, without the prefix that data-parallel training or compiling adds."""
    tensors = {str(name): half_to_float32(value.detach()) for name, value in content.items() if isinstance(value, Tensor)}
    wrappers = ("module.", "_orig_mod.")
    while tensors and (prefix := next((one for one in wrappers if all(name.startswith(one) for name in tensors)), None)):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def as_plain_values(value: Any) -> Any:
    """Nested values as dicts, lists, text and numbers."""
    if isinstance(value, Mapping):
        return {str(key): as_plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_plain_values(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=str)
