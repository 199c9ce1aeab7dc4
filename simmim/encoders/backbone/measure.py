"""What is known of a network only when it is built: channels and strides of its maps, its layers, whether sizes may vary.

Everything is measured on the meta device, which computes shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from simmim.encoders.backbone.config import BackboneConfig
from simmim.encoders.backbone.layers import num_blocks_of
from simmim.encoders.backbone.networks import NetworkOutput, adapter_of
from simmim.encoders.base import Size
from simmim.messages import first_line

NUM_MAPS = 4  # of a plain transformer: at a quarter, half, three quarters and all of its depth, as BEiT and MAE segment
LEAST_STRIDE = 4  # of the stem of a convolutional network no map is used


def measured_config(
    library: str, architecture: str, arguments: dict[str, Any], image_size: Size, in_channels: int
) -> BackboneConfig:
    """The configuration of a network, with everything that is measured of it at its own image size.

    Raises:
        ValueError: when the library cannot build the network, or it does not take such images.
    """
    config = BackboneConfig(library, architecture, arguments, (1,), (1,), (), 0, "", in_channels=in_channels)
    adapter = adapter_of(library)
    with torch.device("meta"):
        network = adapter.build(config).eval()
    try:
        output = shapes_at(config, network, image_size)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"{architecture} of {library} does not take images of {image_size}: {first_line(error)}") from error
    config = replace(
        config,
        num_layers=num_blocks_of(adapter.layers(network)),
        projection=projection_of(network, in_channels),
        **maps_of(output, image_size),
    )
    return replace(config, fixed_size=None if takes_other_sizes(config, network, image_size) else image_size)


@torch.no_grad()
def shapes_at(config: BackboneConfig, network: nn.Module, size: Size) -> NetworkOutput:
    """The output for one image of this size, on the meta device."""
    image = torch.empty((1, config.in_channels, *size), device="meta")
    return adapter_of(config.library).run(network, image, None)


def maps_of(output: NetworkOutput, size: Size) -> dict[str, Any]:
    """Widths, strides and indices of the maps to use, as fields of `BackboneConfig`.

    Of several maps at one stride the last one is used; where all have one stride, `NUM_MAPS` at even depths. The last map's
    width is that of the map after the final norm.
    """
    if output.last is None:
        return {"widths": (output.pooled.shape[1],), "map_strides": (max(size),), "map_indices": (), "has_maps": False}
    last_stride = stride_of(output.last.shape[-2:], size)
    strides = [stride_of(one.shape[-2:], size) for one in output.maps]
    by_stride = {stride: number for number, stride in enumerate(strides) if stride and stride >= LEAST_STRIDE}
    if last_stride not in by_stride:
        return {"widths": (output.last.shape[1],), "map_strides": (last_stride,), "map_indices": (), "has_maps": True}
    indices = list(by_stride.values())
    if len(indices) == 1 and len(output.maps) > 1:
        depth, number = len(output.maps), min(NUM_MAPS, len(output.maps))
        indices = [math.ceil(depth * part / number) - 1 for part in range(1, number + 1)]
    widths = [output.maps[index].shape[1] for index in indices[:-1]] + [output.last.shape[1]]
    used: Sequence[int] = [strides[index] for index in indices]
    return {"widths": tuple(widths), "map_strides": tuple(used), "map_indices": tuple(indices), "has_maps": True}


def stride_of(grid: Sequence[int], size: Size) -> int:
    """Pixels per token of a map of an image, whole; rounded up where a network has cut the rest off."""
    return max(1, *(math.ceil(pixels / tokens) for pixels, tokens in zip(size, grid)))


def projection_of(network: nn.Module, in_channels: int) -> str:
    """The name in an encoder of the weight that reads the images: that of the first convolution; empty for another kind."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return f"network.{name}.weight" if module.in_channels == in_channels and module.groups == 1 else ""
        if isinstance(module, nn.Linear):
            return ""
    return ""


def takes_other_sizes(config: BackboneConfig, network: nn.Module, size: Size) -> bool:
    """Whether the network takes images of another size, to whose strides they are padded."""
    stride = config.strides[-1]
    other = (size[0] + 2 * stride, size[1] + stride)
    try:
        output = shapes_at(config, network, other)
    except (RuntimeError, AssertionError, ValueError, TypeError):
        return False
    return not config.has_maps or output.last is not None
