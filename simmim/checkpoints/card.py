"""Model cards: what an exported folder says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER, Format
from simmim.encoders import registry
from simmim.encoders.heads import is_attentive
from simmim.hub import PREFIX, split_id
from simmim.methods.registry import METHODS, method_named

# Entries of the provenance that have sections of their own; all others are the recipe.
DATA = ("data", "images", "labels_per_class", "classes")
METRICS = ("metrics", "accuracy", "macro_f1", "mean_iou", "ap", "loss", "validation")


def model_card(checkpoint: Checkpoint, format: Format, form: str, notes: tuple[str, ...], license: str) -> str:
    """A README.md with the front matter that model hubs read: license, data, recipe, metrics, how to load it.

    Args:
        notes: as from `Format.limits`.
    """
    config, preprocessing, provenance = checkpoint.config, checkpoint.preprocessing, checkpoint.provenance
    family = registry.family_of(config)
    size = registry.preset_name(config) or f"with channels {list(config.channels)}"
    data = {name: provenance[name] for name in DATA if name in provenance}
    metrics = {name: provenance[name] for name in METRICS if name in provenance}
    recipe = {name: value for name, value in provenance.items() if name not in (*data, *metrics, "license")}
    lines = [
        "---",
        f"license: {license}",
        f"library_name: {format.library}",
        f"pipeline_tag: {'image-classification' if form == CLASSIFIER else 'image-feature-extraction'}",
        f"tags: [{family.name}, {checkpoint.method}, self-supervised]",
        *further_front_matter(provenance, metrics),
        "---",
        "",
        f"# {family.title} {size}, {provenance.get('method', form)}",
        "",
        f"{opening(checkpoint, form)}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| license | {license} |",
        f"| stages | {len(config.channels)}, channels {list(config.channels)}, strides {list(config.strides)} px |",
        f"| encoder | {config.describe()} |",
        f"| images | {preprocessing.describe()}, values in [0, 1], mean {rounded(preprocessing.mean)}, "
        f"std {rounded(preprocessing.std)} |",
        "",
        *section("Data", bullets(data) or ["Not recorded."]),
        *section("Recipe", bullets(recipe) or ["Not recorded."]),
        *section("Metrics", bullets(metrics) or ["None recorded."]),
    ]
    if form == CLASSIFIER:
        lines += section("Classes", [", ".join(checkpoint.classes)])
    if notes:
        lines += section(f"In {format.title}", [f"- {note}" for note in notes])
    # A relative name, which is right wherever the folder goes.
    lines += section("Loading", ["```python", format.loading_code(checkpoint, form, "FOLDER"), "```"])
    return "\n".join(lines)


def further_front_matter(provenance: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Lines of what model hubs read beside license, library and task, as far as the provenance tells: data sets, the
    published model that this one begins with, and the names of the metrics."""
    before = provenance.get("encoder")
    base = (before if isinstance(before, Mapping) else provenance).get("hub", "")
    names = [name for name in metrics if name not in ("metrics", "validation")]
    lines = [f"datasets: [{json.dumps(str(provenance['data']))}]"] if provenance.get("data") else []
    if base.startswith(PREFIX):
        lines.append(f"base_model: {split_id(base)[0]}")
    return [*lines, *([f"metrics: [{', '.join(names)}]"] if names else [])]


def opening(checkpoint: Checkpoint, form: str) -> str:
    """What the folder holds, in a sentence."""
    family = registry.family_of(checkpoint.config)
    values = sum(value.numel() for value in checkpoint.encoder.values())
    text = f"A {family.title} encoder{citation(family.paper)} of {values / 1e6:.2f} M parameters"
    if form == CLASSIFIER:
        attentive = " of learned queries over the last map (arXiv 2506.10178)" if is_attentive(checkpoint.head) else ""
        return f"{text} with a classifier's head{attentive}"
    if form in METHODS:
        method = method_named(form)
        return f"{text}, with the {method.own_parts} of {method.title}{citation(method.paper)}"
    return text


def citation(paper: str) -> str:
    """A paper in parentheses; nothing if there is none."""
    return f" ({paper})" if paper else ""


def section(title: str, lines: list[str]) -> list[str]:
    """A heading, the lines, and an empty line after each."""
    return [f"## {title}", "", *lines, ""]


def bullets(values: dict[str, Any]) -> list[str]:
    """A line per value."""
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in values.items() if value is not None]


def rounded(values: tuple[float, ...]) -> list[float]:
    """Four digits are enough to read."""
    return [round(value, 4) for value in values]
