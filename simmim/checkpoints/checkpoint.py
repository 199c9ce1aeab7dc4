"""Models on disk in this toolkit's own format, and what holds of every format: a whole architecture or an error.

A folder holds `encoder.safetensors` beside a `config.json` that says what it takes to use it; `pretraining.safetensors`,
mask token and decoder, where pre-training may go on; `head.safetensors` and `head.json` after fine-tuning. Files appear
whole or not at all. Other formats are in `simmim.checkpoints`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig, with_fields
from simmim.execution import at_least_float32
from simmim.files import atomic_write, write_json
from simmim.methods.registry import default_method, method_named

WEIGHTS, CONFIG = "encoder.safetensors", "config.json"
PRETRAINING, HEAD, HEAD_CONFIG = "pretraining.safetensors", "head.safetensors", "head.json"
FORMAT = "simmim-swinv2-encoder"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder's images must look like.

    Args:
        image_size: (height, width) in pixels that it was trained at; others work.
        mean, std: one a channel, of values in [0, 1].
        interpolation: how images are resized: nearest, bilinear, bicubic or lanczos, antialiased.
        crop: share of the sides of the largest central crop that evaluation sees.
        fit: crop, to keep the image's proportions; squash, to resize it whole to `image_size`.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop: float = 1.0
    fit: str = "crop"

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was read, under this toolkit's names, from whatever file.

    Its tensors may be mapped from that file: while they are in use a new version takes its place by renaming, as all of this
    toolkit's files do, and is not written into it. Those of an encoder that was built are its own.

    Args:
        config: the encoder's architecture.
        encoder: its weights.
        preprocessing: what its images must look like.
        source: the file or folder it was read from.
        format: simmim, official, timm or hf.
        provenance: where it comes from, as far as the file tells.
        pretraining: the method's own weights, SimMIM's mask token and decoder for instance; empty where the file holds none.
        head: weight (classes, C) and bias (classes,) of a classifier; empty where the file holds none.
        classes: the head's class names.
        notes: what was concluded rather than read, a sentence each.
        method: the method of pre-training that `pretraining` belongs to, as `simmim.methods.registry` names it.
    """

    config: EncoderConfig
    encoder: State
    preprocessing: Preprocessing
    source: Path
    format: str = "simmim"
    provenance: dict = field(default_factory=dict)
    pretraining: State = field(default_factory=dict)
    head: State = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    method: str = "simmim"


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors: of the encoder's all are loaded, or there is an error and no report.

    Args:
        source, format: where they are from.
        tensors, values: how many make up the encoder.
        adapted: what was changed to fit, a sentence each.
        missing: parts that the file does not hold and that start anew where they are needed.
        unexpected: parts that the file holds and the encoder has no use for.
    """

    source: Path
    format: str
    tensors: int
    values: int
    adapted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"loaded     {self.tensors} of {self.tensors} tensors, {self.values / 1e6:.2f} M values, "
            f"from {self.source} ({FORMAT_NAMES[self.format]})"
        ]
        for name in ("adapted", "missing", "unexpected"):
            lines += [f"{name:<10} {text}" for text in getattr(self, name)]
        return "\n".join(lines)


FORMAT_NAMES = {"simmim": "this toolkit", "official": "the authors' code", "timm": "timm", "hf": "transformers"}


@dataclass(frozen=True)
class SavedEncoder:
    """An encoder ready for use, how to feed it, where it comes from, and what else the file held."""

    encoder: Encoder
    preprocessing: Preprocessing
    provenance: dict
    checkpoint: Checkpoint
    report: LoadReport


# --- Writing ---------------------------------------------------------------------------------------------------------


def save_encoder(
    folder: str | Path,
    encoder: Encoder,
    preprocessing: Preprocessing,
    provenance: dict,
    pretraining: State | None = None,
    head: State | None = None,
    classes: tuple[str, ...] = (),
) -> Path:
    """Write `encoder` into `folder`, each file whole or not at all; `pretraining`, `head` and `classes` are as in
    `Checkpoint`.

    The windows it was pre-trained with are recorded in the architecture, so that whoever loads it at another window or
    image size gets the position bias scaled as the weights expect it.
    """
    parts = {"provenance": provenance, "pretraining": pretraining or {}, "head": head or {}, "classes": classes}
    return save_checkpoint(folder, Checkpoint(encoder.config, encoder.state_dict(), preprocessing, Path(folder), **parts))


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """As `save_encoder`, of what was read or put together."""
    folder = Path(folder)
    config = checkpoint.config.trained_at(checkpoint.preprocessing.image_size)
    write_tensors(folder / WEIGHTS, checkpoint.encoder)
    write_json(
        folder / CONFIG,
        {
            "format": FORMAT,
            "architecture": registry.config_as_dict(config),
            "preprocessing": asdict(checkpoint.preprocessing),
            "provenance": checkpoint.provenance,
            **({"method": checkpoint.method} if checkpoint.pretraining else {}),
        },
    )
    if checkpoint.pretraining:
        write_tensors(folder / PRETRAINING, checkpoint.pretraining)
    if checkpoint.head:
        write_tensors(folder / HEAD, checkpoint.head)
        write_json(folder / HEAD_CONFIG, {"task": "classification", "classes": list(checkpoint.classes)})
    return folder


def filled_windows(config: EncoderConfig, sizes, image_size: tuple[int, int]) -> EncoderConfig:
    """`config` with the pre-trained windows that another format states, where 0 and nothing stand for the window that the
    stage uses at `image_size`."""
    actual = config.untrained().trained_at(image_size).pretrained_window_sizes
    return replace(config, pretrained_window_sizes=tuple(side or own for side, own in zip(sizes or actual, actual)))


def write_tensors(file: Path, state: Mapping[str, Tensor]) -> None:
    """Tensors as a safetensors file, whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(file) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> Checkpoint:
    """What `save_encoder` wrote.

    Raises:
        ValueError: when a file is damaged or does not fit the others.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no encoder in {str(folder)!r}: expected {WEIGHTS} and {CONFIG}")
    description = read_description(folder / CONFIG)
    try:
        config = registry.config_from_dict(description["architecture"])
        preprocessing = Preprocessing(**description["preprocessing"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}): export the encoder again") from error
    encoder = read_tensors(folder / WEIGHTS)
    check_state(config, encoder, folder / WEIGHTS)
    pretraining = read_tensors(folder / PRETRAINING) if (folder / PRETRAINING).is_file() else {}
    head, classes = {}, ()
    if (folder / HEAD).is_file():
        if not (folder / HEAD_CONFIG).is_file():
            raise ValueError(f"{folder / HEAD} lies there without {HEAD_CONFIG}, the names of its classes: export it again")
        head = read_tensors(folder / HEAD)
        classes = tuple(read_json(folder / HEAD_CONFIG).get("classes", ()))
    check_head(head, classes, config, folder / HEAD)
    checkpoint = Checkpoint(
        config,
        encoder,
        preprocessing,
        folder / WEIGHTS,
        provenance=description.get("provenance", {}),
        pretraining=pretraining,
        head=head,
        classes=classes,
        method=description.get("method", default_method()),
    )
    check_pretraining(checkpoint, folder / PRETRAINING)
    return checkpoint


def read_description(path: Path) -> dict:
    """The parsed `config.json` of an encoder.

    Raises:
        ValueError: when it is not one.
    """
    description = read_json(path)
    if description.get("format") != FORMAT:
        raise ValueError(f'{path} does not describe an encoder of this toolkit: expected "format": "{FORMAT}"')
    return description


def read_json(path: Path) -> dict:
    """A JSON object; an empty dict where the file holds other JSON.

    Raises:
        ValueError: when it is no JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def read_tensors(path: Path) -> State:
    """All tensors of a safetensors file, half precisions as float32.

    Raises:
        ValueError: when the file is torn or not safetensors.
    """
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): export the encoder again") from error
    return {name: in_full(value) for name, value in state.items()}


