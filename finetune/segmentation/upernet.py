"""UPerNet (arXiv 1807.10221), the head that Swin's dense predictions are published with: pyramid pooling of the coarsest map
(PSPNet, arXiv 1612.01105), a feature pyramid down to the finest one, all levels fused, one score a class and pixel.

Ours rather than a library's: transformers' head, with which a test compares this one weight by weight, has batch norms
alone, which fail on a batch of one (the 1 × 1 pooling has one value a channel), has no dropout and leaves the maps as they
come. Norms here are batch norms, as published, or those of each image alone, for batches of a few. Either centers channels
one by one, which matters: on eight scenes, 60 steps of AdamW at 4e-3 brought the loss to 0.19 with batch norms, 0.23 with
norms of each image's channels, 0.67 with group norms of 16 channels and 0.98 with layer norms of each pixel.

Shape letters: B images, C channels of a stage, D channels of the head, K classes, H W height and width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_SCALES = (1, 2, 3, 6)  # as published
GROUP_CHANNELS = 16  # normed together where an image has few values of each
NORMS = ("batch", "image")


class ConvNormReLU(nn.Sequential):
    """A convolution without bias that keeps height and width, its norm, ReLU.

    Args:
        side: of the kernel, odd.
        norm: batch, as published, or image: each channel over the image's own map.
        coarse: the map has few values, so that `image` norms 16 channels together.
    """

    def __init__(self, channels_in: int, channels_out: int, side: int, norm: str, coarse: bool = False) -> None:
        convolution = nn.Conv2d(channels_in, channels_out, side, padding=side // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(convolution, norm_of(norm, channels_out, coarse), nn.ReLU())


def norm_of(norm: str, channels: int, coarse: bool) -> nn.Module:
    """A norm of so many channels, as of `ConvNormReLU`."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // GROUP_CHANNELS if coarse else channels, channels)


class UPerNet(nn.Module):
    """Feature maps of all stages to scores of classes at the finest map's resolution.

    Args:
        channels: of each stage's map, the finest first; one stage or more.
        classes: K.
        width: D, a multiple of 16.
        norm: of `NORMS`.
        pool_scales: sides of the pooled maps.
        dropout: share of the fused channels that a training step leaves out.

    Raises:
        ValueError: for another norm, and for a width that is no multiple of 16.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        width: int = 512,
        norm: str = "batch",
        pool_scales: Sequence[int] = POOL_SCALES,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_head(width, norm)
        *finer, coarsest = channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormReLU(coarsest, width, 1, norm, True)) for scale in pool_scales
        )
        self.pyramid = ConvNormReLU(coarsest + len(pool_scales) * width, width, 3, norm, coarse=True)
        self.laterals = nn.ModuleList(ConvNormReLU(stage, width, 1, norm) for stage in finer)
        self.outputs = nn.ModuleList(ConvNormReLU(width, width, 3, norm) for _ in finer)
        self.fuse = ConvNormReLU(len(channels) * width, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = scores(width, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of (B, C, H, W), the finest first, to logits, (B, K, H, W) of the finest."""
        levels = [lateral(stage) for lateral, stage in zip(self.laterals, maps)]
        levels.append(self.pooled(maps[-1]))
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + resized(levels[level], levels[level - 1])
        levels = [output(level) for output, level in zip(self.outputs, levels)] + levels[-1:]
        fused = self.fuse(torch.cat([resized(level, levels[0]) for level in levels], dim=1))
        return self.classify(self.dropout(fused))

    def pooled(self, coarsest: Tensor) -> Tensor:
        """Pyramid pooling: the map beside its means over 1, 2², 3² and 6² fields."""
        return self.pyramid(torch.cat([coarsest, *(resized(pool(coarsest), coarsest) for pool in self.pools)], dim=1))


class FCN(nn.Module):
    """The auxiliary head on one stage's map, in training alone: one convolution and the scores.

    Args:
        as of `UPerNet`; `channels` of the one map.
    """

    def __init__(self, channels: int, classes: int, width: int = 256, norm: str = "batch", dropout: float = 0.1) -> None:
        super().__init__()
        self.convolve = ConvNormReLU(channels, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = scores(width, classes)

    def forward(self, stage: Tensor) -> Tensor:
        """A map, (B, C, H, W), to logits, (B, K, H, W)."""
        return self.classify(self.dropout(self.convolve(stage)))


def scores(width: int, classes: int) -> nn.Conv2d:
    """One score a class, from nearly equal ones at the beginning."""
    convolution = nn.Conv2d(width, classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.bias)
    return convolution


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map brought to another's height and width."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def check_head(width: int, norm: str) -> None:
    """Refuse what no head can be made of.

    Raises:
        ValueError: saying what would do.
    """
    if norm not in NORMS:
        raise ValueError(f"head.norm is {norm!r}: give one of {', '.join(NORMS)}")
    if width < 1 or width % GROUP_CHANNELS:
        raise ValueError(f"head.width is {width}: give a positive multiple of {GROUP_CHANNELS}")
