"""The plan as a table with units, and as advice."""

from __future__ import annotations

from collections.abc import Callable

from simmim.encoders.cost import Setup
from simmim.planning.plan import GIB, USABLE_SHARE, Plan
from simmim.planning.step import Memory

SETUP_ROWS: dict[str, Callable[[Setup], str]] = {
    "images per device": lambda setup: f"{setup.batch_per_device:,}",
    "images per optimizer step": lambda setup: f"{setup.batch_per_device * setup.devices:,}",
    "strategy": lambda setup: setup.strategy if setup.devices > 1 else "one device",
    "checkpoint_activations": lambda setup: "on" if setup.checkpoint_activations else "off",
    "sequential_attention": lambda setup: (
        "off" if setup.sequential_attention is None else f"{setup.sequential_attention} at once"
    ),
}
# Fields of `Memory`.
MEMORY_ROWS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "exchange": "exchange between devices",
    "activations": "activations kept",
    "working": "working memory",
    "peak": "peak",
}


def render(plan: Plan) -> str:
    """The whole report: the model, the requested and the recommended setup side by side, and advice."""
    sides: list[tuple[Setup, Memory]] = [(plan.requested, plan.memory)]
    if plan.recommended is not None and plan.recommended_memory is not None and plan.recommended != plan.requested:
        sides.append((plan.recommended, plan.recommended_memory))
    usable = plan.device_memory_gib * USABLE_SHARE
    rows: list[tuple[str, list[str]]] = [("", ["as requested", "recommended"][: len(sides)])]
    rows += [(name, [value(setup) for setup, _ in sides]) for name, value in SETUP_ROWS.items()]
    rows.append(("memory per device, GiB", []))
    rows += [
        (f"  {name}", [f"{getattr(memory, field) / GIB:,.2f}" for _, memory in sides]) for field, name in MEMORY_ROWS.items()
    ]
    fits = ["yes" if memory.peak <= usable * GIB else "no" for _, memory in sides]
    rows.append((f"  fits in {usable:,.1f} of {plan.device_memory_gib:g}", fits))
    table = [(f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells)).rstrip() for name, cells in rows]
    return "\n".join([*heading(plan), "", *table, "", advice(plan)])


def heading(plan: Plan) -> list[str]:
    """Model, parameters and FLOPs, a line each."""
    devices = f"{plan.requested.devices} device{'s' if plan.requested.devices > 1 else ''}"
    return [
        f"{plan.title}, {plan.image_size[0]} × {plan.image_size[1]} px, {plan.config.describe()}, "
        f"{plan.requested.precision}, {devices}",
        f"{plan.encoder_parameters / 1e6:,.1f} M parameters in the encoder, {plan.head_parameters / 1e6:,.2f} M in the head",
        f"{plan.forward_flops / 1e9:,.1f} GFLOPs per image forward, "
        f"{plan.training_flops / 1e9:,.1f} in training as requested",
    ]


def advice(plan: Plan) -> str:
    """What to do, in a sentence or two."""
    if plan.recommended is None:
        return "Not even one image per device fits: give a smaller model, image or window, or more devices."
    requested, recommended, changes = plan.requested, plan.recommended, []
    if recommended.checkpoint_activations and not requested.checkpoint_activations:
        changes.append("checkpoint_activations")
    if recommended.strategy != requested.strategy:
        changes.append(recommended.strategy)
    if recommended.sequential_attention and requested.sequential_attention is None:
        changes.append(f"sequential_attention {recommended.sequential_attention}")
    if recommended.batch_per_device < requested.batch_per_device:
        changes.append(f"a batch of {recommended.batch_per_device * recommended.devices:,}")
    verdict = f"To fit, use {', '.join(changes)}." if changes else "It fits as requested."
    largest = plan.largest_batch
    return (
        f"{verdict} The largest batch that then fits: {largest:,} images per device, "
        f"{largest * requested.devices:,} in total."
    )
