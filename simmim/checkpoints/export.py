"""Exported folders: weights in one of the formats, the preprocessing, and a model card. Whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from simmim.checkpoints.card import model_card
from simmim.checkpoints.checkpoint import (
    CONFIG,
    FORMAT_NAMES,
    Checkpoint,
    build_encoder,
    save_checkpoint,
    write_tensors,
)
from simmim.checkpoints.formats import huggingface, official, timm
from simmim.checkpoints.formats.onnx import export_onnx
from simmim.checkpoints.reading import DESCRIPTION
from simmim.files import write_json

FORMATS = ("safetensors", "official", "timm", "hf", "onnx")
ONNX_BYTES = 2**31 - 2**24  # protobuf's limit, less room for the graph
FORMS = ("encoder", "simmim", "classifier")


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Args:
        folder: what was made.
        form: encoder, simmim or classifier.
        notes: where the other library computes or keeps something else, a sentence each.
        code: lines of Python that load it.
    """

    folder: Path
    form: str
    notes: tuple[str, ...]
    code: str


def export(
    checkpoint: Checkpoint,
    format: str,
    out: str | Path,
    form: str | None = None,
    image_size: tuple[int, int] | None = None,
    license: str | None = None,
    features: str = "pooled",
    dynamic_size: bool = False,
) -> Exported:
    """Write `checkpoint` into the new folder `out`.

    Args:
        format: one of `FORMATS`; safetensors is this toolkit's own and holds all there is.
        form: what the other formats hold: encoder; simmim, with mask token and decoder; classifier. By default the
            classifier where there is one, else what the format is used for most: simmim for official, encoder for others.
        image_size: (height, width) that formats of a fixed size are made for; the checkpoint's own by default.
        license: what the card says; by default what the provenance says, else unknown.
        features: of ONNX: pooled, or stages for every stage's map.
        dynamic_size: of ONNX: images of any size.

    Raises:
        ValueError: when `out` is in use, a name is unknown, or the format cannot represent the model.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not empty: give a new folder")
    preprocessing = replace(checkpoint.preprocessing, image_size=image_size or checkpoint.preprocessing.image_size)
    # First the windows of pre-training, by its own image size; then the size that is asked for.
    config = checkpoint.config.trained_at(checkpoint.preprocessing.image_size)
    checkpoint = replace(checkpoint, config=config, preprocessing=preprocessing)
    form = chosen_form(checkpoint, format, form)
    notes = limits(checkpoint, format, form)
    if license:
        checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "license": license})
    license = str(checkpoint.provenance.get("license", "unknown"))
    card = model_card(checkpoint, format, form, notes, license, loading_code(checkpoint, format, form, "FOLDER"))

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write(checkpoint, format, form, temporary, license, features, dynamic_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out, form, notes, loading_code(checkpoint, format, form, str(out.resolve())))


def chosen_form(checkpoint: Checkpoint, format: str, form: str | None) -> str:
    """The form to write.

    Raises:
        ValueError: when the names are unknown, or the checkpoint or the format has no such form.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if form is not None and form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    held = {"encoder": True, "simmim": bool(checkpoint.pretraining), "classifier": bool(checkpoint.head)}
    if form is None:
        everything = format in ("official", "safetensors")
        form = "classifier" if held["classifier"] else "simmim" if held["simmim"] and everything else "encoder"
    if not held[form]:
        lacking = "mask token and decoder" if form == "simmim" else "head"
        raise ValueError(f"{checkpoint.source} has no {lacking}: it cannot be exported in the form {form}")
    if form == "simmim" and format in ("timm", "onnx"):
        raise ValueError(f"{format} knows no SimMIM form: export it as official or hf, or the encoder alone")
    return form


def limits(checkpoint: Checkpoint, format: str, form: str) -> tuple[str, ...]:
    """Where the other library computes or keeps something else than this toolkit.

    Raises:
        ValueError: when it cannot represent the model at all.
    """
    config, size = checkpoint.config, checkpoint.preprocessing.image_size
    notes = []
    if format in ("timm", "hf") and config.extra_norm_every:
        raise ValueError(
            f"{FORMAT_NAMES[format]} has no place for the extra norms of huge and giants: export as official, safetensors "
            "or onnx"
        )
    if format == "onnx" and 4 * sum(value.numel() for value in checkpoint.encoder.values()) > ONNX_BYTES:
        raise ValueError("an ONNX file holds at most 2 GiB, less than these weights: export as official or safetensors")
    if format == "hf":
        obstacle = huggingface.obstacle(config, size)
        if obstacle:
            raise ValueError(f"{obstacle}: export as safetensors, timm or onnx, or at another image size")
        if form == "simmim" and size[0] != size[1]:
            raise ValueError(
                f"transformers' masked image modeling takes square images, not {size[0]}×{size[1]} px: export the encoder "
                "alone, or as official"
            )
        if size[0] != size[1]:
            notes.append("transformers' processors have no central crop of an oblong shape: prepare images by yourself")
        if form == "simmim" and checkpoint.provenance.get("norm_target_patch"):
            notes.append("transformers computes the loss on plain pixels; this model was trained on normalized ones")
    if format == "official" and (len(set(size)) > 1 or not divides(config, size)):
        notes.append(f"the authors' modules take square images that windows divide, which {size[0]}×{size[1]} px are not")
    if format in ("timm", "hf") and not divides(config, size) and config.shift_before_padding != (format == "timm"):
        order = "before" if format == "timm" else "after"
        notes.append(
            f"windows do not divide the maps at {size[0]}×{size[1]} px; {FORMAT_NAMES[format]} shifts {order} it pads, this "
            "encoder the other way round, so features differ there"
        )
    if checkpoint.pretraining and form != "simmim" and format != "safetensors":
        notes.append("mask token and decoder are left out")
    if checkpoint.head and form != "classifier" and format != "safetensors":
        notes.append("the classifier's head is left out")
    return tuple(notes)


