"""An encoder as one ONNX file, checked against PyTorch before it appears. Such files are run and not read back.

The graph is composed node by node and not traced. PyTorch's exporter needed 100 s for a tiny encoder with symbolic sizes;
with fixed sizes it stored masks and indices beside the weights.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.fitting import build_encoder
from simmim.checkpoints.formats.base import CLASSIFIER, ExportOptions, Format
from simmim.checkpoints.formats.foreign import description_of
from simmim.checkpoints.source import CONFIG, DESCRIPTION, Source
from simmim.encoders.base import Encoder, Size
from simmim.encoders.heads import AttentiveHead, head_input, head_of
from simmim.files import atomic_write, write_json
from simmim.messages import counted, did_you_mean

OUTPUTS = ("pooled", "stages", "logits")
MAX_WEIGHT_BYTES = 2**31 - 2**24  # one protobuf message holds 2 GiB, of which the graph takes less than a MiB


AnyEncoder = TypeVar("AnyEncoder", bound=Encoder)


class OnnxRows(ABC, Generic[AnyEncoder]):
    """An encoder family as an ONNX graph."""

    @abstractmethod
    def compose(
        self, encoder: AnyEncoder, head: nn.Linear | None, image_size: Size, outputs: str, dynamic_size: bool
    ) -> Any:
        """The `onnx.ModelProto` of a float32 encoder on the CPU; arguments as of `export_onnx`."""

    @abstractmethod
    def check_sizes(self, encoder: AnyEncoder) -> list[Size]:
        """Image sizes, (height, width), at which a graph for any size must agree with PyTorch: the special cases."""


class OnnxFormat(Format):
    """A folder with model.onnx, and a config.json of this toolkit."""

    name = "onnx"
    title = "ONNX"
    library = "onnx"
    weight_names = ("model.onnx",)
    attentive_heads = True
    families: ClassVar[dict[str, str]] = {"swinv2": "simmim.checkpoints.formats.swinv2.onnx"}

    def detect(self, source: Source) -> bool:
        return source.file.suffix == ".onnx"

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        raise ValueError(
            f"{str(source.file)!r} is an ONNX model, made to be run and not read back: give what it was exported from"
        )

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        if 4 * sum(value.numel() for value in checkpoint.encoder.values()) > MAX_WEIGHT_BYTES:
            raise ValueError("an ONNX file holds at most 2 GiB, less than these weights: export as official or safetensors")
        return ()

    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        encoder, head, outputs = build_encoder(checkpoint).encoder, None, options.features
        if form == CLASSIFIER:
            head = head_of(checkpoint.head, encoder.dim)
            outputs = "logits"
        description = description_of(checkpoint, form)
        metadata = {name: json.dumps(value) for name, value in description.items()}
        size = checkpoint.preprocessing.image_size
        export_onnx(encoder, folder / "model.onnx", size, outputs, head, options.dynamic_size, metadata)
        write_json(folder / CONFIG, {"format": self.name, DESCRIPTION: description})

    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        shape = (1, checkpoint.config.in_channels, *checkpoint.preprocessing.image_size)
        return (
            "import numpy, onnxruntime\n\n"
            f"session = onnxruntime.InferenceSession({path + '/model.onnx'!r})\n"
            f"images = numpy.zeros({shape}, 'float32')  # your images, scaled and normalized as {CONFIG} says\n"
            "outputs = session.run(None, {'images': images})"
        )


# --- one file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnnxCheck:
    """How an ONNX file is compared with PyTorch.

    Args:
        tolerance: largest absolute difference of a value; for an output that is larger than 1, this share of its largest
            magnitude.
        batches: numbers of images.
    """

    tolerance: float = 1e-4
    batches: tuple[int, ...] = (1, 3, 8)


def export_onnx(
    encoder: Encoder,
    file: Path,
    image_size: Size,
    outputs: str = "pooled",
    head: nn.Linear | None = None,
    dynamic_size: bool = False,
    metadata: Mapping[str, str] | None = None,
    check: OnnxCheck = OnnxCheck(),
) -> float:
    """Write `encoder` as one self-contained ONNX file and compare it with PyTorch, in ONNX Runtime on the CPU.

    Its input is "images", (batch, channels, height, width) float32, normalized as in training, any number of them. The
    comparison is made in float32 on random images of `image_size`, and with `dynamic_size` also of the sizes of
    `OnnxRows.check_sizes`. The file appears after the comparison or not at all; an earlier file stays until then.

    Args:
        encoder: in any mode, precision and device; it is not changed.
        file: what to write, usually `….onnx`.
        image_size: (height, width) in pixels.
        outputs: "pooled" for one output of that name, (batch, C); "stages" for "stage_0", "stage_1", … each stage's map
            before downsampling and without the final norm, (batch, C_i, H_i, W_i); "logits" for those of `head`,
            (batch, classes).
        head: the classifier; given with "logits" and only then.
        dynamic_size: take images of any height and width instead of `image_size` only.
        metadata: stored in the file's `metadata_props`: mean, std, class names …
        check: how the file is compared.

    Returns:
        The largest absolute difference from PyTorch that was found.

    Raises:
        ValueError: for an unknown output, a head that does not fit, an invalid image size, a model of more than 2 GiB, an
            encoder family without a graph, packages that are not installed, and a file whose numbers are not PyTorch's.
    """
    check_arguments(encoder, image_size, outputs, head)
    rows: OnnxRows[Any] = OnnxFormat().rows_for(encoder.config)
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"ONNX export needs {error.name}: pip install 'simmim-toolkit[onnx]'") from error

    # A copy, because mode, precision and device of the original are the caller's.
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    head = copy.deepcopy(head).cpu().float().eval() if head else None
    model = rows.compose(encoder, head, image_size, outputs, dynamic_size)
    onnx.helper.set_model_props(model, dict(metadata or {}))
    with atomic_write(Path(file)) as temporary:
        temporary.write_bytes(model.SerializeToString())
        del model
        onnx.checker.check_model(str(temporary), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        sizes = [image_size, *rows.check_sizes(encoder)] if dynamic_size else [image_size]
        return max(largest_difference(session, encoder, head, outputs, size, check) for size in sizes)


def check_arguments(encoder: Encoder, image_size: Size, outputs: str, head: nn.Linear | None) -> None:
    """Refuse arguments of `export_onnx`.

    Raises:
        ValueError: naming the argument.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"unknown outputs {outputs!r}{did_you_mean(outputs, OUTPUTS)}")
    if (outputs == "logits") != (head is not None):
        raise ValueError(f"outputs {outputs!r} with{'' if head else 'out'} a head: logits, and only they, take one")
    dim = head and (head.queries.shape[1] if isinstance(head, AttentiveHead) else head.in_features)
    if head is not None and dim != encoder.dim:
        raise ValueError(f"the head takes {dim} features: this encoder gives {encoder.dim}")
    if len(image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in image_size):
        raise ValueError(f"image_size is {image_size!r}: give height and width in pixels")
    modules = [encoder, head] if head else [encoder]
    weight_bytes = 4 * sum(parameter.numel() for module in modules for parameter in module.parameters())
    if weight_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"the weights take {weight_bytes / 2**30:.1f} GiB: an ONNX file holds at most 2 GiB")


