"""The plan as a table with units, and as advice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simmim.encoders.cost import Setup
from simmim.growing_sizes import size_text
from simmim.messages import counted, gflops_text, length_text
from simmim.planning.growing import GrowingPlan
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


@dataclass(frozen=True)
class Rates:
    """What times follow from.

    Args:
        tflops: 10¹² floating-point operations in matrix products that a device does in a second of training; None for
            unknown, where no times are reported.
        images: that the run shows its encoder, epochs times their number; None for unknown.

    Raises:
        ValueError: for numbers that are not positive, and for images without a rate.
    """

    tflops: float | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        if self.tflops is not None and self.tflops <= 0:
            raise ValueError(f"tflops is {self.tflops:g}: give a positive number")
        if self.images is not None and self.images <= 0:
            raise ValueError(f"images_seen is {self.images}: give a positive number")
        if self.images is not None and self.tflops is None:
            raise ValueError("images_seen needs a rate for their time: give tflops, what a device reaches in training")


NO_RATES = Rates()


def render(plan: Plan, rates: Rates = NO_RATES) -> str:
    """The whole report: the model, the requested and the recommended setup side by side, and advice."""
    time = [time_line(plan.training_flops, plan.requested.devices, rates)] if rates.tflops else []
    return "\n".join([*heading(plan), *time, "", *table(plan), "", advice(plan)])


def render_growing(growing: GrowingPlan, rates: Rates = NO_RATES) -> str:
    """The report of a run whose images grow: each size, the setups at the size that needs most memory, and advice."""
    last, largest = growing.stages[-1].plan, growing.largest
    sizes = ", ".join(size_text(stage.plan.image_size) for stage in growing.stages)
    first_line, parameters, _ = heading(last, f"images of {sizes} px in one run")
    mean = (
        f"{gflops_text(growing.training_flops)} GFLOPs per image in training as requested, the mean of the run: "
        f"{growing.relative_flops:.2f} of those of {size_text(last.image_size)} px throughout"
    )
    time = [time_line(growing.training_flops, last.requested.devices, rates)] if rates.tflops else []
    at = f"setup at {size_text(largest.image_size)} px, where memory is largest"
    lines = [first_line, parameters, mean, *time, "", *stage_table(growing, rates), "", at, *table(largest), ""]
    return "\n".join([*lines, advice(largest)])


def stage_table(growing: GrowingPlan, rates: Rates) -> list[str]:
    """A row for each size: its share of the steps, FLOPs, memory, time, and what follows the size."""
    time_heading = "time" if rates.images else "1 M images"
    cells = [
        ("image size", "steps", "GFLOP", "training", "FLOPs", "peak, GiB", *([time_heading] if rates.tflops else []), "")
    ]
    for stage in growing.stages:
        one, unit = stage.plan, getattr(stage.settings, "mask_unit", None)
        memory = one.recommended_memory or one.memory
        follows = [f"{name.removesuffix('_size')} {getattr(one.config, name)}" for name in one.config.changeable_fields]
        follows += [f"mask unit {unit} px"] if unit else []
        flops = stage.share * one.training_flops
        time = [time_text(flops, one.requested.devices, rates)] if rates.tflops else []
        numbers = (f"{stage.share:.0%}", gflops_text(one.forward_flops), gflops_text(one.training_flops))
        of_all = f"{flops / growing.training_flops:.0%}"
        size = f"{size_text(one.image_size)} px"
        cells.append((size, *numbers, of_all, f"{memory.peak / GIB:,.2f}", *time, ", ".join(follows)))
    return [f"{name:<14}" + "".join(f"{cell:>11}" for cell in row) + f"   {last}".rstrip() for name, *row, last in cells]


def time_line(training_flops: float, devices: int, rates: Rates) -> str:
    """Images a second at a device's rate, and how long a number of images takes."""
    per_second = rates.tflops * 1e12 * devices / training_flops  # type: ignore[operator]
    line = f"{per_second:,.0f} images/s at {rates.tflops:g} TFLOP/s on each device"
    if rates.images is None:
        return line
    return f"{line}, {counted(rates.images, 'image')} in {length_text(rates.images / per_second)}"


def time_text(flops: float, devices: int, rates: Rates) -> str:
    """The time of FLOPs, which are a share of those of a mean image; without a number of images that of a million."""
    return length_text((rates.images or 10**6) * flops / (rates.tflops * 1e12 * devices))  # type: ignore[operator]


def table(plan: Plan) -> list[str]:
    """The requested and the recommended setup side by side, a line for each of their parts and of their memory."""
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
    return [(f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells)).rstrip() for name, cells in rows]


def heading(plan: Plan, images: str = "") -> list[str]:
    """Model, parameters and FLOPs, a line each.

    Args:
        images: in place of the plan's own size.
    """
    devices = f"{plan.requested.devices} device{'s' if plan.requested.devices > 1 else ''}"
    return [
        f"{plan.title}, {images or f'{plan.image_size[0]} × {plan.image_size[1]} px'}, {plan.config.describe()}, "
        f"{plan.requested.precision}, {devices}",
        f"{plan.encoder_parameters / 1e6:,.1f} M parameters in the encoder, {plan.head_parameters / 1e6:,.2f} M in the head",
        f"{gflops_text(plan.forward_flops)} GFLOPs per image forward, "
        f"{gflops_text(plan.training_flops)} in training as requested",
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
        f"{verdict} The largest batch that then fits: {counted(largest, 'image')} per device, "
        f"{largest * requested.devices:,} in total."
    )
