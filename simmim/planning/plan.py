"""What a pre-training run needs of its devices, and the options to turn on until it fits."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from simmim.defaults import as_size, default_batch_size
from simmim.encoders.base import EncoderConfig, Size, with_fields
from simmim.encoders.cost import Setup
from simmim.encoders.registry import preset_config
from simmim.messages import counted, did_you_mean
from simmim.methods.base import MethodSettings
from simmim.methods.registry import default_method, method_named
from simmim.planning.step import Memory, cost_model, step_flops, step_memory

GIB = 2**30
# Of a device's memory, what tensors may fill. The rest is for the driver, libraries' workspaces and gaps between tensors.
USABLE_SHARE = 0.9
EXECUTION = ("checkpoint_activations", "sequential_attention")  # of a method's settings, what is `Setup`'s in a plan
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a name", dict: "keys and values"}
MAX_BATCH = 2**16  # images per device; no larger batch is searched for


@dataclass(frozen=True)
class Plan:
    """What a run needs, and what to turn on so that it fits.

    Attributes:
        title: name of the model, for the report.
        encoder_parameters, head_parameters: numbers of parameters; the head is all that is not the encoder.
        forward_flops, training_flops: per image, of matrix products; training with all that is recomputed.
        requested, memory: the setup that was asked for and its memory.
        recommended, recommended_memory: the first setup that fits; None where not even one image does.
        largest_batch: images per device that fit with the recommended options; 0 where not even one does.
    """

    title: str
    config: EncoderConfig
    method: str
    image_size: Size
    device_memory_gib: float
    encoder_parameters: int
    head_parameters: int
    forward_flops: int
    training_flops: int
    requested: Setup
    memory: Memory
    recommended: Setup | None
    recommended_memory: Memory | None
    largest_batch: int


def plan(
    config: EncoderConfig,
    image_size: int | Size,
    requested: Setup,
    device_memory_gib: float = 80.0,
    title: str = "encoder",
    method: str | None = None,
    settings: MethodSettings | None = None,
) -> Plan:
    """What pre-training this encoder needs of each device, and the options with which it fits.

    Args:
        image_size: pixels, one number or (height, width).
        requested: the setup to start from.
        device_memory_gib: memory of one device, of which `USABLE_SHARE` is planned for.
        title: name of the model, for the report.
        method: name of the method of pre-training; the default one where None.
        settings: of the method; its defaults where None.

    Raises:
        ValueError: for a setting out of range, and for an encoder whose family has no cost model.
    """
    size, method = as_size(image_size), method or default_method()
    method_class = method_named(method)
    settings = settings or method_class.settings_class()
    images = settings.images_per_input
    check_plan(size, device_memory_gib, requested, images)
    if requested.sharded and not method_class.supports_sharding:
        raise ValueError(f"strategy is fsdp, which method {method} does not support: give ddp")
    at_once = cost_model(config).default_sequential_attention(config, size)
    if requested.sequential_attention is not None and at_once is None:
        raise ValueError(
            f"sequential_attention is {requested.sequential_attention}: this encoder has no windows, leave it out"
        )

    def memory(setup: Setup) -> Memory:
        return step_memory(config, size, setup, method_class, settings)

    def fits(setup: Setup) -> bool:
        return memory(setup).peak <= device_memory_gib * USABLE_SHARE * GIB

    recommended, largest = choose_setup(setups_to_try(requested, at_once, method_class.supports_sharding), fits, images)
    flops = step_flops(config, size, requested, method_class, settings=settings)
    return Plan(
        title=title,
        config=config,
        method=method,
        image_size=size,
        device_memory_gib=device_memory_gib,
        encoder_parameters=sum(layer.parameters for layer in cost_model(config).layers(config, size, requested)),
        head_parameters=sum(layer.parameters for layer in method_class.head_layers(config, settings, size, requested)),
        forward_flops=round(flops.forward),
        training_flops=round(flops.training),
        requested=requested,
        memory=memory(requested),
        recommended=recommended,
        recommended_memory=memory(recommended) if recommended else None,
        largest_batch=largest,
    )


def check_plan(image_size: Size, device_memory_gib: float, requested: Setup, images_per_input: int) -> None:
    """Check the numbers of a plan.

    Raises:
        ValueError: for one that is out of range, and for a batch that the encoder cannot take.
    """
    if min(image_size) < 1:
        raise ValueError(f"image_size is {image_size[0]}×{image_size[1]} px: give positive numbers")
    if device_memory_gib <= 0:
        raise ValueError(f"device_memory_gib is {device_memory_gib:g}: give a positive number")
    if requested.batch_per_device % images_per_input:
        images, verb = counted(requested.batch_per_device, "image"), "does" if requested.batch_per_device == 1 else "do"
        raise ValueError(
            f"{images} per device {verb} not divide by {images_per_input}, which the encoder takes as one: give a batch "
            f"that is a multiple of {images_per_input * requested.devices}"
        )


def plan_for(
    preset: str,
    image_size: int | Size,
    devices: int = 1,
    batch_size: int | None = None,
    precision: str = "bf16-mixed",
    device_memory_gib: float = 80.0,
    encoder: Mapping[str, Any] | None = None,
    method: str | None = None,
    model: Mapping[str, Any] | None = None,
    **setup: Any,
) -> Plan:
    """`plan` of a preset, with the defaults of `simmim pretrain` for what is left open.

    Args:
        image_size: pixels, one number or (height, width).
        batch_size: images per optimizer step, over all devices.
        encoder: settings of the encoder that replace the preset's; those that follow from the image size do so by default.
        model: settings of the method, as `model` of pre-training: the encoder's and how it is executed among them.
        setup: `strategy`, `checkpoint_activations`, `sequential_attention` and `device` of `Setup`.

    Raises:
        ValueError: for an unknown preset or setting of the encoder, naming the nearest known one; for a setting out of
            range, and for images that the method refuses.
    """
    size = as_size(image_size)
    encoder, model, setup = take_apart(encoder or {}, model or {}, setup)
    config = config_at(preset, size, encoder)
    method = method or default_method()
    settings = resolve_method(method, model, size, config)
    requested = setup_of(config, settings, devices, batch_size, precision, **setup)
    return plan(config, size, requested, device_memory_gib, title=preset, method=method, settings=settings)


def take_apart(
    encoder: Mapping[str, Any], model: Mapping[str, Any], setup: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of the encoder, of the method alone, and of `Setup`: pre-training has all of them in `model`.

    Raises:
        ValueError: for a value of another type.
    """
    check_types(MethodSettings, model)
    own = {name: value for name, value in model.items() if name not in ("encoder", *EXECUTION)}
    executed = {name: model[name] for name in EXECUTION if name in model}
    return {**model.get("encoder", {}), **encoder}, own, {**executed, **setup}


