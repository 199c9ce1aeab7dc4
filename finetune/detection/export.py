"""A detector for others: this toolkit's own files or one ONNX file, with a model card."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np

from simmim.checkpoints import read
from simmim.checkpoints.card import bullets, citation, rounded, section
from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.export import Exported, new_folder
from simmim.encoders import registry
from simmim.files import write_json
from simmim.finetune.detection.condinst import CHANNELS, NUM_BIASES, NUM_WEIGHTS
from simmim.finetune.detection.inference import MAX_BOXES, MAX_OVERLAP
from simmim.finetune.detection.model import FILES, SavedDetector, load_detector, save_detector
from simmim.finetune.detection.onnx import BOXES, FEATURES, PARAMETERS, SCORES, export_onnx
from simmim.messages import did_you_mean

FORM = "detector"
FORMATS = {"safetensors": "simmim", "onnx": "onnx"}  # with the library that a model card names
MODEL = "model.onnx"
OWN_CODE = """\
from simmim.finetune import load_detector

saved = load_detector({folder!r})
[found] = saved.find(images)  # (1, channels, height, width) uint8, short side {short_side}: boxes, scores, classes"""
OWN_MASK_CODE = "masks = found.draw_masks(images.shape[2:])  # (objects, height, width) bool"
ONNX_CODE = """\
import numpy, onnxruntime

session = onnxruntime.InferenceSession({file!r})
images = numpy.zeros({shape}, 'float32')  # your images, short side {short_side}, normalized, padded with 0
boxes, scores{names} = session.run([{outputs}], {{'images': images}})


def find(boxes, scores, threshold, most_overlap={overlap}):  # of one image and one class: corners and scores
    found, order = [], scores.argsort()[::-1]
    for box, score{number} in zip(boxes[order], scores[order]{order}):
        sides = [numpy.clip(numpy.minimum(box[2:], b[2:]) - numpy.maximum(box[:2], b[:2]), 0, None) for b, *_ in found]
        union = [numpy.prod(box[2:] - box[:2]) + numpy.prod(b[2:] - b[:2]) for b, *_ in found]
        if score >= threshold and all(s.prod() <= most_overlap * (u - s.prod()) for s, u in zip(sides, union)):
            found.append((box, float(score){number}))
    return found


found = {{name: find(boxes[0], scores[0, :, k], t) for k, (name, t) in enumerate({thresholds}.items())}}"""

MASK_CODE = """


def mask(features, parameters, stride={stride}):  # of one object: logits at the features' stride, positive inside
    y, x = (numpy.mgrid[: features.shape[1], : features.shape[2]] + 0.5) * stride
    values = numpy.concatenate([[x, y], features]).reshape({inputs}, -1)
    weights, biases = numpy.split(parameters[:{weights}], {weight_ends}), numpy.split(parameters[{weights}:], {bias_ends})
    for weight, bias in zip(weights, biases):
        values = weight.reshape(len(bias), -1) @ values + bias[:, None]
        values = numpy.maximum(values, 0) if len(bias) > 1 else values
    return values.reshape(features.shape[1:])


masks = {{name: [mask(features[0], parameters[0, n]) for *_, n in of_class] for name, of_class in found.items()}}"""


def export_detector(
    run: str | Path,
    out: str | Path,
    format: str = "onnx",
    image_size: tuple[int, int] | None = None,
    license: str | None = None,
) -> Exported:
    """Write the detector of a run into the new folder `out`.

    Args:
        format: safetensors, which `load_detector` and `simmim predict` read, or onnx: boxes and scores of every point of
            images of one size, with suppression outside.
        image_size: (height, width) of the images for onnx; that of the training crops by default.
        license: what the card says; by default what the provenance says, else unknown.

    Raises:
        ValueError: if `out` is in use, `run` is no detector, or the format is another.
    """
    if format not in FORMATS:
        raise ValueError(f"a detector cannot be exported as {format!r}{did_you_mean(format, FORMATS)}")
    saved, checkpoint = load_detector(run), read(run)
    license = license or str(checkpoint.provenance.get("license", "unknown"))
    checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "license": license})
    size = image_size or saved.preprocessing.image_size
    out = Path(out).expanduser()
    with new_folder(out) as folder:
        if format == "safetensors":
            save_detector(folder, saved, dict(checkpoint.provenance))
        else:
            export_onnx(copy.deepcopy(saved.model).cpu().float().eval(), folder / MODEL, size)
            write_json(folder / FILES.description, description(saved, size))
        card = detector_card(saved, checkpoint, format, license, loading_code(saved, format, "FOLDER", size))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Exported(out, FORM, "encoder and detector's head", (), loading_code(saved, format, str(out.resolve()), size))


