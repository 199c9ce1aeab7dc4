"""Weights put into an encoder, all of them or none, and the errors that say what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint, LoadReport, Preprocessing, SavedEncoder
from simmim.checkpoints.formats.registry import format_named
from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig, State, with_fields
from simmim.encoders.heads import head_shapes
from simmim.messages import counted
from simmim.methods.registry import method_named


def build_encoder(checkpoint: Checkpoint, **overrides: Any) -> SavedEncoder:
    """The encoder of `checkpoint`, in evaluation mode, with every weight in place.

    Args:
        overrides: fields of the encoder's configuration to change, for SwinV2 `window_size=14`, `drop_path_rate=0.1`,
            `in_channels=1`. For other input channels the patch projection is summed or repeated, so that an image that is
            the same in all channels has the same features (`simmim.encoders.base.change_input_channels`).

    Raises:
        ValueError: if a field is unknown, or the weights do not fit the changed architecture.
    """
    config = with_fields(checkpoint.config, **overrides)
    state, notes = checkpoint.config.adapt_weights(dict(checkpoint.encoder), config)
    check_state(config, state, checkpoint.source)
    preprocessing = checkpoint.preprocessing
    if config.in_channels != checkpoint.config.in_channels:
        preprocessing = with_channel_statistics(preprocessing, config.in_channels)
    missing = () if checkpoint.pretraining else (f"{own_parts(checkpoint)}: fresh where pre-training goes on",)
    report = LoadReport(
        checkpoint.source,
        format_named(checkpoint.format).title,
        len(state),
        sum(value.numel() for value in state.values()),
        adapted=(*checkpoint.notes, *notes),
        missing=missing,
        unexpected=(f"a head of {counted(len(checkpoint.classes), 'class')}",) if checkpoint.head else (),
    )
    return SavedEncoder(encoder_of(config, state).eval(), preprocessing, checkpoint.provenance, checkpoint, report)


def encoder_of(config: EncoderConfig, state: State) -> Encoder:
    """An encoder with the weights `state`, without drawing random ones first."""
    with torch.device("meta"):
        encoder = registry.build(config)
    if set(dict(encoder.named_buffers())) - set(encoder.state_dict()):
        # Buffers that are not saved have values only in an encoder that was built as usual.
        with torch.random.fork_rng(devices=[]):
            encoder = registry.build(config)
    # Copies are aligned as fresh tensors are; a file's mapped bytes need not be, and sums would come out different.
    encoder.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return encoder


def with_channel_statistics(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """`preprocessing` for another number of channels: each gets the mean of the former channels' statistics."""
    mean, std = (sum(values) / len(values) for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, mean=(mean,) * channels, std=(std,) * channels)


def own_parts(checkpoint: Checkpoint) -> str:
    """What the method of pre-training has beside the encoder, in words: "mask token and decoder"."""
    return method_named(checkpoint.method).own_parts


# --- checks ----------------------------------------------------------------------------------------------------------


def check_state(config: EncoderConfig, state: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are not exactly those of the architecture.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape, and the likely cause.
    """
    problems = mismatches(shapes_of(config), state)
    if problems:
        raise ValueError(f"{source} does not fit the architecture expected of it: {problems}{likely_cause(config, state)}")


@lru_cache(maxsize=32)
def shapes_of(config: EncoderConfig) -> Mapping[str, tuple[int, ...]]:
    """The name and shape of every tensor in the state of an encoder, in order."""
    with torch.device("meta"):
        model = registry.build(config)
    return MappingProxyType({name: tuple(value.shape) for name, value in model.state_dict().items()})


def mismatches(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or of another shape in `state`; "" if everything fits."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    return "; ".join(
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    )


def likely_cause(config: EncoderConfig, state: Mapping[str, Tensor]) -> str:
    """The end of the message: the fields in which the file's architecture differs from the expected one."""
    try:
        inferred = type(config).infer_fields(state)
    except ValueError:
        return ""
    differing = [name for name, value in inferred.items() if getattr(config, name) != value]
    if not differing:
        return ""
    fields = ", ".join(f"{name} {inferred[name]} for {getattr(config, name)}" for name in differing)
    preset = preset_of(config, inferred) if set(config.size_fields) & set(differing) else None
    return f". The file holds {fields}" + (f", as the preset {preset} has" if preset else "")


def preset_of(config: EncoderConfig, fields: Mapping[str, Any]) -> str | None:
    """The preset of `config` with other fields; None if there is none, or no such encoder."""
    try:
        return registry.preset_name(with_fields(config, **fields))
    except ValueError:
        return None


def check_pretraining(checkpoint: Checkpoint, source: Path) -> None:
    """Refuse a method's own weights that do not fit the encoder.

    Raises:
        ValueError: naming both sides, or an unknown method.
    """
    if not checkpoint.pretraining:
        return
    try:
        method = method_named(checkpoint.method)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    try:
        expected = method.expected_state(checkpoint.config, method.settings_from(checkpoint.provenance))
    except (TypeError, ValueError) as error:  # its provenance has other values, or other types
        raise ValueError(f"{source} does not fit {method.title} with this encoder: {error}") from error
    problems = mismatches(expected, checkpoint.pretraining)
    if problems:
        raise ValueError(f"{source} does not fit {method.title} with this encoder: {problems}")


def check_head(head: Mapping[str, Tensor], classes: tuple[str, ...], config: EncoderConfig, source: Path) -> None:
    """Refuse a classifier's head that does not fit its classes or the encoder.

    Raises:
        ValueError: naming both sides.
    """
    if not head:
        return
    shapes = {name: tuple(value.shape) for name, value in head.items()}
    expected = head_shapes(head, config.channels[-1], len(classes))
    if shapes != expected:
        raise ValueError(f"{source} holds a head {shapes}: expected {expected} for {len(classes)} classes and this encoder")
