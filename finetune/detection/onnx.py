"""A detector as one ONNX file: boxes, scores and masks' parameters of every point of an image of one size; suppression and
the assembly of masks stay outside.

The encoder's graph comes from its format rows; this adds the head, node by node, as `pyramid.py` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simmim.checkpoints.formats.onnx import OnnxFormat, OnnxRows
from simmim.checkpoints.formats.onnx_graph import Graph
from simmim.encoders.base import Size
from simmim.files import atomic_write
from simmim.finetune.detection.condinst import CHANNELS, NUM_PARAMETERS, NUM_WEIGHTS, mask_logits
from simmim.finetune.detection.model import Detector
from simmim.finetune.detection.pyramid import ANCHOR_CELLS, MAX_GROWTH, Predictions, PyramidHead, Tower, grid_points

BOXES, SCORES = "boxes", "scores"
PARAMETERS, FEATURES = "mask_parameters", "mask_features"  # of a detector of masks
TOLERANCE_PX, TOLERANCE_SCORE = 0.05, 1e-3  # of a box, and of a score, between ONNX Runtime and PyTorch
TOLERANCE_LOGIT = 1e-2  # of a mask's logit, as a share of the largest one from 1 on
COMPARED_MASKS = 32  # of the first image
HEAD = "head/"  # begins the names of what is not the encoder's


def export_onnx(model: Detector, file: Path, size: Size) -> float:
    """Write a detector, and compare it with PyTorch in ONNX Runtime. The file appears after the comparison or not at all.

    Its input is "images", (batch, channels, height, width) float32, normalized as in training. Its outputs are "boxes",
    (batch, P, 4) as (x1, y1, x2, y2) in pixels, which may reach out of the image, and "scores", (batch, P, K): of each point
    and class the geometric mean of class probability and centerness.

    A detector of masks has two more outputs: "mask_features", (batch, 8, H, W), and "mask_parameters", (batch, P, 169). The
    latter are three layers of 1 × 1, all weights first, that turn x and y of a cell's center in pixels, and its features,
    into the mask's logit.

    Args:
        model: in evaluation mode, float32, on the CPU.
        size: (height, width) of the images.

    Returns:
        The largest difference of a box, in pixels.

    Raises:
        ValueError: for packages that are not installed, an encoder family without a graph, and a file whose numbers are not
            PyTorch's.
    """
    rows: OnnxRows[Any] = OnnxFormat().rows_for(model.encoder.config)
    try:
        import onnx
        import onnx.compose
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"ONNX export needs {error.name}: pip install 'simmim-toolkit[onnx]'") from error
    encoder = rows.compose(model.encoder, None, size, "stages", False)
    images = torch.randn(2, model.encoder.config.in_channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        maps = [(stage.shape[2], stage.shape[3]) for stage in model.maps(images)]
    head = onnx.compose.add_prefix(
        compose_head(model, maps),
        HEAD,
        rename_inputs=False,
        rename_outputs=False,  # type: ignore[arg-type]
    )
    names = [(f"stage_{number}", f"stage_{number}") for number in range(len(maps))]
    merged = onnx.compose.merge_models(encoder, head, names)
    with atomic_write(Path(file)) as temporary:
        temporary.write_bytes(merged.SerializeToString())
        onnx.checker.check_model(str(temporary), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        boxes, scores, *of_masks = session.run(None, {"images": images.numpy()})
        wanted = (expected.logits.sigmoid() * expected.centerness.sigmoid()[..., None]).sqrt()
        of_boxes = np.abs(boxes - expected.boxes().numpy()).max()
        of_scores = np.abs(scores - wanted.numpy()).max()
        if not (of_boxes <= TOLERANCE_PX and of_scores <= TOLERANCE_SCORE):  # so that NaN fails, too
            raise ValueError(
                f"boxes are off by {of_boxes:.2g} px in ONNX Runtime, and scores by {of_scores:.2g}: no file was written"
            )
        check_masks(expected, *map(torch.from_numpy, of_masks))
    return float(of_boxes)


def check_masks(expected: Predictions, parameters: Tensor | None = None, features: Tensor | None = None) -> None:
    """Compare masks of the first image with PyTorch's.

    Args:
        parameters, features: outputs of the file; None of a detector of boxes alone.

    Raises:
        ValueError: where they differ.
    """
    if parameters is None or features is None:
        return
    points = torch.linspace(0, len(expected.points) - 1, COMPARED_MASKS).long()
    wanted = expected.mask_logits(0, points)
    # The file's networks see pixels from the image's corner.
    corner, unit = torch.zeros(len(points), 2), torch.ones(len(points))
    found = mask_logits(features[0], expected.mask_stride, parameters[0, points], corner, unit)
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    if not off <= TOLERANCE_LOGIT:  # so that NaN fails, too
        raise ValueError(f"masks are off by {off:.2g} in ONNX Runtime: no file was written")


def compose_head(model: Detector, maps: list[Size]) -> Any:
    """Norms and head as an `onnx.ModelProto`, from the stages' maps before the final norm.

    Args:
        maps: size of each stage's map.
    """
    head, encoder = model.head, model.encoder
    norms: list[nn.LayerNorm] = [*model.norms, encoder.norm]  # type: ignore[list-item]
    graph = Graph({"norms.": model.norms, "head.": head, "final_norm.": encoder.norm})  # type: ignore[dict-item]
    inputs = {
        f"stage_{number}": ("batch", channels, *size) for number, (channels, size) in enumerate(zip(encoder.channels, maps))
    }
    levels = [normalized(graph, norm, name) for norm, name in zip(norms, inputs)]
    levels = pyramid(graph, head, levels, maps)
    sizes = level_sizes(head, maps)
    logits, distances, centers, parameters = [], [], [], []
    for level, name in enumerate(levels):
        of_class = tower(graph, head.class_tower, name, level)
        of_box = tower(graph, head.box_tower, name, level)
        logits.append(by_point(graph, convolve(graph, head.classify, of_class), model.num_classes))
        centers.append(by_point(graph, convolve(graph, head.center, of_box), 1))
        if head.control is not None:
            parameters.append(by_point(graph, convolve(graph, head.control, of_box), NUM_PARAMETERS))
        scale = graph.node("Gather", head.scales, (level,), axis=0)
        growth = graph.node("Mul", by_point(graph, convolve(graph, head.regress, of_box), 4), scale)
        growth = graph.node("Exp", graph.node("Min", growth, math.log(MAX_GROWTH)))
        distances.append(graph.node("Mul", growth, ANCHOR_CELLS / 2 * head.strides[level]))
    points = grid_points(sizes, head.strides)[0].repeat(1, 2).numpy()
    graph.tensors["points"], graph.tensors["signs"] = points, np.array([-1, -1, 1, 1], np.float32)
    joined = graph.node("Concat", *distances, axis=1)
    graph.node("Add", "points", graph.node("Mul", joined, "signs"), name=BOXES)
    probability = graph.node("Sigmoid", graph.node("Concat", *logits, axis=1))
    center = graph.node("Sigmoid", graph.node("Concat", *centers, axis=1))
    graph.node("Sqrt", graph.node("Mul", probability, center), name=SCORES)
    outputs = {BOXES: ("batch", len(points), 4), SCORES: ("batch", len(points), model.num_classes)}
    if head.masks is not None:
        of_pixels(graph, head, graph.node("Concat", *parameters, axis=1), sizes)
        features = tower(graph, head.masks.tower, convolve(graph, head.masks.reduce, levels[0]), 0)
        graph.node("Conv", features, head.masks.output.weight, head.masks.output.bias, name=FEATURES)
        outputs |= {PARAMETERS: ("batch", len(points), NUM_PARAMETERS), FEATURES: ("batch", CHANNELS, *sizes[0])}  # type: ignore[dict-item]
    return graph.model("Detector", inputs, outputs)  # type: ignore[arg-type]


def of_pixels(graph: Graph, head: PyramidHead, parameters: str, sizes: list[Size]) -> None:
    """The parameters for networks that see pixels from the image's corner, where PyTorch's see them from the object's point,
    in units of its level: unit and point are put into the first layer.

    Args:
        parameters: (B, P, `NUM_PARAMETERS`).
    """
    points, strides = grid_points(sizes, head.strides)
    inputs, num_weights = CHANNELS + 2, sum(NUM_WEIGHTS)
    of_x, of_y = ([output * inputs + axis for output in range(CHANNELS)] for axis in (0, 1))
    scale = np.ones((len(points), NUM_PARAMETERS), np.float32)
    scale[:, of_x + of_y] /= (ANCHOR_CELLS * strides).numpy()[:, None]
    graph.tensors["mask_scale"] = scale
    graph.tensors["points_x"], graph.tensors["points_y"] = (points[:, axis : axis + 1].numpy() for axis in (0, 1))
    scaled = graph.node("Mul", parameters, "mask_scale")

    def part(numbers: Sequence[int]) -> str:
        return graph.node("Gather", scaled, tuple(numbers), axis=2)

    moved = part(range(num_weights, num_weights + CHANNELS))
    for numbers, place in ((of_x, "points_x"), (of_y, "points_y")):
        moved = graph.node("Sub", moved, graph.node("Mul", part(numbers), place))
    rest = part(range(num_weights + CHANNELS, NUM_PARAMETERS))
    graph.node("Concat", part(range(num_weights)), moved, rest, axis=2, name=PARAMETERS)


def level_sizes(head: PyramidHead, maps: list[Size]) -> list[Size]:
    """Sizes of all levels: those of the stages, and of the levels above, each half of the one before."""
    sizes = list(maps)
    for _ in head.pyramid.above:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def normalized(graph: Graph, norm: nn.LayerNorm, x: str) -> str:
    """A norm over the channels of (B, C, H, W)."""
    x = graph.layer_norm(norm, graph.node("Transpose", x, perm=(0, 2, 3, 1)))
    return graph.node("Transpose", x, perm=(0, 3, 1, 2))


def pyramid(graph: Graph, head: PyramidHead, maps: list[str], sizes: list[Size]) -> list[str]:
    """`FeaturePyramid.forward`."""
    parts = head.pyramid
    levels = [convolve(graph, lateral, name) for lateral, name in zip(parts.laterals, maps)]  # type: ignore[arg-type]
    for level in range(len(levels) - 1, 0, -1):
        shape = graph.node("Concat", graph.node("Shape", levels[level], start=0, end=2), tuple(sizes[level - 1]), axis=0)
        enlarged = graph.node(
            "Resize",
            levels[level],
            "",
            "",
            shape,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        levels[level - 1] = graph.node("Add", levels[level - 1], enlarged)
    levels = [convolve(graph, output, name) for output, name in zip(parts.outputs, levels)]  # type: ignore[arg-type]
    for number, above in enumerate(parts.above):
        levels.append(convolve(graph, above, graph.node("Relu", levels[-1]) if number else levels[-1]))  # type: ignore[arg-type]
    return levels


def tower(graph: Graph, part: Tower, x: str, level: int) -> str:
    """`Tower.forward`."""
    for convolution, norms in zip(part.convolutions, part.norms):
        x = convolve(graph, convolution, x)  # type: ignore[arg-type]
        x = graph.node("Relu", group_norm(graph, norms[level], x))  # type: ignore[index]
    return x


def convolve(graph: Graph, convolution: nn.Conv2d, x: str) -> str:
    """A convolution with its padding and stride."""
    bias = [] if convolution.bias is None else [convolution.bias]
    padding = tuple(map(int, convolution.padding)) * 2
    return graph.node("Conv", x, convolution.weight, *bias, pads=padding, strides=tuple(convolution.stride))


def group_norm(graph: Graph, norm: nn.GroupNorm, x: str) -> str:
    """A group norm: each group as one channel of an instance norm, then weight and bias of each channel."""
    ones, zeros = (f"{name}_{norm.num_groups}" for name in ("ones", "zeros"))
    graph.tensors[ones], graph.tensors[zeros] = (np.full(norm.num_groups, value, np.float32) for value in (1, 0))
    groups = graph.node("Reshape", x, (0, norm.num_groups, -1))
    groups = graph.node("InstanceNormalization", groups, ones, zeros, epsilon=norm.eps)
    x = graph.node("Reshape", groups, graph.node("Shape", x))
    weight, bias = (graph.node("Unsqueeze", values, (1, 2)) for values in (norm.weight, norm.bias))
    return graph.node("Add", graph.node("Mul", x, weight), bias)


def by_point(graph: Graph, x: str, channels: int) -> str:
    """(B, C, H, W) to (B, H × W, C)."""
    return graph.node("Reshape", graph.node("Transpose", x, perm=(0, 2, 3, 1)), (0, -1, channels))