def description(saved: SavedDetector, size: tuple[int, int]) -> dict:
    """What it takes to feed the ONNX file and to read its outputs."""
    return {
        "task": "detection",
        "classes": list(saved.classes),
        "thresholds": list(saved.thresholds),
        "max_overlap": MAX_OVERLAP,
        "max_boxes": MAX_BOXES,
        "short_side": saved.short_side,
        "image_size": list(size),
        "preprocessing": saved.preprocessing.as_dict(),
        **({"mask_stride": saved.model.head.strides[0]} if saved.model.shape.masks else {}),
    }


def loading_code(saved: SavedDetector, format: str, folder: str, size: tuple[int, int]) -> str:
    """Lines of Python that load the folder and find boxes."""
    if format == "safetensors":
        code = OWN_CODE.format(folder=folder, short_side=saved.short_side)
        return f"{code}\n{OWN_MASK_CODE}" if saved.model.shape.masks else code
    masks = saved.model.shape.masks
    outputs = (BOXES, SCORES, *[FEATURES, PARAMETERS] * masks)
    thresholds = {name: round(threshold, 4) for name, threshold in zip(saved.classes, saved.thresholds)}
    code = ONNX_CODE.format(
        file=f"{folder}/{MODEL}",
        shape=(1, saved.model.encoder.config.in_channels, *size),
        short_side=saved.short_side,
        overlap=MAX_OVERLAP,
        thresholds=thresholds,
        outputs=", ".join(map(repr, outputs)),
        names=", features, parameters" * masks,
        number=", number" * masks,
        order=", order" * masks,
    )
    if not masks:
        return code
    ends = [[int(end) for end in np.cumsum(sizes)[:-1]] for sizes in (NUM_WEIGHTS, NUM_BIASES)]
    return code + MASK_CODE.format(
        stride=saved.model.head.strides[0],
        inputs=CHANNELS + 2,
        weights=sum(NUM_WEIGHTS),
        weight_ends=ends[0],
        bias_ends=ends[1],
    )


def detector_card(saved: SavedDetector, checkpoint: Checkpoint, format: str, license: str, code: str) -> str:
    """A README.md with the front matter that model hubs read."""
    config, preprocessing, provenance = checkpoint.config, saved.preprocessing, checkpoint.provenance
    family = registry.family_of(config)
    values = sum(parameter.numel() for parameter in saved.model.parameters())
    metrics = {name: provenance[name] for name in ("ap", "mask_ap", "validation") if name in provenance}
    recipe = {name: value for name, value in provenance.items() if name not in (*metrics, "license")}
    shape = saved.model.shape
    masks = ", masks by CondInst" * shape.masks
    lines = [
        "---",
        f"license: {license}",
        f"library_name: {FORMATS[format]}",
        f"pipeline_tag: {'image-segmentation' if shape.masks else 'object-detection'}",
        f"tags: [{family.name}, {checkpoint.method}, self-supervised]",
        "---",
        "",
        f"# {family.title} {registry.preset_name(config) or f'with channels {list(config.channels)}'}, detection",
        "",
        f"A detector of {values / 1e6:.2f} M parameters: a {family.title} encoder{citation(family.paper)} with a feature "
        f"pyramid of {shape.width} channels and towers of {shape.convolutions} convolutions (ATSS{masks}).",
        "",
        "| | |",
        "| --- | --- |",
        f"| license | {license} |",
        f"| encoder | {config.describe()} |",
        f"| images | short side {saved.short_side} px in crops of {preprocessing.describe()}, values in [0, 1], mean "
        f"{rounded(preprocessing.mean)}, std {rounded(preprocessing.std)} |",
        "| boxes | (x1, y1, x2, y2) in pixels, exclusive |",
        *["| masks | logits on a grid, inside where they are positive |"] * shape.masks,
        "",
    ]
    listed = [f"- {name}: shown from score {score:.3f} on" for name, score in zip(saved.classes, saved.thresholds)]
    lines += section("Classes", listed)
    lines += section("Recipe", bullets(recipe) or ["Not recorded."])
    lines += section("Metrics", bullets(metrics) or ["None recorded."])
    lines += section("Loading", ["```python", code, "```"])
    return "\n".join(lines)
