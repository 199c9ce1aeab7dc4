"""Reading an encoder from any path: its format is found from the files themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint, SavedEncoder
from simmim.checkpoints.fitting import build_encoder, check_head, check_pretraining
from simmim.checkpoints.formats.base import Format
from simmim.checkpoints.formats.registry import in_detection_order
from simmim.checkpoints.other_networks import describe_network
from simmim.checkpoints.own_files import WEIGHTS
from simmim.checkpoints.source import CONFIG, Source
from simmim.checkpoints.weight_files import INDEX
from simmim.encoders import registry
from simmim.encoders.base import Encoder
from simmim.hub import PREFIX, fetch

TIMM_PREFIX = "timm:"  # of timm's name of published weights, where a path is expected
# What is fetched of a published model: the first kind of weights that it has, and what lies beside them.
PUBLISHED_WEIGHTS = (
    (WEIGHTS,),
    (f"encoder/{WEIGHTS}",),
    ("model.safetensors",),
    (INDEX, "model-*.safetensors"),
)
PARTS = ("head", "pretraining", "segmentation", "detection")
DESCRIPTIONS = (
    *(CONFIG, "preprocessor_config.json", "README.md", "encoder/*.json", "encoder/*.safetensors"),
    *(f"{part}.{ending}" for part in PARTS for ending in ("json", "safetensors")),
)


def load_encoder(path: str | Path, **overrides: Any) -> Encoder:
    """An encoder, in evaluation mode, from any file or folder that holds one.

    Args:
        path: a run folder, an exported folder, an authors' .pth file, timm's or transformers' folder or weight file; or
            the id of a published model, "hf:owner/name" or "timm:name".
        overrides: fields of the encoder's configuration to change while loading, for SwinV2 `window_size=14`,
            `drop_path_rate=0.1`, `in_channels=1`.

    Raises:
        ValueError: if there is no encoder at `path`, or not every weight fits.
    """
    return read_encoder(path, **overrides).encoder


def read_encoder(path: str | Path, report: Callable[[str], object] | None = None, **overrides: Any) -> SavedEncoder:
    """As `load_encoder`, with the preprocessing, the provenance and everything else that the file holds.

    Args:
        report: is called with the text of the `LoadReport`.
    """
    saved = build_encoder(read(path, **overrides), **overrides)
    if report:
        report(str(saved.report))
    return saved


def read(path: str | Path, **overrides: Any) -> Checkpoint:
    """Everything that a file or folder holds, under this toolkit's names, whatever the format.

    Args:
        overrides: as of `load_encoder`. They do not change what is read; they give values that some files do not store,
            such as `window_size`.

    Raises:
        ValueError: if there is no encoder of a known format, or its parts do not fit one another.
    """
    source = locate(local_path(path))
    try:
        checkpoint = detect_format(source).read(source, overrides)
        if is_published(path):
            checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "hub": str(path)})
        check_pretraining(checkpoint, source.file)
        check_head(checkpoint.head, checkpoint.classes, checkpoint.config, source.file)
    except ValueError as error:
        names_it = any(name in str(error) for name in (str(source.file), f"{source.folder}/", f"{str(source.folder)!r}"))
        raise ValueError(str(error) if names_it else f"{source.file}: {error}") from error
    return checkpoint


def is_published(path: str | Path) -> bool:
    """Whether it is the id of a published model: "hf:owner/name", or timm's name of weights, "timm:name"."""
    return str(path).startswith((PREFIX, TIMM_PREFIX))


def local_path(path: str | Path) -> Path:
    """A path as it is; of a published model the folder in this machine's cache, into which it is fetched if necessary.

    Only safetensors and descriptions are fetched.

    Raises:
        ValueError: as `simmim.hub.fetch`, and when timm does not know the name.
    """
    text = str(path)
    if not is_published(text):
        return Path(path).expanduser()
    if text.startswith(TIMM_PREFIX):
        from simmim.checkpoints.formats.backbone.timm import published_id

        text = PREFIX + published_id(text.removeprefix(TIMM_PREFIX))
    return fetch(text, DESCRIPTIONS, PUBLISHED_WEIGHTS)


def locate(path: Path) -> Source:
    """The weight file that `path` means: itself, one beside this config.json, or one in this folder or its folder encoder/.

    Raises:
        ValueError: if there is none.
    """
    if not path.exists():
        raise ValueError(f"no encoder at {str(path)!r}: there is no such file or folder")
    if path.is_file() and path.name != CONFIG:
        return Source(path)
    folders = (path.parent,) if path.is_file() else (path, path / "encoder")
    formats = in_detection_order()
    for folder in folders:
        for name in (name for format in formats for name in format.weight_names):
            if (folder / name).is_file():
                return Source(folder / name)
    others = ", ".join(format.title for format in formats if WEIGHTS not in format.weight_names)
    raise ValueError(
        f"no encoder in {str(path)!r}: expected {WEIGHTS} and {CONFIG} there or in its folder encoder/, or a folder of "
        f"another format ({others})"
    )


def detect_format(source: Source) -> Format:
    """The format of a weight file.

    Raises:
        ValueError: if it is of none, saying what it looks like.
    """
    formats = in_detection_order()
    for format in formats:
        if format.detect(source):
            return format
    families = [registry.load_family(name) for name in registry.FAMILIES]
    titles = ", ".join(family.title for family in families if family.presets)
    raise ValueError(
        f"{source.file} holds {describe_network(source.weights.tensors)}. Expected an encoder ({titles}) of "
        f"{', '.join(format.title for format in formats)}; or any network of timm or transformers, as a folder with its "
        "config.json and safetensors, for nothing pickled of other networks is read"
    )
