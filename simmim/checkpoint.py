"""Encoders on disk: `encoder.safetensors` beside a `config.json` that says what it takes to use it.

Loading is strict: every weight arrives, or nothing does and the message says why. Files appear whole or not at all.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from simmim.files import whole_file, write_json
from simmim.swinv2 import SwinV2, SwinV2Config, nearest

WEIGHTS, CONFIG = "encoder.safetensors", "config.json"
FORMAT = "simmim-swinv2-encoder"


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder's images must look like.

    Args:
        image_size: (height, width) in pixels that it was trained at; others work.
        mean, std: one a channel, of values in [0, 1].
        interpolation: how images were resized.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class SavedEncoder:
    """An encoder folder read: the model, how to feed it, and where it comes from."""

    encoder: SwinV2
    preprocessing: Preprocessing
    provenance: dict = field(default_factory=dict)


def save_encoder(folder: str | Path, encoder: SwinV2, preprocessing: Preprocessing, provenance: dict) -> Path:
    """Write `encoder` into `folder`, each of the two files whole or not at all.

    The windows it was pre-trained with are recorded in the architecture, so that whoever loads it at another window or
    image size gets the position bias scaled as the weights expect it.
    """
    folder = Path(folder)
    config = encoder.config
    if config.pretrained_window_sizes is None:
        windows = config.windows(preprocessing.image_size)
        sizes = tuple(height if height == width else (height, width) for height, width in windows)
        config = replace(config, pretrained_window_sizes=sizes)
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "architecture": config.as_dict(),
        "preprocessing": asdict(preprocessing),
        "provenance": provenance,
    }
    write_json(folder / CONFIG, description)
    return folder


def load_encoder(path: str | Path, **overrides) -> SwinV2:
    """An encoder, in evaluation mode, from a run folder, an exported folder or its `encoder.safetensors`.

    Args:
        overrides: settings of `SwinV2Config` to change while loading: `window_size=14`, `drop_path_rate=0.1`.

    Raises:
        ValueError: when there is no encoder at `path`, or not every weight fits.
    """
    return read_encoder(path, **overrides).encoder


def read_encoder(path: str | Path, report: Callable[[str], None] | None = None, **overrides) -> SavedEncoder:
    """As `load_encoder`, with the preprocessing and provenance; `report` is called with a line on what was loaded.

    Raises:
        ValueError: as `load_encoder`.
    """
    folder = encoder_folder(path)
    description = read_description(folder / CONFIG)
    known = {field.name for field in fields(SwinV2Config)}
    for name in overrides:
        if name not in known:
            raise ValueError(f"unknown encoder setting {name!r}{nearest(name, known)}")
    try:
        config = SwinV2Config(**description["architecture"])
        preprocessing = Preprocessing(**description["preprocessing"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}): export the encoder again") from error
    config = replace(config, **overrides)
    state = read_weights(folder / WEIGHTS)
    encoder = SwinV2(config)
    check_state(encoder, state, folder / WEIGHTS)
    encoder.load_state_dict(state, assign=False)
    if report:
        values = sum(value.numel() for value in state.values())
        report(f"loaded {len(state)} of {len(state)} tensors, {values / 1e6:.2f} M values, from {folder / WEIGHTS}")
    return SavedEncoder(encoder.eval(), preprocessing, description.get("provenance", {}))


def encoder_folder(path: str | Path) -> Path:
    """The folder that holds the encoder meant by `path`.

    Raises:
        ValueError: when `path` does not exist or holds none.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no encoder at {str(path)!r}: there is no such file or folder")
    candidates = (path, path / "encoder") if path.is_dir() else (path.parent,)
    if path.is_file() and path.name not in (WEIGHTS, CONFIG):
        raise ValueError(
            f"{str(path)!r} is not an exported encoder: give a run folder, an exported folder or its {WEIGHTS}"
        )
    for folder in candidates:
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    raise ValueError(f"no encoder in {str(path)!r}: expected {WEIGHTS} and {CONFIG} there or in its folder encoder/")


def read_description(path: Path) -> dict:
    """The parsed `config.json` of an encoder.

    Raises:
        ValueError: when it is not one.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe an encoder of this toolkit: expected \"format\": \"{FORMAT}\"")
    return description


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: when the file is torn or not safetensors.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): export the encoder again") from error


def check_state(model: torch.nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit the architecture in its {CONFIG}: {'; '.join(problems)}")


def loading_code(folder: Path) -> str:
    """Lines of Python that load the encoder in `folder`, ready to paste."""
    return (
        "import torch\n"
        "from simmim.checkpoint import read_encoder\n\n"
        f"saved = read_encoder({str(folder.resolve())!r})\n"
        "height, width = saved.preprocessing.image_size\n"
        "# Yours, normalised by saved.preprocessing:\n"
        "images = torch.randn(1, saved.encoder.config.in_channels, height, width)\n"
        "features = saved.encoder(images).pooled  # (batch, channels)"
    )
