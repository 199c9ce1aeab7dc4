"""The commands about models and their files: export, inspect, plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from simmim.cli.arguments import parse


@dataclass(frozen=True)
class ExportOptions:
    """Write an encoder or a classifier in the format of another library, ready to load.

    Args:
        run: run folder, or an encoder in any known format.
        out: folder to create.
        format: one of the known formats.
        form: encoder, classifier, detector (of a run of simmim finetune detection, as safetensors or onnx, where suppression
            stays outside), or the name of the method of pre-training for the encoder with the method's own weights
            (simmim: mask token and decoder); the format's usual one by default.
        image_size: pixels, one number or height and width, for formats with a fixed size; the size in training by default.
        window_size: in training, for files that do not store it.
        features: for onnx, pooled, or stages for the feature map of every stage.
        dynamic_size: for onnx, accept images of any size.
        license: for the model card; unknown by default.
        push_to_hub: repository of the Hugging Face hub, owner/name, that receives the folder, made private where it does not
            exist. It needs a license, which is never guessed.
    """

    run: str
    out: str
    format: str = "safetensors"
    form: str | None = None
    image_size: int | tuple[int, int] | None = None
    window_size: int | None = None
    features: str = "pooled"
    dynamic_size: bool = False
    license: str | None = None
    push_to_hub: str | None = None


def run_export(words: Sequence[str]) -> None:
    """simmim export"""
    from simmim.checkpoints.formats.registry import names

    helps = {"format": f"{', '.join(names())}; the first is this toolkit's own."}
    options = parse("export", ExportOptions, words, helps=helps)
    from simmim.checkpoints import read
    from simmim.checkpoints.export import export
    from simmim.defaults import as_size
    from simmim.finetune.registry import TASKS, task_named
    from simmim.hub import check_push, push

    if options.push_to_hub:
        check_push(options.push_to_hub, options.license or read(options.run, **window_of(options)).provenance.get("license"))
    size = None if options.image_size is None else as_size(options.image_size)
    tasks = {name: task_named(name) for name in TASKS}
    own = next((task for task in tasks.values() if options.form is not None and task.form == options.form), None)
    if own is not None:
        exported = own.export(options.run, options.out, options.format, size, options.license)
    else:
        exported = export(
            read(options.run, **window_of(options)),
            options.format,
            options.out,
            options.form,
            size,
            options.license,
            options.features,
            options.dynamic_size,
        )
    for note in exported.notes:
        print(f"note: {note}")
    for name, task in tasks.items():
        if task is not own and task.recognizes(options.run):
            exports = f", and --form {task.form} exports it" if task.form else ""
            print(f"note: the {name} head is left out: simmim predict reads it from the run{exports}")
    print(f"exported the {exported.contents} to {exported.folder}; load it with\n\n{exported.code}")
    if options.push_to_hub:
        print(f"\npushed to {push(exported.folder, options.push_to_hub)}")


@dataclass(frozen=True)
class InspectOptions:
    """What a weight file or folder is: format, architecture, provenance, whether it loads, what it can be exported as.

    Args:
        path: weight file, exported folder or run; also without its flag.
        window_size: in training, for files that do not store it.
    """

    path: str
    window_size: int | None = None


def run_inspect(words: Sequence[str]) -> None:
    """simmim inspect PATH"""
    options = parse("inspect", InspectOptions, words, positional="path")
    from simmim.checkpoints.inspect import inspect

    print(inspect(options.path, **window_of(options)))


def window_of(options: ExportOptions | InspectOptions) -> dict[str, int]:
    """The window size as a keyword, where it is given."""
    return {} if options.window_size is None else {"window_size": options.window_size}


@dataclass(frozen=True)
class PlanOptions:
    """The memory and time that pre-training a model needs per device, and the settings with which it fits.

    Args:
        preset: size of the encoder.
        image: pixels, one number or height and width.
        image_sizes: in place of image, sizes that follow one another in the run, as of pretrain: FLOPs, memory and time of
            each, and options that fit all.
        image_size_shares: share of the run's steps at each of image_sizes; by default equal shares.
        devices: number of devices.
        batch: images per optimizer step, over all devices; the default of pretrain by default.
        window: side of the attention windows in tokens, short for encoder.window_size.
        encoder: settings of the encoder that replace the preset's, as model.encoder of pretrain.
        method: the method of pre-training; the default of pretrain by default.
        model: settings of the method, as model of pretrain: --model.share 3.
        precision: bf16-mixed or 32-true.
        device_memory_gib: memory of one device.
        tflops: 10¹² operations in matrix products that a device does in a second of training, for images a second: a third
            to a half of what its maker tells is usual.
        images_seen: images that the run shows its encoder, epochs times their number, for its time; it needs tflops.
    """

    preset: str
    image: int | tuple[int, int] | None = None
    image_sizes: tuple[int | tuple[int, int], ...] | None = None
    image_size_shares: tuple[float, ...] | None = None
    devices: int = 1
    batch: int | None = None
    window: int | None = None
    encoder: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "bf16-mixed"
    device_memory_gib: float = 80.0
    tflops: float | None = None
    images_seen: int | None = None


def run_plan(words: Sequence[str]) -> None:
    """simmim plan"""
    options = parse("plan", PlanOptions, words)
    if (options.image is None) == (options.image_sizes is None):
        raise ValueError("give --image, or --image_sizes for images that grow in the course of the run, and not both")
    if options.image_size_shares is not None and options.image_sizes is None:
        raise ValueError("image_size_shares needs sizes that follow one another: give image_sizes, as [96, 128, 192]")
    from simmim.planning.growing import plan_growing
    from simmim.planning.plan import plan_for
    from simmim.planning.report import Rates, render, render_growing

    rates = Rates(options.tflops, options.images_seen)
    shared = {
        "devices": options.devices,
        "batch_size": options.batch,
        "precision": options.precision,
        "device_memory_gib": options.device_memory_gib,
        "encoder": options.encoder if options.window is None else {**options.encoder, "window_size": options.window},
        "method": options.method,
        "model": options.model,
    }
    if options.image_sizes is not None:
        print(render_growing(plan_growing(options.preset, options.image_sizes, options.image_size_shares, **shared), rates))
    else:
        print(render(plan_for(options.preset, options.image, **shared), rates))
