"""An encoder as one ONNX file, checked against PyTorch before it appears.

The graph is composed here node by node and not traced: PyTorch's exporter, given symbolic sizes, took 100 s for a tiny
encoder, and given fixed ones stored masks and indices beside the weights. The functions after `compose` follow
`simmim.encoders.swinv2` module by module; parameters keep their state-dict names, layouts and bytes. A size is a Python int where
the image size is fixed, and then folds away, or a `Count` where it is known only at run time; the code is the same.

Letters as in `simmim.encoders.swinv2`: B images, H W height and width of a feature map in tokens, C channels, h heads, D channels
of a head, M windows of one image, N tokens of one window.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from simmim.encoders.base import Size
from simmim.encoders.swinv2.config import as_pair
from simmim.encoders.swinv2.geometry import MASKED_LOGIT
from simmim.encoders.swinv2.model import MAX_LOGIT_SCALE, PatchEmbed, PatchMerging, SwinV2, SwinV2Block, WindowAttention
from simmim.files import atomic_write
from simmim.messages import did_you_mean

OUTPUTS = ("pooled", "stages", "logits")
# LayerNormalization came with 17, and nothing here needs more; the file format of the same release, which runtimes since
# 2022 read. Newer ones read both.
OPSET, IR_VERSION = 17, 8
MAX_WEIGHT_BYTES = 2**31 - 2**24  # one protobuf message holds 2 GiB, of which the graph takes less than a MiB
TOLERANCE = 1e-4
BATCHES = (1, 3, 8)
FLOAT, INT64 = 1, 7  # onnx.TensorProto's codes


def export_onnx(
    encoder: SwinV2,
    file: Path,
    image_size: Size,
    outputs: str = "pooled",
    head: nn.Linear | None = None,
    dynamic_size: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write `encoder` as one self-contained ONNX file and check it with ONNX Runtime on the CPU.

    Its input is "images", (batch, channels, height, width) float32, normalized as in training, any number of them. The
    check compares with PyTorch in float32, on batches of 1, 3 and 8 random images at `image_size`, and with
    `dynamic_size` on those of `check_sizes`: no value may be off by more than 1e-4, or where an output is larger than 1,
    1e-4 of its largest magnitude. The file appears after the check or not at all; one that was there stays until then.

    Args:
        encoder: in any mode, precision and device; it is not changed.
        file: what to write, usually `….onnx`.
        image_size: (height, width) in pixels.
        outputs: "pooled" for one output of that name, (batch, C); "stages" for "stage_0", "stage_1", … each stage's map
            before merging and without the final norm, (batch, C_i, H_i, W_i); "logits" for `head` on the pooled
            features, (batch, classes).
        head: the classifier, with "logits" and only then.
        dynamic_size: take images of any height and width, not of `image_size` only.
        metadata: stored in the file's `metadata_props`: mean, std, class names …

    Returns:
        The largest absolute difference from PyTorch that the check found.

    Raises:
        ValueError: for an unknown output, a head that does not fit, an image size that is none, a model beyond the 2 GiB
            of one ONNX file, packages that are not installed, and a file whose numbers are not PyTorch's.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"unknown outputs {outputs!r}{did_you_mean(outputs, OUTPUTS)}")
    if (outputs == "logits") != (head is not None):
        raise ValueError(f"outputs {outputs!r} with{'' if head else 'out'} a head: logits, and only they, take one")
    if head is not None and head.in_features != encoder.dim:
        raise ValueError(f"the head takes {head.in_features} features: this encoder gives {encoder.dim}")
    if len(image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in image_size):
        raise ValueError(f"image_size is {image_size!r}: give height and width in pixels")
    weight_bytes = 4 * sum(parameter.numel() for module in (encoder, head) if module for parameter in module.parameters())
    if weight_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"the weights take {weight_bytes / 2**30:.1f} GiB: an ONNX file holds at most 2 GiB")
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"ONNX export needs {error.name}: pip install 'simmim-toolkit[onnx]'") from error

    # A copy, because the original's mode, precision and device are its owner's.
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    head = copy.deepcopy(head).cpu().float().eval() if head else None
    model = compose(encoder, head, image_size, outputs, dynamic_size)
    onnx.helper.set_model_props(model, dict(metadata or {}))
    with atomic_write(Path(file)) as temporary:
        temporary.write_bytes(model.SerializeToString())
        del model
        onnx.checker.check_model(str(temporary), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        sizes = [image_size, *check_sizes(encoder)] if dynamic_size else [image_size]
        return max(largest_difference(session, encoder, head, outputs, size) for size in sizes)


def check_sizes(encoder: SwinV2) -> list[Size]:
    """Image sizes, (height, width), at which a graph for any size must agree with PyTorch: one pixel; maps smaller than
    the window, just as large, one token larger; sides that neither patch nor window divides; high and wide ones."""
    patch, side = encoder.config.patch_size, encoder.config.patch_size * encoder.config.window_size
    return [(1, 1), (side, side), (side + patch, side), (2 * side + 1, side // 2 + 1), (side // 2 + 1, 3 * side - 1)]


@torch.no_grad()
def largest_difference(session, encoder: SwinV2, head: nn.Linear | None, outputs: str, size: Size) -> float:
    """Of an ONNX Runtime session from PyTorch, over all outputs and `BATCHES`, on images of `size`.

    Raises:
        ValueError: where it exceeds the tolerance, or is no number.
    """
    channels, generator = encoder.config.in_channels, torch.Generator().manual_seed(0)
    images = torch.randn(max(BATCHES), channels, *size, generator=generator)
    if outputs == "stages":
        expected = encoder(images, return_stages=True).stages
    else:
        pooled = encoder(images).pooled
        expected = (head(pooled) if head else pooled,)
    largest = 0.0
    for batch in BATCHES:
        found = session.run(None, {"images": images[:batch].numpy()})
        for output, ours, theirs in zip(session.get_outputs(), expected, found, strict=True):
            ours = ours[:batch]
            if ours.shape != theirs.shape:
                raise ValueError(f"{output.name} is {theirs.shape} in ONNX Runtime and {tuple(ours.shape)} in PyTorch")
            difference = (ours - torch.from_numpy(theirs)).abs().max().item()
            bound = TOLERANCE * max(1.0, ours.abs().max().item())
            if not difference <= bound:  # so that NaN fails, too
                raise ValueError(
                    f"{output.name} of {batch} images of {size[0]} × {size[1]} pixels is off by {difference:.2g} in ONNX "
                    f"Runtime, more than {bound:.2g}: no file was written"
                )
            largest = max(largest, difference)
    return largest


def compose(encoder: SwinV2, head: nn.Linear | None, image_size: Size, outputs: str, dynamic_size: bool):
    """The `onnx.ModelProto` of a float32 encoder on the CPU; arguments as of `export_onnx`."""
    graph = Graph({"": encoder, "head.": head} if head else {"": encoder})
    shapes = {}
    images = ("batch", encoder.config.in_channels, *(("height", "width") if dynamic_size else image_size))
    size = tuple(graph.side("images", axis) for axis in (2, 3)) if dynamic_size else tuple(image_size)

    graph.scope = "patch_embed."
    x, size = patch_embed(graph, encoder.patch_embed, "images", size)
    for index, stage in enumerate(encoder.layers):
        for number, block in enumerate(stage.blocks):
            graph.scope = f"layers.{index}.blocks.{number}."
            x = swin_block(graph, block, x, size)
        if outputs == "stages":
            name = graph.node("Transpose", x, perm=(0, 3, 1, 2), name=f"stage_{index}")
            sides = (f"{name}_height", f"{name}_width") if dynamic_size else size
            shapes[name] = ("batch", encoder.channels[index], *sides)
        if stage.downsample is not None:
            graph.scope = f"layers.{index}.downsample."
            x, size = patch_merging(graph, stage.downsample, x, size)
    graph.scope = ""
    if outputs != "stages":
        pooled = graph.node("ReduceMean", layer_norm(graph, encoder.norm, x), axes=(1, 2), keepdims=0, name="pooled")
        shapes[pooled] = ("batch", encoder.dim)
    if outputs == "logits":
        shapes = {linear(graph, head, pooled, name="logits"): ("batch", head.out_features)}
    return graph.model({"images": images}, shapes, unused=("norm.",) if outputs == "stages" else ())


def linear(graph: Graph, layer: nn.Linear, x: str, **named) -> str:
    """(rows, in) to (rows, out). `Gemm` takes the weight as PyTorch stores it."""
    return graph.node("Gemm", x, layer.weight, *([] if layer.bias is None else [layer.bias]), transB=1, **named)


def layer_norm(graph: Graph, norm: nn.LayerNorm, x: str) -> str:
    return graph.node("LayerNormalization", x, norm.weight, norm.bias, axis=-1, epsilon=norm.eps)


def patch_embed(graph: Graph, embed: PatchEmbed, images: str, size: Wholes) -> tuple[str, Wholes]:
    """(B, channels, height, width) to (B, H, W, C) and its size."""
    patch = embed.patch_size
    tokens = tuple((side + patch - 1) // patch for side in size)
    padding = tuple(count * patch - side for count, side in zip(tokens, size))
    if any(padding):
        images = graph.node("Pad", images, (0, 0, 0, 0, 0, 0, *padding))
    x = graph.node("Conv", images, embed.proj.weight, embed.proj.bias, strides=(patch, patch))
    return layer_norm(graph, embed.norm, graph.node("Transpose", x, perm=(0, 2, 3, 1))), tokens


def patch_merging(graph: Graph, merging: PatchMerging, x: str, size: Wholes) -> tuple[str, Wholes]:
    """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C) and its size."""
    joined, dim = merging.reduction.in_features, merging.reduction.out_features
    halves = tuple((side + 1) // 2 for side in size)
    x = pad_to(graph, x, size, tuple(half * 2 for half in halves))
    x = graph.node("Reshape", x, (-1, halves[0], 2, halves[1], 2, joined // 4))
    x = graph.node("Transpose", x, perm=(0, 1, 3, 4, 2, 5))  # column-major order of the four neighbors
    x = linear(graph, merging.reduction, graph.node("Reshape", x, (-1, joined)))
    return layer_norm(graph, merging.norm, graph.node("Reshape", x, (-1, *halves, dim))), halves


def swin_block(graph: Graph, block: SwinV2Block, x: str, size: Wholes) -> str:
    """(B, H, W, C) to the same shape."""
    dim = block.attn.proj.out_features
    x = graph.node("Add", x, layer_norm(graph, block.norm1, windowed_attention(graph, block, x, size)))
    y = linear(graph, block.mlp.fc1, graph.node("Reshape", x, (-1, dim)))
    error = graph.node("Erf", graph.node("Div", y, math.sqrt(2)))  # GELU, in the form that runtimes know to fuse
    y = graph.node("Mul", graph.node("Mul", y, graph.node("Add", error, 1.0)), 0.5)
    y = graph.node("Reshape", linear(graph, block.mlp.fc2, y), (-1, *size, dim))
    x = graph.node("Add", x, layer_norm(graph, block.norm2, y))
    return layer_norm(graph, block.norm3, x) if isinstance(block.norm3, nn.LayerNorm) else x


def windowed_attention(graph: Graph, block: SwinV2Block, x: str, size: Wholes) -> str:
    """Attention inside the block's windows, (B, H, W, C) to the same shape: pad, shift, partition, attend, and back."""
    dim = block.attn.proj.out_features
    window = tuple(at_most(side, block.window_size) for side in size)
    counts = tuple((side + w - 1) // w for side, w in zip(size, window))
    padded = tuple(count * w for count, w in zip(counts, window))
    # Zero where one window covers the side, since then side − w is.
    shift = tuple(w // 2 * at_most(side - w, 1) if block.shifted else 0 for side, w in zip(size, window))
    pretrained = as_pair(block.pretrained_window) if block.pretrained_window else window

    if block.shift_before_padding:
        x = pad_to(graph, roll(graph, x, size, shift), size, padded)
    else:
        x = roll(graph, pad_to(graph, x, size, padded), padded, shift)
    x = partition(graph, x, counts, window, dim)
    mask = shift_mask(graph, counts, window, padded, shift) if any(shift) else None
    x = attention(graph, block.attn, x, window, pretrained, mask, counts[0] * counts[1])
    x = graph.node("Reshape", x, (-1, *counts, *window, dim))
    x = graph.node("Reshape", graph.node("Transpose", x, perm=(0, 1, 3, 2, 4, 5)), (-1, *padded, dim))
    back = tuple(0 - moved for moved in shift)
    if block.shift_before_padding:
        return roll(graph, crop(graph, x, padded, size), size, back)
    return crop(graph, roll(graph, x, padded, back), padded, size)


def roll(graph: Graph, x: str, size: Wholes, shift: Wholes) -> str:
    """(B, H, W, C) moved cyclically up and left."""
    for axis, side, moved in zip((1, 2), size, shift):
        if moved != 0:
            source = graph.node("Mod", graph.node("Add", graph.range(side), (moved,)), (side,))
            x = graph.node("Gather", x, source, axis=axis)
    return x


def pad_to(graph: Graph, x: str, size: Wholes, padded: Wholes) -> str:
    """(B, H, W, C) with zeros below and right of it."""
    if padded == size:
        return x
    return graph.node("Pad", x, (0, 0, 0, 0, 0, padded[0] - size[0], padded[1] - size[1], 0))


def crop(graph: Graph, x: str, padded: Wholes, size: Wholes) -> str:
    """(B, padded height, padded width, C) without what `pad_to` added."""
    return x if padded == size else graph.node("Slice", x, (0, 0), size, (1, 2))


def partition(graph: Graph, x: str, counts: Wholes, window: Wholes, dim: int) -> str:
    """A map of windows, (B, H, W, C), to their tokens, (B · M · N, C)."""
    x = graph.node("Reshape", x, (-1, counts[0], window[0], counts[1], window[1], dim))
    return graph.node("Reshape", graph.node("Transpose", x, perm=(0, 1, 3, 2, 4, 5)), (-1, dim))


def shift_mask(graph: Graph, counts: Wholes, window: Wholes, padded: Wholes, shift: Wholes) -> str:
    """(M, 1, N, N) to add to the logits: 0 between tokens of one region of the image, else `MASKED_LOGIT`."""
    rows, columns = (
        graph.node("Cast", graph.node("Less", graph.range(side), (side - moved,)), to=INT64)  # 0: from the other side
        for side, moved in zip(padded, shift)
    )
    rows = graph.node("Unsqueeze", graph.node("Mul", rows, (2,)), (1,))
    region = partition(graph, graph.node("Add", rows, columns), counts, window, 1)
    region = graph.node("Reshape", region, (counts[0] * counts[1], 1, window[0] * window[1], 1))
    same = graph.node("Equal", region, graph.node("Transpose", region, perm=(0, 1, 3, 2)))
    return graph.node("Where", same, 0.0, MASKED_LOGIT)


def attention(
    graph: Graph, attn: WindowAttention, x: str, window: Wholes, pretrained: Wholes, mask: str | None, windows: Whole
) -> str:
    """(B · M · N, C) to the same shape, for M `windows`; `mask` as from `shift_mask`."""
    dim, heads, tokens = attn.proj.out_features, attn.num_heads, window[0] * window[1]
    no_bias = graph.node("ConstantOfShape", (dim,))
    qkv_bias = graph.node("Concat", attn.q_bias, no_bias, attn.v_bias, axis=0)
    qkv = graph.node("Gemm", x, attn.qkv.weight, qkv_bias, transB=1)
    q, k, v = (
        graph.node("Reshape", part, (-1, tokens, heads, dim // heads))
        for part in graph.node("Split", qkv, outputs=3, axis=1)
    )
    q = graph.node("Transpose", unit_length(graph, q), perm=(0, 2, 1, 3))
    k = graph.node("Transpose", unit_length(graph, k), perm=(0, 2, 3, 1))
    v = graph.node("Transpose", v, perm=(0, 2, 1, 3))
    scale = graph.node("Exp", graph.node("Min", attn.logit_scale, MAX_LOGIT_SCALE))
    logits = graph.node("MatMul", graph.node("Mul", q, scale), k)
    logits = graph.node("Add", logits, position_bias(graph, attn, window, pretrained))
    if mask is not None:
        logits = graph.node("Add", graph.node("Reshape", logits, (-1, windows, heads, tokens, tokens)), mask)
        logits = graph.node("Reshape", logits, (-1, heads, tokens, tokens))
    mixed = graph.node("MatMul", graph.node("Softmax", logits, axis=-1), v)
    mixed = graph.node("Reshape", graph.node("Transpose", mixed, perm=(0, 2, 1, 3)), (-1, dim))
    return linear(graph, attn.proj, mixed)


def unit_length(graph: Graph, x: str) -> str:
    """Vectors on the last axis divided by their length, as `torch.nn.functional.normalize`."""
    length = graph.node("ReduceL2", x, axes=(-1,), keepdims=1)
    return graph.node("Div", x, graph.node("Max", length, 1e-12))


def position_bias(graph: Graph, attn: WindowAttention, window: Wholes, pretrained: Wholes) -> str:
    """B of equation 3 for one window, (h, N, N), from the MLP's weights: tables would be a copy of what they say."""
    height, width = (2 * side - 1 for side in window)  # numbers of offsets
    axes = []
    for side, reference, shape in zip(window, pretrained, ((-1, 1, 1), (1, -1, 1))):
        offset = graph.node("Sub", graph.range(2 * side - 1), (side - 1,))
        span = graph.node("Cast", graph.node("Max", (reference - 1,), (1,)), to=FLOAT)
        offset = graph.node("Div", graph.node("Mul", graph.node("Cast", offset, to=FLOAT), 8.0), span)
        magnitude = graph.node("Log", graph.node("Add", graph.node("Abs", offset), 1.0))
        coordinate = graph.node("Mul", graph.node("Sign", offset), graph.node("Div", magnitude, math.log(8)))
        axes.append(graph.node("Expand", graph.node("Reshape", coordinate, shape), (height, width, 1)))
    coords = graph.node("Reshape", graph.node("Concat", *axes, axis=-1), (-1, 2))
    hidden = graph.node("Relu", linear(graph, attn.cpb_mlp[0], coords))
    table = graph.node("Gemm", attn.cpb_mlp[2].weight, hidden, transB=1)  # (h, offsets)
    table = graph.node("Mul", graph.node("Sigmoid", table), 16.0)

    # Row · width + column numbers the tokens so that differences number the offsets.
    rows = graph.node("Mul", graph.range(window[0]), (width,))
    token = graph.node("Add", graph.node("Unsqueeze", rows, (1,)), graph.range(window[1]))
    first, second = (graph.node("Reshape", token, shape) for shape in ((-1, 1), (1, -1)))
    index = graph.node("Add", graph.node("Sub", first, second), ((window[0] - 1) * width + window[1] - 1,))
    return graph.node("Gather", table, index, axis=1)


class Graph:
    """An ONNX graph as it grows. Values are known by name.

    Args:
        modules: by prefix, the modules whose parameters become the graph's, under their state-dict names.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.parameters = {
            id(parameter): prefix + name
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.tensors: dict[str, np.ndarray] = {}
        self.nodes: dict[tuple, tuple[str, tuple[str, ...]]] = {}  # operation, inputs, attributes: name, outputs
        self.scope = ""  # begins the names of new nodes: where in the encoder they belong

    def node(self, op: str, *inputs, outputs: int = 1, name: str | None = None, **attributes):
        """Add a node, unless there is one like it: what blocks have in common, as masks, is computed once.

        Args:
            inputs: each as `value` takes it.
            name: of its only output; by default one is made up.

        Returns:
            The name of its output, or a tuple of them.
        """
        key = (op, tuple(self.value(item) for item in inputs), tuple(attributes.items()))
        if key not in self.nodes:
            number = len(self.nodes)
            names = (name or f"v{number}",) if outputs == 1 else tuple(f"v{number}.{i}" for i in range(outputs))
            self.nodes[key] = f"{self.scope}{op}_{number}", names
        _, names = self.nodes[key]
        return names[0] if outputs == 1 else names

    def value(self, item: str | nn.Parameter | float | tuple[Whole, ...]) -> str:
        """The name of a value, of a parameter, of a float32 scalar, or of an int64 vector of whole numbers."""
        if isinstance(item, str):
            return item
        if isinstance(item, nn.Parameter):
            name = self.parameters[id(item)]
            self.tensors[name] = item.detach().numpy()
        elif isinstance(item, float):
            name = f"float_{item}"
            self.tensors[name] = np.array(item, np.float32)
        elif all(isinstance(number, int) for number in item):
            name = "_".join(("whole", *map(str, item)))
            self.tensors[name] = np.array(item, np.int64)
        elif len(item) == 1:
            name = item[0].name
        else:
            name = self.node("Concat", *((number,) for number in item), axis=0)
        return name

    def side(self, x: str, axis: int) -> Count:
        """How large `x` is along `axis`."""
        return Count(self, self.node("Shape", x, start=axis, end=axis + 1))

    def range(self, stop: Whole) -> str:
        """0, 1, … stop − 1: (stop,) int64."""
        return self.node("Range", *(self.node("Squeeze", (number,)) for number in (0, stop, 1)))

    def model(self, inputs: Mapping[str, Sequence[int | str]], outputs: Mapping[str, Sequence[int | str]], unused=()):
        """The finished `onnx.ModelProto`.

        Args:
            inputs, outputs: shapes of float32 tensors by name; a side is a number or, where it may vary, a name.
            unused: prefixes of the parameters that these outputs do not need. All others must be in the graph.
        """
        from onnx import helper, numpy_helper

        missing = {name for name in self.parameters.values() if not name.startswith(unused)} - self.tensors.keys()
        if missing:
            raise AssertionError(f"the graph does not use {', '.join(sorted(missing))}")
        nodes = [
            helper.make_node(op, names, results, name=name, **dict(attributes))
            for (op, names, attributes), (name, results) in self.nodes.items()
        ]
        shapes = [
            [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in values.items()]
            for values in (inputs, outputs)
        ]
        tensors = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        return helper.make_model(
            helper.make_graph(nodes, "SwinV2", *shapes, tensors),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="simmim-toolkit",
        )


class Count:
    """A whole number known when the graph runs: `name` is that of an int64 tensor of shape (1,)."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def join(self, op: str, left: Whole, right: Whole) -> Count:
        return Count(self.graph, self.graph.node(op, (left,), (right,)))

    def __add__(self, other: Whole) -> Count:
        return self.join("Add", self, other)

    def __sub__(self, other: Whole) -> Count:
        return self.join("Sub", self, other)

    def __rsub__(self, other: int) -> Count:
        return self.join("Sub", other, self)

    def __mul__(self, other: Whole) -> Count:
        return self.join("Mul", self, other)

    def __floordiv__(self, other: Whole) -> Count:
        """Of numbers that are not negative: ONNX cuts towards zero."""
        return self.join("Div", self, other)

    __radd__, __rmul__ = __add__, __mul__


def at_most(number: Whole, bound: int) -> Whole:
    return min(number, bound) if isinstance(number, int) else number.join("Min", number, bound)


Whole = int | Count
Wholes = tuple[Whole, Whole]