def divides(config, image_size: tuple[int, int]) -> bool:
    """Whether every stage's windows divide its map."""
    height, width = (-(-side // config.patch_size) for side in image_size)
    for window in config.windows(image_size):
        if height % window[0] or width % window[1]:
            return False
        height, width = -(-height // 2), -(-width // 2)
    return True


def write(
    checkpoint: Checkpoint, format: str, form: str, folder: Path, license: str, features: str, dynamic_size: bool
) -> None:
    """The format's files."""
    ours = described(checkpoint, form)
    if format == "safetensors":
        save_checkpoint(folder, checkpoint)
    elif format == "official":
        content = {"model": contiguous(official.state_for(checkpoint, form)), "config": official.settings_for(checkpoint)}
        torch.save(content, folder / "model.pth")
        write_json(folder / CONFIG, {"format": format, DESCRIPTION: ours})
    elif format == "timm":
        write_tensors(folder / "model.safetensors", timm.state_for(checkpoint, form))
        write_json(folder / CONFIG, {**timm.folder_config(checkpoint, form, license), DESCRIPTION: ours})
    elif format == "hf":
        write_tensors(folder / "model.safetensors", huggingface.state_for(checkpoint, form))
        write_json(folder / CONFIG, {**huggingface.folder_config(checkpoint, form), DESCRIPTION: ours})
        write_json(folder / "preprocessor_config.json", huggingface.processor_config(checkpoint.preprocessing))
    else:
        write_onnx(checkpoint, form, folder, features, dynamic_size, ours)


def described(checkpoint: Checkpoint, form: str) -> dict:
    """What this toolkit leaves in a foreign config.json, from which `read` has back all that the format has no place for."""
    return {
        "architecture": checkpoint.config.as_dict(),
        "preprocessing": vars(checkpoint.preprocessing),
        "provenance": checkpoint.provenance,
        "classes": list(checkpoint.classes) if form == "classifier" else [],
    }


def write_onnx(checkpoint: Checkpoint, form: str, folder: Path, features: str, dynamic_size: bool, ours: dict) -> None:
    """model.onnx, checked against torch, and its description."""
    encoder = build_encoder(checkpoint).encoder
    head = None
    if form == "classifier":
        head = nn.Linear(encoder.dim, len(checkpoint.classes))
        head.load_state_dict(checkpoint.head)
        features = "logits"
    metadata = {name: json.dumps(value) for name, value in ours.items()}
    export_onnx(encoder, folder / "model.onnx", checkpoint.preprocessing.image_size, features, head, dynamic_size, metadata)
    write_json(folder / CONFIG, {"format": "onnx", DESCRIPTION: ours})


def contiguous(state: dict) -> dict:
    """Tensors of their own storage, so that a file holds no more than it names."""
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def loading_code(checkpoint: Checkpoint, format: str, form: str, path: str) -> str:
    """Lines of Python that load an exported folder, ready to paste."""
    channels = checkpoint.config.in_channels
    height, width = checkpoint.preprocessing.image_size
    if format == "timm":
        return timm.loading_code(path, form)
    if format == "hf":
        return huggingface.loading_code(path, form, channels)
    if format == "official":
        return (
            "import torch\n\n"
            f"state = torch.load({path + '/model.pth'!r}, weights_only=True)['model']  # for the authors' modules, strictly"
        )
    if format == "onnx":
        return (
            "import numpy, onnxruntime\n\n"
            f"session = onnxruntime.InferenceSession({path + '/model.onnx'!r})\n"
            f"images = numpy.zeros((1, {channels}, {height}, {width}), 'float32')  # yours, normalized as {CONFIG} says\n"
            "outputs = session.run(None, {'images': images})"
        )
    return (
        "import torch\n"
        "from simmim.checkpoints import read_encoder\n\n"
        f"saved = read_encoder({path!r})\n"
        "height, width = saved.preprocessing.image_size\n"
        "# Yours, normalized by saved.preprocessing:\n"
        "images = torch.randn(1, saved.encoder.config.in_channels, height, width)\n"
        "features = saved.encoder.features(images)  # (batch, channels)"
    )
