"""Images that grow in the course of a run: which size each step has, and what of the model follows it.

The first steps see small images, which take less time, and the last ones images of the size that the encoder is for. The
weights stay the same at every size: windows and mask units are those of a run at that size, and a continuous position bias
keeps the scale that it begins with, as it does when an encoder is fine-tuned at another size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from simmim.defaults import as_size
from simmim.encoders.base import EncoderConfig, Size, with_fields
from simmim.growing_sizes import as_given, check_count, check_growth, check_shares, naming, shares_of, size_text
from simmim.messages import counted, did_you_mean
from simmim.methods.base import MethodSettings
from simmim.methods.registry import method_named

if TYPE_CHECKING:
    from simmim.pretrain.settings import PretrainSettings

GROWING = ("image_sizes", "image_size_shares", "model_by_size")


# --- settings ----------------------------------------------------------------------------------------------------------


def checked_sizes(settings: PretrainSettings) -> dict[str, Any]:
    """The settings of growing images as tuples, with the last size as `image_size`.

    Raises:
        ValueError: for sizes that do not grow, shares that are none, a list of another length, and another `image_size`.
    """
    sizes = settings.image_sizes
    if sizes is None:
        given = [name for name in GROWING if getattr(settings, name) is not None]
        if given:
            raise ValueError(f"{given[0]} needs sizes that follow one another: give image_sizes, as [96, 128, 192]")
        return {}
    sizes = tuple(as_given(size) for size in sizes)
    check_growth(sizes)
    last, image_size = sizes[-1], settings.image_size
    if image_size is not None and as_size(image_size) != as_size(last):
        raise ValueError(
            f"both image_sizes, which end at {size_text(last)} px, and image_size {size_text(image_size)} are given: give "
            "one of them"
        )
    result: dict[str, Any] = {"image_sizes": sizes, "image_size": last}
    for name in GROWING[1:]:
        values = getattr(settings, name)
        if values is not None:
            check_count(name, values, sizes)
            result[name] = tuple(values)
    check_shares(result.get("image_size_shares"))
    return result


# --- a run as one run after another ------------------------------------------------------------------------------------


def at_sizes(settings: PretrainSettings) -> tuple[PretrainSettings, ...]:
    """The resolved settings at each image size in turn, as of runs at that size alone; where images do not grow, these."""
    if settings.image_sizes is None:
        return (settings,)
    assert settings.model_by_size is not None, "settings are not resolved"
    return tuple(
        replace(
            settings,
            **dict.fromkeys(GROWING),
            image_size=size,
            model=with_changes(settings.model, changes),  # type: ignore[arg-type]
        )
        for size, changes in zip(settings.image_sizes, settings.model_by_size)
    )


def with_changes(model: MethodSettings, changes: Mapping[str, Any]) -> MethodSettings:
    """The settings of a method with those that differ at a size."""
    own = {name: value for name, value in changes.items() if name != "encoder"}
    return replace(model, **own, encoder={**model.encoder, **changes.get("encoder", {})})


def by_size(settings: PretrainSettings) -> dict[Size, tuple[EncoderConfig, MethodSettings]]:
    """The encoder's architecture and the method's settings at each size; none where images do not grow."""
    if settings.image_sizes is None:
        return {}
    return {part.size: (part.encoder_config(), part.model) for part in at_sizes(settings)}  # type: ignore[misc]


def step_shares(settings: PretrainSettings) -> list[float]:
    """Share of the run's steps at each size."""
    if settings.image_sizes is None:
        return [1.0]
    return shares_of(settings.image_sizes, settings.image_size_shares)


def first_steps(settings: PretrainSettings, num_steps: int) -> list[int]:
    """The first optimizer step of each size, from 0.

    Raises:
        ValueError: when there are too few steps for all sizes.
    """
    shares = step_shares(settings)
    firsts = [round(math.fsum(shares[:index]) * num_steps) for index in range(len(shares))]
    for index, (first, after) in enumerate(zip(firsts, [*firsts[1:], num_steps])):
        if first >= after and settings.image_sizes is not None:
            raise ValueError(
                f"a run of {num_steps:,} step{'s' * (num_steps != 1)} has none at {size_text(settings.image_sizes[index])} "
                "px: give more epochs, fewer image_sizes or other image_size_shares"
            )
    return firsts