def in_full(value: Tensor) -> Tensor:
    """Half precisions as float32; everything else as it is."""
    return at_least_float32(value) if value.is_floating_point() else value


# --- Fitting ---------------------------------------------------------------------------------------------------------


def build_encoder(checkpoint: Checkpoint, **overrides) -> SavedEncoder:
    """The encoder of `checkpoint`, in evaluation mode, every weight in place.

    Args:
        overrides: settings of `SwinV2Config` to change: `window_size=14`, `drop_path_rate=0.1`, `in_channels=1`. With
            other channels the patch projection is summed or repeated, so that a gray image, the same in all channels of
            its normalized form, gives the same features.

    Raises:
        ValueError: when a setting is unknown, or the weights do not fit what it asks for.
    """
    config = with_fields(checkpoint.config, **overrides)
    preprocessing = checkpoint.preprocessing
    state, notes = checkpoint.config.adapt(dict(checkpoint.encoder), config)
    adapted = [*checkpoint.notes, *notes]
    if config.in_channels != checkpoint.config.in_channels:
        preprocessing = gray_preprocessing(preprocessing, config.in_channels)
    with torch.device("meta"):
        encoder = registry.build(config)
    check_state(config, state, checkpoint.source)
    # Copies, which are aligned as fresh tensors are and a file's mapped bytes need not be: sums come out the same bits.
    encoder.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    report = LoadReport(
        checkpoint.source,
        checkpoint.format,
        len(state),
        sum(value.numel() for value in state.values()),
        adapted=tuple(adapted),
        missing=() if checkpoint.pretraining else ("mask token and decoder: fresh where pre-training goes on",),
        unexpected=(f"a head of {len(checkpoint.classes)} classes",) if checkpoint.head else (),
    )
    return SavedEncoder(encoder.eval(), preprocessing, checkpoint.provenance, checkpoint, report)


