"""What a run needs whose images grow in its course: each size as a run at that size, with options that fit all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from simmim.defaults import as_size
from simmim.encoders.base import EncoderConfig, with_fields
from simmim.encoders.cost import Setup
from simmim.growing_sizes import as_given, check_count, check_growth, check_shares, naming, shares_of
from simmim.methods.base import MethodSettings
from simmim.methods.registry import default_method, method_named
from simmim.planning.plan import (
    GIB,
    USABLE_SHARE,
    Plan,
    choose_setup,
    config_at,
    plan,
    resolve_method,
    setup_of,
    setups_to_try,
    take_apart,
)
from simmim.planning.step import cost_model, step_memory


@dataclass(frozen=True)
class Stage:
    """The part of a run at one image size.

    Attributes:
        share: of the run's steps, in (0, 1].
        settings: of the method at that size.
        plan: of that size, with the options that fit the whole run.
    """

    share: float
    settings: MethodSettings
    plan: Plan


@dataclass(frozen=True)
class GrowingPlan:
    """What a run needs whose images grow.

    Attributes:
        stages: in the run's order.
    """

    stages: tuple[Stage, ...]

    @property
    def largest(self) -> Plan:
        """Of the size that needs the most memory as requested."""
        return max((stage.plan for stage in self.stages), key=lambda plan: plan.memory.peak)

    @property
    def training_flops(self) -> float:
        """Per image, the mean over the run."""
        return sum(stage.share * stage.plan.training_flops for stage in self.stages)

    @property
    def relative_flops(self) -> float:
        """Those of a run over those with the last size throughout."""
        return self.training_flops / self.stages[-1].plan.training_flops


def plan_growing(
    preset: str,
    image_sizes: Sequence[int | Sequence[int]],
    image_size_shares: Sequence[float] | None = None,
    devices: int = 1,
    batch_size: int | None = None,
    precision: str = "bf16-mixed",
    device_memory_gib: float = 80.0,
    encoder: Mapping[str, Any] | None = None,
    method: str | None = None,
    model: Mapping[str, Any] | None = None,
    **setup: Any,
) -> GrowingPlan:
    """`plan_for` of a preset whose images grow, as `simmim pretrain` would train it: windows and mask units are those of a
    run at each size, unless they are given.

    Args:
        image_sizes, image_size_shares: as of `simmim pretrain`.

    Raises:
        ValueError: for sizes that do not grow, shares that are none, a size that the encoder or the method refuses, which is
            named; as `plan_for`.
    """
    sizes = tuple(as_given(size) for size in image_sizes)
    check_growth(sizes)
    if image_size_shares is not None:
        check_count("image_size_shares", image_size_shares, sizes)
    check_shares(image_size_shares)
    method = method or default_method()
    encoder, model, setup = take_apart(encoder or {}, model or {}, setup)
    parts = parts_at(preset, sizes, encoder, method, model)
    config, settings = parts[-1]
    requested = setup_of(config, settings, devices, batch_size, precision, **setup)
    plans = []
    for size, part in zip(sizes, parts):
        with naming(size):
            plans.append(plan(part[0], size, requested, device_memory_gib, preset, method, part[1]))
    plans = with_options(plans, [part[1] for part in parts], requested)
    shares = shares_of(sizes, image_size_shares)
    return GrowingPlan(tuple(Stage(share, part[1], one) for share, part, one in zip(shares, parts, plans, strict=True)))


def parts_at(
    preset: str, sizes: Sequence[Any], encoder: Mapping[str, Any], method: str, model: Mapping[str, Any]
) -> list[tuple[EncoderConfig, MethodSettings]]:
    """The architecture and the method's settings at each size. Of the architecture what the weights allow differs.

    Raises:
        ValueError: naming the size.
    """
    last, parts = config_at(preset, as_size(sizes[-1]), encoder), []
    for size in sizes:
        with naming(size):
            own = config_at(preset, as_size(size), encoder)
            config = with_fields(last, **{name: getattr(own, name) for name in last.changeable_fields})
            parts.append((config, resolve_method(method, model, as_size(size), config)))
    return parts


def with_options(plans: Sequence[Plan], settings: Sequence[MethodSettings], requested: Setup) -> list[Plan]:
    """The plans of all sizes with the first options that fit every one of them, and the largest batch that does."""
    first, kind = plans[0], method_named(plans[0].method)
    steps = [
        partial(step_memory, one.config, one.image_size, method=kind, settings=own) for one, own in zip(plans, settings)
    ]
    usable = first.device_memory_gib * USABLE_SHARE * GIB
    at_once = [cost_model(one.config).default_sequential_attention(one.config, one.image_size) for one in plans]
    smallest = None if None in at_once else min(at_once)  # type: ignore[type-var]
    setups = setups_to_try(requested, smallest, kind.supports_sharding)
    recommended, largest = choose_setup(
        setups, lambda setup: all(memory(setup=setup).peak <= usable for memory in steps), settings[-1].images_per_input
    )
    return [
        replace(
            one,
            recommended=recommended,
            recommended_memory=memory(setup=recommended) if recommended else None,
            largest_batch=largest,
        )
        for one, memory in zip(plans, steps)
    ]