def check_types(settings: type[MethodSettings], values: Mapping[str, Any]) -> None:
    """Check the types of settings; the names are checked elsewhere.

    Raises:
        ValueError: naming what to give.
    """
    hints = typing.get_type_hints(settings)
    for name, value in values.items():
        hint = hints.get(name)
        origin = typing.get_origin(hint)
        allowed = typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (origin or hint,)
        expected = [words for kind, words in TYPES.items() if kind in allowed]
        is_one = type(value) in allowed or (type(value) is int and float in allowed)  # true is no number
        if expected and not is_one:
            raise ValueError(f"model.{name} is {value!r}: give {' or '.join(expected)}")


def config_at(preset: str, image_size: Size, encoder: Mapping[str, Any]) -> EncoderConfig:
    """The architecture of a preset for images of a size, with what is given of it.

    Raises:
        ValueError: as `plan_for`.
    """
    config = preset_config(preset)
    if min(image_size) < config.patch_size:
        height, width = image_size
        raise ValueError(f"image_size is {height}×{width} px: give at least a patch of {config.patch_size} px")
    return with_fields(config, **{**config.fields_for_size(image_size), **encoder})


def setup_of(
    config: EncoderConfig, settings: MethodSettings, devices: int, batch_size: int | None, precision: str, **setup: Any
) -> Setup:
    """A setup, with pre-training's default batch where none is given.

    Raises:
        ValueError: for a setting out of range.
    """
    if devices < 1:
        raise ValueError(f"devices is {devices}: give 1 or more")
    if batch_size is None:
        batch_size = default_batch_size("cuda", config.is_small, settings.images_per_input)
    return Setup(math.ceil(batch_size / devices), devices, precision, **setup)


def resolve_method(method: str, model: Mapping[str, Any], image_size: Size, config: EncoderConfig) -> MethodSettings:
    """The settings of a method of that name, resolved as pre-training would.

    Raises:
        ValueError: for an unknown method or setting, and for images and encoders that the method refuses.
    """
    kind = method_named(method).settings_class
    known = [item.name for item in fields(kind)]
    for name in model:
        if name in kind.absent:
            raise ValueError(f"model.{name} is no setting of {method}: {kind.absent[name]}")
        if name not in known:
            raise ValueError(f"unknown setting 'model.{name}'{did_you_mean(name, known)}")
    check_types(kind, model)
    return kind(**model).resolve(image_size, config)


def setups_to_try(requested: Setup, sequential_attention: int | None, supports_sharding: bool = True) -> list[Setup]:
    """The requested setup, then with options that save memory, the cheapest first.

    Activation checkpoints cost a third more time, FSDP costs traffic between devices, sequential attention costs time again.
    The last setup has all of them.

    Args:
        sequential_attention: what to recommend; None where the encoder has none.
        supports_sharding: whether the method trains under FSDP.
    """
    checkpointed = replace(requested, checkpoint_activations=True)
    shards = requested.devices > 1 and supports_sharding
    sharded = replace(checkpointed, strategy="fsdp" if shards else requested.strategy)
    setups = [requested, checkpointed, sharded]
    if sequential_attention is not None:
        at_once = requested.sequential_attention or sequential_attention
        setups += [replace(setup, sequential_attention=at_once) for setup in (checkpointed, sharded)]
    return setups


def choose_setup(setups: Sequence[Setup], fits: Callable[[Setup], bool], multiple: int = 1) -> tuple[Setup | None, int]:
    """The first setup that fits, else the last one with a smaller batch, or None; and the largest batch that fits.

    Args:
        multiple: of which batches per device are multiples.
    """
    for setup in setups:
        if fits(setup):
            return setup, largest_batch(setup, fits) // multiple * multiple
    largest = largest_batch(setups[-1], fits) // multiple * multiple
    return replace(setups[-1], batch_per_device=largest) if largest else None, largest


def largest_batch(setup: Setup, fits: Callable[[Setup], bool], limit: int = MAX_BATCH) -> int:
    """The largest batch per device that fits, up to twice `limit`; 0 where not even one image does."""
    low, high = 0, 1
    while high <= limit and fits(replace(setup, batch_per_device=high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(setup, batch_per_device=middle)) else (low, middle)
    return low
