"""UPerNet (arXiv 1807.10221), the head of Swin's published dense predictions: pyramid pooling of the coarsest map (PSPNet,
arXiv 1612.01105), a feature pyramid down to the finest one, all levels fused, one score per class and pixel.

It is not a library's: transformers' head, with which a test compares this one weight by weight, has batch norms only, which
fail on a batch of one (the 1 × 1 pooling has one value per channel), has no dropout, and does not normalize the maps. Norms
here are batch norms, as published, or those of each image alone, for small batches. Both center each channel, which matters:
on eight scenes, 60 steps of AdamW at 4e-3 brought the loss to 0.19 with batch norms, 0.23 with norms of each image's
channels, 0.67 with group norms of 16 channels and 0.98 with layer norms of each pixel.

Shape letters: B images, C channels of a stage, D channels of the head, K classes, H W height and width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_SCALES = (1, 2, 3, 6)  # as published
GROUP_CHANNELS = 16  # normalized together where an image has few values per channel
NORMS = ("batch", "image")


class ConvNormReLU(nn.Sequential):
    """A convolution without bias that keeps height and width, its norm, ReLU.

    Args:
        channels_in, channels_out: of the convolution.
        side: of the kernel, odd.
        norm: batch, as published, or image: each channel over the image's own map.
        coarse: whether the map has so few values that `image` normalizes 16 channels together.
    """

    def __init__(self, channels_in: int, channels_out: int, side: int, norm: str, coarse: bool = False) -> None:
        convolution = nn.Conv2d(channels_in, channels_out, side, padding=side // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(convolution, build_norm(norm, channels_out, coarse), nn.ReLU())


def build_norm(norm: str, channels: int, coarse: bool) -> nn.Module:
    """A norm; the arguments are as of `ConvNormReLU`."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // GROUP_CHANNELS if coarse else channels, channels)


class UPerNet(nn.Module):
    """Feature maps of all stages to scores of classes at the finest map's resolution.

    Args:
        channels: of each stage's map, the finest first; one stage or more.
        num_classes: K.
        width: D, a multiple of 16.
        norm: one of `NORMS`.
        pool_scales: sides of the pooled maps.
        dropout: probability that a fused channel is zeroed in training.

    Raises:
        ValueError: for another norm, and for a width that is not a multiple of 16.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
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
        self.classify = build_classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of (B, C, H, W), the finest first, to logits, (B, K, H, W) of the finest."""
        levels = [lateral(stage) for lateral, stage in zip(self.laterals, maps)]
        levels.append(self.pool(maps[-1]))
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + resize_like(levels[level], levels[level - 1])
        levels = [output(level) for output, level in zip(self.outputs, levels)] + levels[-1:]
        fused = self.fuse(torch.cat([resize_like(level, levels[0]) for level in levels], dim=1))
        return self.classify(self.dropout(fused))

    def pool(self, coarsest: Tensor) -> Tensor:
        """Pyramid pooling: the coarsest map, (B, C, H, W), and its means over 1, 2², 3² and 6² cells, to (B, D, H, W)."""
        return self.pyramid(torch.cat([coarsest, *(resize_like(pool(coarsest), coarsest) for pool in self.pools)], dim=1))


class FCN(nn.Module):
    """The auxiliary head on one stage's map, used in training only: a convolution and the scores.

    Args:
        channels: of the map.
        num_classes, width, norm, dropout: as of `UPerNet`.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 256, norm: str = "batch", dropout: float = 0.1) -> None:
        super().__init__()
        self.convolve = ConvNormReLU(channels, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = build_classifier(width, num_classes)

    def forward(self, stage: Tensor) -> Tensor:
        """A map, (B, C, H, W), to logits, (B, K, H, W)."""
        return self.classify(self.dropout(self.convolve(stage)))


def build_classifier(width: int, num_classes: int) -> nn.Conv2d:
    """One score per class, nearly equal at initialization."""
    convolution = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.bias)
    return convolution


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """A map resized to the height and width of another."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def check_head(width: int, norm: str) -> None:
    """Refuse settings from which no head can be built.

    Raises:
        ValueError: naming the setting and what to give.
    """
    if norm not in NORMS:
        raise ValueError(f"head.norm is {norm!r}: give one of {', '.join(NORMS)}")
    if width < 1 or width % GROUP_CHANNELS:
        raise ValueError(f"head.width is {width}: give a positive multiple of {GROUP_CHANNELS}")
