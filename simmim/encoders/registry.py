"""Encoder families by name. The only file that knows concrete encoders. Each is imported on first use.

A new encoder is a folder in `simmim/encoders/` with a `FAMILY`, and one line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from simmim.encoders.base import Encoder, EncoderConfig, EncoderFamily, check_fields, with_fields
from simmim.messages import did_you_mean

# Name to the module with its FAMILY. The first is the family of files and settings that name none.
FAMILIES = {
    "swinv2": "simmim.encoders.swinv2",
    "swin": "simmim.encoders.swin",
    "vit": "simmim.encoders.vit",
    "backbone": "simmim.encoders.backbone",  # other libraries' networks
}
FAMILY_KEY = "family"  # in settings and files, beside the fields of the configuration


def load_family(name: str) -> EncoderFamily:
    """The family with this name.

    Raises:
        ValueError: for an unknown name, naming the nearest known one.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown encoder family {name!r}{did_you_mean(name, FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILY


def default_family() -> EncoderFamily:
    """The family of files and settings that name none."""
    return load_family(next(iter(FAMILIES)))


def family_of(config: EncoderConfig) -> EncoderFamily:
    """The family of a configuration.

    Raises:
        ValueError: when its class belongs to no registered family.
    """
    for name in FAMILIES:
        family = load_family(name)
        if type(config) is family.config:
            return family
    raise ValueError(f"{type(config).__name__} belongs to no registered encoder family; known: {', '.join(FAMILIES)}")


def build(config: EncoderConfig, checkpoint_activations: bool = False, sequential_attention: int | None = None) -> Encoder:
    """A freshly initialized encoder with the kernels of its family. The arguments are those of `Encoder`.

    Raises:
        ValueError: as `Encoder`.
    """
    return family_of(config).build(config, checkpoint_activations, sequential_attention)


# --- presets -----------------------------------------------------------------------------------------------------------


def presets() -> dict[str, EncoderConfig]:
    """The presets of all families by name."""
    return {preset: config for name in FAMILIES for preset, config in load_family(name).presets.items()}


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
    """The preset whose `size_fields` are equal to those of `config`; None if there is none."""
    for name, preset in family_of(config).presets.items():
        if all(getattr(config, field) == getattr(preset, field) for field in config.size_fields):
            return name
    return None


# --- configurations as plain values --------------------------------------------------------------------------------------


def config_as_dict(config: EncoderConfig) -> dict[str, Any]:
    """Family and fields, as files and settings hold them."""
    return {FAMILY_KEY: family_of(config).name, **config.as_dict()}


def config_from_dict(values: Mapping[str, Any]) -> EncoderConfig:
    """The inverse of `config_as_dict`. Without a family it is SwinV2: files of version 0.1 name none.

    Raises:
        ValueError: for an unknown family or field, and for values out of range.
    """
    fields = {key: value for key, value in values.items() if key != FAMILY_KEY}
    family = load_family(str(values[FAMILY_KEY])) if FAMILY_KEY in values else default_family()
    check_fields(family.config, fields)
    return family.config(**fields)
