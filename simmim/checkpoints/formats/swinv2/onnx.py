"""SwinV2 as an ONNX graph: the functions follow `simmim.encoders.swinv2.model` module by module.

Parameters keep their state-dict names, layouts and bytes. A size is an int where the image size is fixed, and folds into
constants; it is a `RuntimeLength` where it is known only at run time. The code is the same.

Shape letters as in `simmim.encoders.swinv2.model`: B images, H W height and width of a feature map in tokens, C channels,
h heads, D channels of a head, M windows of one image, N tokens of one window.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from simmim.checkpoints.formats.onnx import OnnxRows
from simmim.checkpoints.formats.onnx_graph import FLOAT, INT64, Graph, Length, MapSize, at_most
from simmim.encoders.base import Size
from simmim.encoders.heads import AttentiveHead
from simmim.encoders.shifted_windows.config import as_pair
from simmim.encoders.shifted_windows.geometry import MASKED_LOGIT
from simmim.encoders.shifted_windows.model import PatchEmbed
from simmim.encoders.swinv2.model import MAX_LOGIT_SCALE, PatchMerging, SwinV2, SwinV2Block, WindowAttention


class SwinV2Onnx(OnnxRows[SwinV2]):
    """SwinV2 as a graph."""

    def compose(self, encoder: SwinV2, head: nn.Linear | None, image_size: Size, outputs: str, dynamic_size: bool) -> Any:
        graph = Graph({"": encoder, "head.": head} if head else {"": encoder})
        images = ("batch", encoder.config.in_channels, *(("height", "width") if dynamic_size else image_size))
        size: MapSize = tuple(graph.side("images", axis) for axis in (2, 3)) if dynamic_size else image_size
        graph.scope = "patch_embed."
        x, size = patch_embed(graph, encoder.patch_embed, "images", size)
        shapes: dict[str, tuple[int | str, ...]] = {}
        layers: Any = encoder.layers
        for index, stage in enumerate(layers):
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
        if outputs == "stages":
            return graph.model("SwinV2", {"images": images}, shapes, unused=("norm.",))
        x = graph.layer_norm(encoder.norm, x)
        if isinstance(head, AttentiveHead):
            logits = graph.linear(head, gather(graph, head, x), name="logits")
            return graph.model("SwinV2", {"images": images}, {logits: ("batch", head.out_features)})
        pooled = graph.node("ReduceMean", x, axes=(1, 2), keepdims=0, name="pooled")
        if head is None:
            return graph.model("SwinV2", {"images": images}, {pooled: ("batch", encoder.dim)})
        logits = graph.linear(head, pooled, name="logits")
        return graph.model("SwinV2", {"images": images}, {logits: ("batch", head.out_features)})

    def check_sizes(self, encoder: SwinV2) -> list[Size]:
        """One pixel; maps smaller than the window, of its size, one token larger; sides that neither patch nor window
        divides; high and wide ones."""
        patch, side = encoder.config.patch_size, encoder.config.patch_size * encoder.config.window_size
        return [(1, 1), (side, side), (side + patch, side), (2 * side + 1, side // 2 + 1), (side // 2 + 1, 3 * side - 1)]


ROWS = SwinV2Onnx()


def gather(graph: Graph, head: AttentiveHead, x: str) -> str:
    """`AttentiveHead.gather`: (B, H, W, C) to (B, M · C)."""
    dim = head.queries.shape[1]
    tokens = graph.node("Reshape", x, (0, -1, dim))
    scores = graph.node("MatMul", tokens, graph.node("Transpose", head.queries, perm=(1, 0)))
    scores = graph.node("Mul", graph.node("Transpose", scores, perm=(0, 2, 1)), float(dim) ** -0.5)
    return graph.node(
        "Reshape", graph.node("MatMul", graph.node("Softmax", scores, axis=-1), tokens), (-1, head.in_features)
    )


def patch_embed(graph: Graph, embed: PatchEmbed, images: str, size: MapSize) -> tuple[str, MapSize]:
    """(B, channels, height, width) to (B, H, W, C) and its size."""
    patch = embed.patch_size
    tokens = tuple((side + patch - 1) // patch for side in size)
    padding = tuple(count * patch - side for count, side in zip(tokens, size))
    if any(padding):
        images = graph.node("Pad", images, (0, 0, 0, 0, 0, 0, *padding))
    x = graph.node("Conv", images, embed.proj.weight, embed.proj.bias, strides=(patch, patch))
    return graph.layer_norm(embed.norm, graph.node("Transpose", x, perm=(0, 2, 3, 1))), tokens


def patch_merging(graph: Graph, merging: PatchMerging, x: str, size: MapSize) -> tuple[str, MapSize]:
    """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C) and its size."""
    joined, dim = merging.reduction.in_features, merging.reduction.out_features
    halves = tuple((side + 1) // 2 for side in size)
    x = pad_to(graph, x, size, tuple(half * 2 for half in halves))
    x = graph.node("Reshape", x, (-1, halves[0], 2, halves[1], 2, joined // 4))
    x = graph.node("Transpose", x, perm=(0, 1, 3, 4, 2, 5))  # column-major order of the four neighbors
    x = graph.linear(merging.reduction, graph.node("Reshape", x, (-1, joined)))
    return graph.layer_norm(merging.norm, graph.node("Reshape", x, (-1, *halves, dim))), halves


def swin_block(graph: Graph, block: SwinV2Block, x: str, size: MapSize) -> str:
    """(B, H, W, C) to the same shape."""
    dim = block.attn.proj.out_features
    x = graph.node("Add", x, graph.layer_norm(block.norm1, windowed_attention(graph, block, x, size)))
    y = graph.linear(block.mlp.fc1, graph.node("Reshape", x, (-1, dim)))
    error = graph.node("Erf", graph.node("Div", y, math.sqrt(2)))  # GELU, in the form that runtimes know to fuse
    y = graph.node("Mul", graph.node("Mul", y, graph.node("Add", error, 1.0)), 0.5)
    y = graph.node("Reshape", graph.linear(block.mlp.fc2, y), (-1, *size, dim))
    x = graph.node("Add", x, graph.layer_norm(block.norm2, y))
    return graph.layer_norm(block.norm3, x) if isinstance(block.norm3, nn.LayerNorm) else x


def windowed_attention(graph: Graph, block: SwinV2Block, x: str, size: MapSize) -> str:
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


def roll(graph: Graph, x: str, size: MapSize, shift: MapSize) -> str:
    """(B, H, W, C) moved cyclically up and left."""
    for axis, side, moved in zip((1, 2), size, shift):
        if moved != 0:
            source = graph.node("Mod", graph.node("Add", graph.range(side), (moved,)), (side,))
            x = graph.node("Gather", x, source, axis=axis)
    return x


def pad_to(graph: Graph, x: str, size: MapSize, padded: MapSize) -> str:
    """(B, H, W, C) with zeros below and right of it."""
    if padded == size:
        return x
    return graph.node("Pad", x, (0, 0, 0, 0, 0, padded[0] - size[0], padded[1] - size[1], 0))


def crop(graph: Graph, x: str, padded: MapSize, size: MapSize) -> str:
    """(B, padded height, padded width, C) without what `pad_to` added."""
    return x if padded == size else graph.node("Slice", x, (0, 0), size, (1, 2))


def partition(graph: Graph, x: str, counts: MapSize, window: MapSize, dim: int) -> str:
    """A map of windows, (B, H, W, C), to their tokens, (B · M · N, C)."""
    x = graph.node("Reshape", x, (-1, counts[0], window[0], counts[1], window[1], dim))
    return graph.node("Reshape", graph.node("Transpose", x, perm=(0, 1, 3, 2, 4, 5)), (-1, dim))


def shift_mask(graph: Graph, counts: MapSize, window: MapSize, padded: MapSize, shift: MapSize) -> str:
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
    graph: Graph, attn: WindowAttention, x: str, window: MapSize, pretrained: MapSize, mask: str | None, windows: Length
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
    return graph.linear(attn.proj, mixed)


def unit_length(graph: Graph, x: str) -> str:
    """Vectors on the last axis divided by their length, as `torch.nn.functional.normalize`."""
    length = graph.node("ReduceL2", x, axes=(-1,), keepdims=1)
    return graph.node("Div", x, graph.node("Max", length, 1e-12))


def position_bias(graph: Graph, attn: WindowAttention, window: MapSize, pretrained: MapSize) -> str:
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
    mlp: Any = attn.cpb_mlp
    hidden = graph.node("Relu", graph.linear(mlp[0], coords))
    table = graph.node("Gemm", mlp[2].weight, hidden, transB=1)  # (h, offsets)
    table = graph.node("Mul", graph.node("Sigmoid", table), 16.0)

    # Row · width + column numbers the tokens so that differences number the offsets.
    rows = graph.node("Mul", graph.range(window[0]), (width,))
    token = graph.node("Add", graph.node("Unsqueeze", rows, (1,)), graph.range(window[1]))
    first, second = (graph.node("Reshape", token, shape) for shape in ((-1, 1), (1, -1)))
    index = graph.node("Add", graph.node("Sub", first, second), ((window[0] - 1) * width + window[1] - 1,))
    return graph.node("Gather", table, index, axis=1)