def gray_preprocessing(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """The mean over the former channels' statistics, for each of the new ones."""
    mean, std = (sum(values) / len(values) for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, mean=(mean,) * channels, std=(std,) * channels)


def check_state(config: EncoderConfig, state: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are not exactly the architecture's.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape, both architectures, and the likely cause.
    """
    problems = mismatches(shapes_of(config), state)
    if problems:
        raise ValueError(f"{source} does not fit the architecture expected of it: {problems}{likely_cause(config, state)}")


@lru_cache(maxsize=32)
def shapes_of(config: EncoderConfig) -> Mapping[str, tuple[int, ...]]:
    """Every weight of an encoder by name, in order, and its shape."""
    with torch.device("meta"):
        model = registry.build(config)
    return MappingProxyType({name: tuple(value.shape) for name, value in model.state_dict().items()})


def mismatches(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or of another shape in `state`; "" where all fits."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    )


def likely_cause(config: EncoderConfig, state: Mapping[str, Tensor]) -> str:
    """The tail of the message: what differs between the expected architecture and the file's, by name."""
    try:
        found = type(config).infer(state)
    except ValueError:
        return ""
    differing = [name for name, value in found.items() if getattr(config, name) != value]
    if not differing:
        return ""
    preset = registry.preset_name(replace(config, **found)) if {"embed_dim", "depths"} & set(differing) else None
    sides = ", ".join(f"{name} {found[name]} for {getattr(config, name)}" for name in differing)
    return f". The file holds {sides}" + (f", as the preset {preset} has" if preset else "")


def check_pretraining(checkpoint: Checkpoint, source: Path) -> None:
    """Refuse weights of a method of pre-training that do not fit the encoder.

    Raises:
        ValueError: naming what does not.
    """
    if not checkpoint.pretraining:
        return
    method = method_named(checkpoint.method)
    expected = dict(method.expected_state(checkpoint.config))
    found = {name: tuple(value.shape) for name, value in checkpoint.pretraining.items()}
    if found != expected:
        raise ValueError(f"{source} holds {found}: expected for {method.title} with this encoder {expected}")


def check_head(head: Mapping[str, Tensor], classes: tuple[str, ...], config: EncoderConfig, source: Path) -> None:
    """Refuse a classifier's head that does not fit its classes or the encoder.

    Raises:
        ValueError: naming what does not.
    """
    if not head:
        return
    expected = {"weight": (len(classes), config.channels[-1]), "bias": (len(classes),)}
    found = {name: tuple(value.shape) for name, value in head.items()}
    if found != expected:
        raise ValueError(f"{source} holds {found}: expected for {len(classes)} classes {expected}")
