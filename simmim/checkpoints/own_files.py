"""This toolkit's own folder of an encoder, written and read.

encoder.safetensors    the encoder's weights
config.json            architecture, preprocessing, provenance, and the method of pre-training
pretraining.safetensors  the method's own weights, from which pre-training can go on
head.safetensors, head.json  a classifier's head and class names, after fine-tuning

Every file is written atomically.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import check_head, check_pretraining, check_state
from simmim.checkpoints.source import CONFIG
from simmim.checkpoints.weight_files import read_safetensors, write_safetensors
from simmim.encoders import registry
from simmim.encoders.base import Encoder, State
from simmim.files import read_json, write_json
from simmim.methods.registry import default_method

WEIGHTS = "encoder.safetensors"
PRETRAINING, HEAD, HEAD_CONFIG = "pretraining.safetensors", "head.safetensors", "head.json"
MARKER = "simmim-encoder"  # the value of "format" in config.json
OLD_MARKERS = ("simmim-swinv2-encoder",)  # version 0.1, where SwinV2 was the only encoder


def save_encoder(
    folder: str | Path,
    encoder: Encoder,
    preprocessing: Preprocessing,
    provenance: dict,
    head: State | None = None,
    classes: tuple[str, ...] = (),
) -> Path:
    """Write `encoder` into `folder`, with a classifier's `head` and `classes` if there is one.

    Args:
        folder: is created if necessary. Files of an encoder that was saved there before are replaced, each atomically, or
            deleted where this one has no such part.
        preprocessing, provenance, head, classes: as of `Checkpoint`.

    Returns:
        `folder` as a path.
    """
    return save_checkpoint(
        folder,
        Checkpoint(
            encoder.config,
            encoder.state_dict(),
            preprocessing,
            Path(folder),
            provenance=provenance,
            head=head or {},
            classes=classes,
        ),
    )


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write everything that `checkpoint` holds into `folder`; as `save_encoder`.

    The architecture records what the weights depend on of the image size in training (`EncoderConfig.with_training_size`).
    """
    folder = Path(folder)
    config = checkpoint.config.with_training_size(checkpoint.preprocessing.image_size)
    write_safetensors(folder / WEIGHTS, checkpoint.encoder)
    write_json(
        folder / CONFIG,
        {
            "format": MARKER,
            "architecture": registry.config_as_dict(config),
            "preprocessing": checkpoint.preprocessing.as_dict(),
            "provenance": checkpoint.provenance,
            **({"method": checkpoint.method} if checkpoint.pretraining or checkpoint.method != default_method() else {}),
        },
    )
    if checkpoint.pretraining:
        write_safetensors(folder / PRETRAINING, checkpoint.pretraining)
    else:
        (folder / PRETRAINING).unlink(missing_ok=True)
    if checkpoint.head:
        write_safetensors(folder / HEAD, checkpoint.head)
        write_json(folder / HEAD_CONFIG, {"task": "classification", "classes": list(checkpoint.classes)})
    else:
        for name in (HEAD, HEAD_CONFIG):
            (folder / name).unlink(missing_ok=True)
    return folder


def update_provenance(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add or replace entries of the provenance that `save_checkpoint` wrote into `folder`; without it nothing happens."""
    if (folder / CONFIG).is_file():
        description = read_json(folder / CONFIG)
        write_json(folder / CONFIG, {**description, "provenance": {**description.get("provenance", {}), **entries}})


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        ValueError: if a file is missing or damaged, or does not fit the others.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no encoder in {str(folder)!r}: expected {WEIGHTS} and {CONFIG}")
    description = read_description(folder / CONFIG)
    try:
        config = registry.config_from_dict(description["architecture"])
        preprocessing = Preprocessing(**description["preprocessing"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}): export the encoder again") from error
    encoder = read_safetensors(folder / WEIGHTS)
    check_state(config, encoder, folder / WEIGHTS)
    head, classes = read_head(folder)
    check_head(head, classes, config, folder / HEAD)
    checkpoint = Checkpoint(
        config,
        encoder,
        preprocessing,
        folder / WEIGHTS,
        provenance=description.get("provenance", {}),
        method=description.get("method", default_method()),
        pretraining=read_safetensors(folder / PRETRAINING) if (folder / PRETRAINING).is_file() else {},
        head=head,
        classes=classes,
    )
    check_pretraining(checkpoint, folder / PRETRAINING)
    return checkpoint


def read_head(folder: Path) -> tuple[State, tuple[str, ...]]:
    """A classifier's head and class names; both empty if the folder has none.

    Raises:
        ValueError: if the head has no class names.
    """
    if not (folder / HEAD).is_file():
        return {}, ()
    if not (folder / HEAD_CONFIG).is_file():
        raise ValueError(f"{folder / HEAD} has no {HEAD_CONFIG} with the names of its classes: export the classifier again")
    return read_safetensors(folder / HEAD), tuple(read_json(folder / HEAD_CONFIG).get("classes", ()))


def read_description(path: Path) -> dict:
    """The content of an encoder's config.json.

    Raises:
        ValueError: if it describes something else.
    """
    description = read_json(path)
    if description.get("format") not in (MARKER, *OLD_MARKERS):
        raise ValueError(f'{path} does not describe an encoder of this toolkit: expected "format": "{MARKER}"')
    return description
