"""What a weight file is: the text of `simmim inspect`."""

from __future__ import annotations

from pathlib import Path

from simmim.checkpoints.checkpoint import FORMAT_NAMES, Checkpoint, build_encoder
from simmim.checkpoints.export import FORMATS, chosen_form, limits
from simmim.checkpoints.reading import read
from simmim.encoders import registry


def inspect(path: str | Path, **overrides) -> str:
    """Format, architecture, provenance, the loading report and the formats it can be exported in, a line each.

    Args:
        overrides: as of `load_encoder`.

    Raises:
        ValueError: as `load_encoder`, when it does not load.
    """
    checkpoint = read(path, **overrides)
    saved = build_encoder(checkpoint, **overrides)
    config, preprocessing = saved.encoder.config, saved.preprocessing
    height, width = preprocessing.image_size
    parts = ["encoder", *(["mask token and decoder"] if checkpoint.pretraining else [])]
    if checkpoint.head:
        named = ", ".join(checkpoint.classes[:5]) + (", …" if len(checkpoint.classes) > 5 else "")
        parts.append(f"head of {len(checkpoint.classes)} classes: {named}")
    known = [f"{name} {value}" for name, value in checkpoint.provenance.items() if value is not None]
    stages = ", ".join(
        f"{depth} × {dim} channels at stride {stride}"
        for depth, dim, stride in zip(config.depths, config.dims, config.strides)
    )
    rows = [
        ("format", f"{checkpoint.format}, as of {FORMAT_NAMES[checkpoint.format]}"),
        ("holds", "; ".join(parts)),
        ("size", f"{registry.preset_name(config) or 'none of the presets'}, {saved.report.values / 1e6:.2f} M parameters"),
        ("stages", stages),
        ("heads", f"{list(config.num_heads)}, patch {config.patch_size} px"),
        ("window", f"{config.window_size}, pre-trained with {list(config.pretrained_window_sizes)}"),
        (
            "images",
            f"{height}×{width} px, {config.in_channels} channels, {preprocessing.interpolation}, "
            + (f"central crop {preprocessing.crop:g}" if preprocessing.fit == "crop" else "squashed"),
        ),
        ("from", ", ".join(known) or "not recorded"),
        *((line[:10].strip(), line[11:]) for line in str(saved.report).splitlines()),
        ("exports as", "; ".join(exportable(checkpoint, format) for format in FORMATS)),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def exportable(checkpoint: Checkpoint, format: str) -> str:
    """The format's name, with what to know about it in brackets."""
    try:
        notes = limits(checkpoint, format, chosen_form(checkpoint, format, None))
    except ValueError as error:
        return f"not {format} ({error})"
    return f"{format} ({', '.join(notes)})" if notes else format