def describe_sizes(settings: PretrainSettings, num_steps: int) -> str:
    """The steps, mask unit and encoder of each size, for the summary of a run."""
    firsts = first_steps(settings, num_steps)
    parts = []
    for part, first, after in zip(at_sizes(settings), firsts, [*firsts[1:], num_steps]):
        config, unit = part.encoder_config(), getattr(part.model, "mask_unit", None)
        followed = [f"mask unit {unit} px"] if unit else []
        followed += [f"{name.removesuffix('_size')} {getattr(config, name)}" for name in config.changeable_fields]
        known = f" ({', '.join(followed)})" if followed else ""
        parts.append(f"{size_text(part.size)} px for {counted(after - first, 'step')}{known}")
    return ", then ".join(parts)


# --- resolving ---------------------------------------------------------------------------------------------------------


def resolve_growing(
    settings: PretrainSettings, resolve: Callable[[PretrainSettings], tuple[PretrainSettings, EncoderConfig]]
) -> tuple[PretrainSettings, EncoderConfig]:
    """Settings of the last size, with what differs at the others as `model_by_size`.

    Args:
        resolve: settings of one size, with preset, encoder and method resolved, and the architecture.

    Raises:
        ValueError: when a size cannot work with the settings that are given, or the method's own weights would change.
    """
    sizes = settings.image_sizes
    assert sizes is not None
    alone = replace(settings, **dict.fromkeys(GROWING))

    def resolve_at(size: int | Size) -> tuple[PretrainSettings, EncoderConfig]:
        with naming(size):
            return resolve(replace(alone, image_size=size))

    last, config = resolve_at(sizes[-1])
    model: MethodSettings = last.model  # type: ignore[assignment]
    changes = settings.model_by_size
    if changes is None:
        alone = replace(alone, preset=last.preset)
        parts = [resolve_at(size) for size in sizes[:-1]]
        changes = (*(changes_of(part.model, own, model, config) for part, own in parts), {})  # type: ignore[arg-type]
    else:
        check_changes(changes, model, config)
    # Fixed from the first step on, so that the bias of an offset stays what was learned.
    scale = scale_of(with_fields(config, **changes[0].get("encoder", {})), as_size(sizes[0]))
    config, model = with_fields(config, **scale), replace(model, encoder={**model.encoder, **scale})
    settings = replace(settings, preset=last.preset, model=model, model_by_size=changes)
    check_parts(settings)
    return settings, config


def scale_of(config: EncoderConfig, size: Size) -> dict[str, Any]:
    """Fields by which a first size fixes the scale of position biases."""
    before, after = config.as_dict(), config.with_training_size(size).as_dict()
    return {name: value for name, value in after.items() if value != before[name]}


def changes_of(
    model: MethodSettings, config: EncoderConfig, last_model: MethodSettings, last_config: EncoderConfig
) -> dict[str, Any]:
    """What differs at a size from the last one: of the method's settings all, of the encoder's what can change."""
    names = [field.name for field in fields(model) if field.name != "encoder"]
    own = {name: getattr(model, name) for name in names if getattr(model, name) != getattr(last_model, name)}
    values = {name: getattr(config, name) for name in config.changeable_fields}
    encoder = {name: value for name, value in values.items() if value != getattr(last_config, name)}
    return {**own, **({"encoder": encoder} if encoder else {})}


def check_changes(changes: Sequence[Any], model: MethodSettings, config: EncoderConfig) -> None:
    """Check that `model_by_size` names settings that can differ between sizes.

    Raises:
        ValueError: naming the first one that cannot.
    """
    known = [field.name for field in fields(model)]
    for entry in changes:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("encoder", {}), Mapping):
            raise ValueError(f"model_by_size has {entry!r}: give a mapping for each size, as {{mask_unit: 16}}")
        for name, value in entry.items():
            if name not in known:
                raise ValueError(f"unknown setting model_by_size.{name}{did_you_mean(name, known)}")
            if type(value) is not type(getattr(model, name)):
                raise ValueError(
                    f"model_by_size.{name} is {value!r}: give a value as model.{name}, {getattr(model, name)!r}"
                )
        fixed = [name for name in entry.get("encoder", {}) if name not in config.changeable_fields]
        if fixed:
            can = ", ".join(config.changeable_fields) or "none"
            raise ValueError(
                f"model_by_size.encoder.{fixed[0]} cannot change while this encoder trains: settings that can: {can}"
            )


def check_parts(settings: PretrainSettings) -> None:
    """Check that the method works at each size, with one set of weights.

    Raises:
        ValueError: naming the size.
    """
    kind = method_named(settings.method)
    expected = kind.expected_state(settings.encoder_config(), settings.model)
    for part in at_sizes(settings):
        own = part.encoder_config()
        with naming(part.size):
            resolved = part.model.resolve(part.size, own)  # type: ignore[union-attr]
        if kind.expected_state(own, resolved) != expected:
            raise ValueError(f"image_sizes: the {kind.own_parts} of {size_text(part.size)} px differ from those of the last")
