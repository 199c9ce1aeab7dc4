"""What a weight file is: the text of `simmim inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.fitting import build_encoder, own_parts
from simmim.checkpoints.formats import registry as formats
from simmim.checkpoints.formats.base import Format
from simmim.checkpoints.reading import read
from simmim.encoders import registry
from simmim.encoders.heads import is_attentive
from simmim.messages import counted


def inspect(path: str | Path, **overrides: Any) -> str:
    """Format, architecture, provenance, the loading report and the formats that it can be exported as, one per line.

    Args:
        overrides: as of `load_encoder`.

    Raises:
        ValueError: as `load_encoder`, if it does not load.
    """
    checkpoint = read(path, **overrides)
    saved = build_encoder(checkpoint, **overrides)
    config = saved.encoder.config
    family = registry.family_of(config)
    size = registry.preset_name(config) or "of no preset"
    stages = zip(config.channels, config.strides)
    rows = [
        ("format", f"{checkpoint.format} ({formats.format_named(checkpoint.format).title})"),
        ("holds", "; ".join(held_parts(checkpoint))),
        ("encoder", f"{family.title} {size}, {saved.report.values / 1e6:.2f} M values"),
        ("stages", ", ".join(f"{channels} channels at stride {stride} px" for channels, stride in stages)),
        ("settings", config.describe()),
        ("images", saved.preprocessing.describe()),
        ("from", origin_in_words(checkpoint.provenance) or "not recorded"),
        *saved.report.rows(),
        ("exports as", "; ".join(export_outlook(checkpoint, formats.format_named(name)) for name in formats.names())),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def origin_in_words(provenance: Mapping[str, Any]) -> str:
    """Names and values of what is known, those of an earlier training in parentheses."""
    known = {name: value for name, value in provenance.items() if value is not None}
    return ", ".join(
        f"{name} ({origin_in_words(value)})" if isinstance(value, Mapping) else f"{name} {value}"
        for name, value in known.items()
    )


def held_parts(checkpoint: Checkpoint) -> list[str]:
    """Encoder, the method's own weights and head, as far as there are such."""
    parts = ["encoder"]
    if checkpoint.pretraining:
        parts.append(own_parts(checkpoint))
    if checkpoint.head:
        names = ", ".join(checkpoint.classes[:5]) + (", …" if len(checkpoint.classes) > 5 else "")
        kind = "attentive head" if is_attentive(checkpoint.head) else "head"
        parts.append(f"{kind} of {counted(len(checkpoint.classes), 'class')}: {names}")
    return parts


def export_outlook(checkpoint: Checkpoint, format: Format) -> str:
    """The format's name, with what to know about it in parentheses."""
    try:
        notes = format.limits(checkpoint, format.default_form(checkpoint))
    except ValueError as error:
        return f"not {format.name} ({error})"
    return f"{format.name} ({', '.join(notes)})" if notes else format.name
