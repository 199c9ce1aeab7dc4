"""Model cards: what an exported folder says of itself to whoever finds it."""

from __future__ import annotations

from simmim.checkpoints.checkpoint import FORMAT_NAMES, Checkpoint
from simmim.encoders import registry

LIBRARIES = {"safetensors": "simmim", "official": "pytorch", "timm": "timm", "hf": "transformers", "onnx": "onnx"}
# Shown apart from the recipe.
DATA, METRICS = ("data", "images", "labels_per_class", "classes"), ("metrics", "accuracy", "loss")


def model_card(checkpoint: Checkpoint, format: str, form: str, notes: tuple[str, ...], license: str, code: str) -> str:
    """A README.md with the front matter that model hubs read: license, data, recipe, metrics, how to load it.

    Args:
        code: lines of Python that load it, from a folder called FOLDER, which holds wherever it goes.
    """
    config, preprocessing, provenance = checkpoint.config, checkpoint.preprocessing, checkpoint.provenance
    preset = registry.preset_name(config)
    title = f"SwinV2 {preset or f'{config.embed_dim}-{list(config.depths)}'}, {provenance.get('method', form)}"
    height, width = preprocessing.image_size
    values = sum(value.numel() for value in checkpoint.encoder.values())
    data = {name: provenance[name] for name in DATA if name in provenance}
    metrics = {name: provenance[name] for name in METRICS if name in provenance}
    recipe = {name: value for name, value in provenance.items() if name not in (*data, *metrics, "license")}
    task = "image-classification" if form == "classifier" else "image-feature-extraction"
    lines = [
        "---",
        f"license: {license}",
        f"library_name: {LIBRARIES[format]}",
        f"pipeline_tag: {task}",
        "tags: [swin-transformer-v2, simmim, self-supervised]",
        "---",
        "",
        f"# {title}",
        "",
        f"A Swin Transformer V2 (arXiv 2111.09883) of {values / 1e6:.2f} M parameters"
        + (" with a classifier's head" if form == "classifier" else "")
        + (", with SimMIM's mask token and decoder (arXiv 2111.09886)" if form == "simmim" else "")
        + ".",
        "",
        "| | |",
        "| --- | --- |",
        f"| license | {license} |",
        f"| stages | {len(config.depths)}, channels {list(config.dims)}, strides {list(config.strides)} |",
        f"| window | {config.window_size}, pre-trained with {list(config.pretrained_window_sizes)} |",
        f"| images | {config.in_channels} channels, {height}×{width} px, {preprocessing.interpolation}, "
        + (f"central crop {preprocessing.crop:g}" if preprocessing.fit == "crop" else "squashed")
        + f", values in [0, 1], mean {rounded(preprocessing.mean)}, std {rounded(preprocessing.std)} |",
        "",
        "## Data",
        "",
        *(listed(data) or ["Not recorded."]),
        "",
        "## Recipe",
        "",
        *(listed(recipe) or ["Not recorded."]),
        "",
        "## Metrics",
        "",
        *(listed(metrics) or ["None recorded."]),
        "",
    ]
    if form == "classifier":
        lines += ["## Classes", "", ", ".join(checkpoint.classes), ""]
    if notes:
        lines += [f"## In {FORMAT_NAMES.get(format, format)}", "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*lines, "## Loading", "", "```python", code, "```", ""])


def listed(values: dict) -> list[str]:
    """A line a value, nested ones in a line of their own."""
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in values.items() if value is not None]


def rounded(values: tuple[float, ...]) -> list[float]:
    """Four digits are enough to read."""
    return [round(value, 4) for value in values]
