"""What a pre-training run says: its summary, its last lines, and where an exported encoder comes from."""

from __future__ import annotations

import math
from pathlib import Path

import pytorch_lightning as pl

from simmim.defaults import CPU_SIDE_PX, default_image_size
from simmim.encoders import registry
from simmim.messages import counted
from simmim.methods.base import Method
from simmim.methods.registry import method_named
from simmim.pretrain.image_sizes import describe_sizes
from simmim.pretrain.labeled_probe import LabeledProbe
from simmim.pretrain.settings import PretrainSettings
from simmim.pretrain.validation import HeldOutLoss, trend
from simmim.training.run import TrainingRun
from simmim.training.run_folder import CONFIG, as_yaml
from simmim.training.trainer import machine


def summary(
    settings: PretrainSettings,
    model: Method,
    count: int,
    steps: int,
    trainer: pl.Trainer,
    resumed: Path | None,
    probe: LabeledProbe | None = None,
    validation: HeldOutLoss | None = None,
) -> str:
    """What is about to happen, and the resolved configuration."""
    encoder = model.encoder
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    height, width = settings.size
    peak = settings.optim.lr * settings.batch_size / 512
    kind = {1: "gray", 3: "color"}.get(settings.data.channels, counted(settings.data.channels or 0, "channel"))
    lines = [
        f"# {settings.out}/{CONFIG}",
        as_yaml(settings).rstrip(),
        "",
        f"images   {images_text(settings, count)}, {kind}, as {height}×{width} px",
        f"encoder  {registry.family_of(encoder.config).title} {registry.preset_name(encoder.config) or 'of its own size'}, "
        f"{parameters:.2f} M parameters, {encoder.config.describe()}",
        f"method   {', '.join(filter(None, (model.title, model.describe(settings.size))))}",
        f"training {counted(settings.epochs, 'epoch')}, {counted(steps, 'step')} of "
        f"{counted(settings.batch_size, 'image')}, peak learning rate {peak:.3g}, {settings.precision} on "
        f"{machine(trainer, encoder)}",
    ]
    if values := settings.data.reading.describe():
        lines.insert(-2, f"values   {values.removeprefix('values ')}")
    if settings.image_sizes is not None:
        lines.append(f"sizes    {describe_sizes(settings, steps)}; pictures, probe and held-out loss at the last one")
    if validation:
        lines.append(f"validate {validation}")
    if probe:
        lines.append(f"probe    {probe}")
    if resumed:
        lines.append(f"resuming from {resumed}")
    return "\n".join(lines)


def images_text(settings: PretrainSettings, count: int) -> str:
    """The number of images of an epoch, or of tiles and what they are."""
    tiles = settings.data.tiles
    if tiles is None:
        return f"{count:,}"
    where = f" of {tiles.pixel_size:g} each in the files' unit" if tiles.pixel_size else ""
    where = f" at level {tiles.level}" if tiles.level else where
    return f"{counted(count, 'tile')} of {tiles.size_px} px{where} an epoch"


def size_reason(given: PretrainSettings, resolved: PretrainSettings, short_side_px: int, device: str) -> list[str]:
    """Why images have the size that they have, where the machine and not the images decided: a line or none.

    Args:
        given, resolved: settings before they were resolved, and after.
        short_side_px: of the images' files.
        device: cuda, mps or cpu.
    """
    on_gpu = default_image_size(short_side_px, "cuda")
    if given.image_size is not None or given.init != "none" or resolved.image_size != CPU_SIDE_PX or device != "cpu":
        return []
    if on_gpu == CPU_SIDE_PX:
        return []
    return [
        f"chosen   {CPU_SIDE_PX} px, the most on a CPU: {on_gpu} px (--image-size {on_gpu}) would take several times as long"
    ]


def closing_lines(run: TrainingRun) -> list[str]:
    """What the course of the validation loss says, of which step the encoder is, and what the probe on labels says."""
    lines: list[str] = []
    for part in run.callbacks:
        if isinstance(part, HeldOutLoss):
            lines.append(trend(part.measures))
            finite = [measure for measure in part.measures if math.isfinite(measure[1])]
            if finite:
                step, loss = min(finite, key=lambda measure: measure[1])
                lines.append(f"{run.folder / 'encoder'} is of the lowest validation loss, {loss:.4g} at step {step:,}")
        elif isinstance(part, LabeledProbe):
            lines += part.closing_lines(run.num_images)
    return lines


def provenance(settings: PretrainSettings, method: dict, count: int, steps: int) -> dict:
    """What an exported encoder says of where it comes from."""
    from simmim import __version__

    return {
        "toolkit": f"simmim {__version__}",
        "method": method_named(settings.method).title,
        "data": data_name(settings.data.path),
        "images": count,
        "preset": registry.preset_name(settings.encoder_config()),
        **({"init": Path(settings.init).name} if settings.init != "none" else {}),
        "steps": steps,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        **method,
    }


def data_name(path: str | list[str]) -> str:
    """What a model card calls the images: the names of their folders without the path, which is private."""
    paths = [path] if isinstance(path, str) else path
    return ", ".join(Path(part).name for part in paths)