@torch.no_grad()
def largest_difference(
    session: Any, encoder: Encoder, head: nn.Linear | None, outputs: str, size: Size, check: OnnxCheck
) -> float:
    """The largest difference of an ONNX Runtime session from PyTorch, over all outputs and batches, on images of `size`.

    Raises:
        ValueError: if it exceeds the tolerance or is NaN, or a shape differs.
    """
    channels, generator = encoder.config.in_channels, torch.Generator().manual_seed(0)
    images = torch.randn(max(check.batches), channels, *size, generator=generator)
    if outputs == "stages":
        expected = encoder(images, return_stages=True).stages
    else:
        output = encoder(images)
        expected = (head(head_input(head, output)) if head else output.pooled,)
    largest = 0.0
    for batch in check.batches:
        results = session.run(None, {"images": images[:batch].numpy()})
        for output, ours, theirs in zip(session.get_outputs(), expected, results, strict=True):
            ours = ours[:batch]
            if ours.shape != theirs.shape:
                raise ValueError(f"{output.name} is {theirs.shape} in ONNX Runtime and {tuple(ours.shape)} in PyTorch")
            difference = (ours - torch.from_numpy(theirs)).abs().max().item()
            bound = check.tolerance * max(1.0, ours.abs().max().item())
            if not difference <= bound:  # so that NaN fails, too
                raise ValueError(
                    f"{output.name} of {counted(batch, 'image')} of {size[0]} × {size[1]} pixels is off by "
                    f"{difference:.2g} in ONNX Runtime, more than {bound:.2g}: no file was written"
                )
            largest = max(largest, difference)
    return largest
