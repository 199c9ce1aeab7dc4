"""Encoders by name. The only file that knows concrete encoders; each is imported when it is first asked for.

A new encoder is a folder in `simmim/encoders/` with a `FAMILY`, and a line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from simmim.encoders.base import Encoder, EncoderConfig, EncoderFamily, with_fields
from simmim.messages import did_you_mean

# Name to the module that holds its FAMILY. The first is what files without a family's name hold.
FAMILIES = {"swinv2": "simmim.encoders.swinv2"}
FAMILY_KEY = "family"  # beside the fields of a configuration, in settings and files


def family(name: str) -> EncoderFamily:
    """The family of that name.

    Raises:
        ValueError: for an unknown name, naming the nearest known one.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown encoder family {name!r}{did_you_mean(name, FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILY


def family_of(config: EncoderConfig) -> EncoderFamily:
    """The family that a configuration belongs to."""
    return next(found for found in map(family, FAMILIES) if type(config) is found.config)


def default_family() -> EncoderFamily:
    """The family of files and settings that name none."""
    return family(next(iter(FAMILIES)))


def build(config: EncoderConfig, checkpoint_activations: bool = False, sequential_attention: int | None = None) -> Encoder:
    """A freshly initialized encoder, with the kernels of its family put in; the arguments are as of `Encoder`.

    Raises:
        ValueError: as `Encoder`.
    """
    return family_of(config).build(config, checkpoint_activations, sequential_attention)


# --- Presets ---------------------------------------------------------------------------------------------------------


def presets() -> dict[str, EncoderConfig]:
    """Every preset of every family by its name."""
    return {name: config for known in FAMILIES for name, config in family(known).presets.items()}


def preset_config(preset: str, **overrides: Any) -> EncoderConfig:
    """A preset with some fields replaced.

    Raises:
        ValueError: for an unknown preset or field, naming the nearest known one.
    """
    known = presets()
    if preset not in known:
        raise ValueError(f"unknown preset {preset!r}{did_you_mean(preset, known)}")
    return with_fields(known[preset], **overrides)


def preset_name(config: EncoderConfig) -> str | None:
    """The preset of this size, whatever the windows, channels and patches; None where there is none."""
    for name, preset in family_of(config).presets.items():
        if all(getattr(config, key) == getattr(preset, key) for key in config.size_fields):
            return name
    return None


# --- Configurations as plain values ------------------------------------------------------------------------------------


def config_as_dict(config: EncoderConfig) -> dict[str, Any]:
    """Family and fields, as files and settings hold them."""
    return {FAMILY_KEY: family_of(config).name, **config.as_dict()}


def config_from_dict(values: Mapping[str, Any]) -> EncoderConfig:
    """The inverse of `config_as_dict`; without a family's name SwinV2, as files of version 0.1 have it.

    Raises:
        ValueError: for an unknown family or field, and for values out of range.
    """
    values = dict(values)
    found = family(str(values.pop(FAMILY_KEY, default_family().name)))
    known = found.config.__dataclass_fields__  # type: ignore[attr-defined]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown encoder setting {name!r}{did_you_mean(name, known)}")
    return found.config(**values)
