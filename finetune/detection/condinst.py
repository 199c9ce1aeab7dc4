"""Masks by conditional convolutions (CondInst, arXiv 2003.05664): every point predicts the weights of a small network, which
turns features that all objects of an image share into the mask of the point's object.

Shape letters: H W height and width of the features, N objects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 8  # of the shared features and of the network's hidden layers, as published
NUM_WEIGHTS = (CHANNELS + 2) * CHANNELS, CHANNELS * CHANNELS, CHANNELS  # of the three layers of 1 × 1
NUM_BIASES = CHANNELS, CHANNELS, 1
NUM_PARAMETERS = sum(NUM_WEIGHTS) + sum(NUM_BIASES)  # 169


class Layer(NamedTuple):
    """One layer of N networks.

    Attributes:
        weight: (N, outputs, inputs).
        bias: (N, outputs).
    """

    weight: Tensor
    bias: Tensor


def split_parameters(parameters: Tensor) -> list[Layer]:
    """The layers of N networks. The weights of all layers come first, then the biases, as in the paper's implementation.

    Args:
        parameters: (N, `NUM_PARAMETERS`).
    """
    *weights, first, second, third = parameters.split([*NUM_WEIGHTS, *NUM_BIASES], dim=1)
    inputs = CHANNELS + 2, CHANNELS, CHANNELS
    return [
        Layer(weight.unflatten(1, (bias.shape[1], count)), bias)
        for weight, bias, count in zip(weights, (first, second, third), inputs)
    ]


def mask_logits(features: Tensor, stride: int, parameters: Tensor, points: Tensor, units: Tensor) -> Tensor:
    """The masks of N objects of one image, (N, H, W) logits.

    The first layer sees the features and where a cell lies, seen from the object's point, in units of its level: the
    same object at another place has the same mask.

    Args:
        features: (`CHANNELS`, H, W) of the image.
        stride: of the features, in pixels.
        parameters: (N, `NUM_PARAMETERS`).
        points: (N, 2), (x, y) in pixels.
        units: (N,), in pixels.
    """
    _, height, width = features.shape
    first, second, third = split_parameters(parameters)
    x, y = ((torch.arange(count, device=features.device) + 0.5) * stride for count in (width, height))
    unit = units[:, None]
    across, down = (x - points[:, :1]) / unit, (y - points[:, 1:]) / unit  # (N, W), (N, H)
    # Coordinates vary along one axis each: their share is computed for an axis, and not for all cells.
    of_x = first.weight[:, :, 0, None] * across[:, None]  # (N, CHANNELS, W)
    of_y = first.weight[:, :, 1, None] * down[:, None] + first.bias[:, :, None]  # (N, CHANNELS, H)
    hidden = (first.weight[:, :, 2:] @ features.flatten(1)).unflatten(2, (height, width))
    hidden = F.relu(hidden + of_x[:, :, None] + of_y[..., None]).flatten(2)
    hidden = F.relu(second.weight @ hidden + second.bias[:, :, None])
    return (third.weight @ hidden + third.bias[:, :, None])[:, 0].unflatten(1, (height, width))
