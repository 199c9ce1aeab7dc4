"""Pixels as targets: the targets themselves, the linear layer that predicts them, and the loss over what is masked.

Shape letters: B images, H W tokens of the first stage in height and width, C channels of the last feature map, h w its
height and width. A mask is (B, H, W) bool at patch resolution, True = masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.base import Encoder, EncoderConfig, Size
from simmim.encoders.cost import LayerCost, Setup
from simmim.execution import at_least_float32, is_eager

EMPTY_MASK = 1e-5  # pixels: the reference's guard against an empty mask, far below one pixel


class PixelDecoder(nn.Linear):
    """One linear layer that predicts, from each token of the last feature map, its cell of stride × stride pixels.

    Args:
        dim: channels of the map; those of the encoder's last map by default.
    """

    def __init__(self, encoder: Encoder, dim: int | None = None) -> None:
        super().__init__(dim or encoder.dim, encoder.stride**2 * encoder.config.in_channels)
        self.stride, self.patch_size = encoder.stride, encoder.config.patch_size

    def predict(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The last feature map, (B, C, h, w), to pixels, (B, channels, height, width)."""
        pixels = self(rearrange(features, "b c h w -> b h w c"))
        image = rearrange(pixels, "b h w (c p q) -> b c (h p) (w q)", p=self.stride, q=self.stride)
        return image[..., : image_size[0], : image_size[1]]

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        mask: Tensor,
        prediction: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """`masked_l1` between prediction and targets, a scalar.

        Without a prediction, only the cells that are masked are predicted, where that is cheaper than to predict all.

        Args:
            features: (B, C, h, w).
            targets: (B, channels, height, width).
            mask: (B, H, W) bool, True = masked.
            prediction: as from `predict`.
            valid: as of `masked_l1`.
        """
        cells = self.masked_cells(mask, targets) if prediction is None else None
        if cells is None:
            prediction = self.predict(features, targets.shape[-2:]) if prediction is None else prediction  # type: ignore[arg-type]
            return masked_l1(prediction, targets, mask, self.patch_size, valid)
        pixels = self(rearrange(features, "b c h w -> b h w c")[cells])
        expected = rearrange(at_least_float32(targets), "b c (h p) (w q) -> b h w c p q", p=self.stride, q=self.stride)
        error = (pixels.to(expected.dtype) - expected[cells].flatten(1)).abs()
        if valid is not None:
            known = rearrange(valid, "b c (h p) (w q) -> b h w c p q", p=self.stride, q=self.stride)[cells].flatten(1)
            return (error * known).sum() / (known.sum() + EMPTY_MASK)
        return error.sum() / (len(error) * self.stride**2 + EMPTY_MASK) / targets.shape[1]

    def masked_cells(self, mask: Tensor, images: Tensor) -> Tensor | None:
        """Tokens of the last map whose cell is masked as a whole, (B, h, w) bool; None where all cells are to be predicted.

        All are predicted where some cell is masked in part, and where the choice would cost more than it saves: a GPU would
        wait for the number of cells, and a compiler would need to know it.
        """
        size = images.shape[-2:]
        if mask.device.type != "cpu" or not is_eager() or size[0] % self.stride or size[1] % self.stride:
            return None
        side = self.stride // self.patch_size
        patches = rearrange(mask, "b (h p) (w q) -> b h w (p q)", p=side, q=side)
        whole = patches.all(dim=-1)
        return whole if torch.equal(whole, patches.any(dim=-1)) else None


def decoder_shapes(config: EncoderConfig, dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a `PixelDecoder`'s parameters, for a map of `dim` channels."""
    outputs = config.strides[-1] ** 2 * config.in_channels
    return {"weight": (outputs, dim), "bias": (outputs,)}


def decoder_flops(config: EncoderConfig, dim: int, image_size: Size) -> int:
    """FLOPs per image of the forward pass of a `PixelDecoder`, with every pixel predicted."""
    tokens = math.prod(-(-side // config.strides[-1]) for side in image_size)
    return 2 * tokens * dim * config.in_channels * config.strides[-1] ** 2


def decoder_cost(config: EncoderConfig, dim: int, image_size: Size, setup: Setup, more_parameters: int) -> LayerCost:
    """Memory of a `PixelDecoder` and the loss, with every pixel predicted.

    Args:
        more_parameters: that belong to no other layer, mask tokens for instance.
    """
    parameters = sum(math.prod(shape) for shape in decoder_shapes(config, dim).values()) + more_parameters
    tokens = setup.batch_per_device * math.prod(-(-side // config.strides[-1]) for side in image_size)
    pixels = setup.batch_per_device * math.prod(image_size) * config.in_channels
    predicted = tokens * config.in_channels * config.strides[-1] ** 2
    # The decoder's input; in float32 the error of each pixel, and which pixels are masked, once for all channels.
    kept = tokens * dim * setup.compute_bytes + pixels * 4 * (1 + 1 / config.in_channels)
    loss = pixels * 4 * 2
    return LayerCost(
        parameters,
        kept + setup.weight_copies(parameters),
        forward=predicted * setup.compute_bytes + loss,
        backward=loss,
    )


def masked_l1(reconstruction: Tensor, target: Tensor, mask: Tensor, patch_size: int, valid: Tensor | None = None) -> Tensor:
    """Mean absolute error over masked pixels and channels, equation 1 of the SimMIM paper; 0 where nothing is masked.

    Args:
        reconstruction: (B, channels, height, width), as `target`.
        mask: (B, H, W) bool at patch resolution, True = masked.
        valid: (B, channels, height, width) bool, where the target has data; nothing else counts. None for everywhere.
    """
    target = at_least_float32(target)  # half precision cannot even count the pixels of a batch
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
    pixels = pixels[..., : target.shape[-2], : target.shape[-1]].to(target.dtype)
    if valid is not None:
        known = pixels * valid
        return ((reconstruction.to(target.dtype) - target).abs() * known).sum() / (known.sum() + EMPTY_MASK)
    error = (reconstruction.to(target.dtype) - target).abs() * pixels
    return error.sum() / (pixels.sum() + EMPTY_MASK) / target.shape[1]


# --- Targets normalized over a sliding patch ---------------------------------------------------------------------------


def check_target_patch(patch_px: int | None) -> None:
    """Check the side in pixels of the sliding patch; None for raw pixels.

    Raises:
        ValueError: for one that is not odd, or too small.
    """
    if patch_px is not None and (patch_px < 3 or patch_px % 2 == 0):
        raise ValueError(f"norm_target_patch is {patch_px}: give an odd number of pixels, 47 as published")


def pixel_targets(images: Tensor, patch_px: int | None, valid: Tensor | None = None) -> Tensor:
    """What predictions are compared with: the images, or the images normalized over a sliding patch.

    Args:
        valid: as of `masked_l1`; pixels without data are no part of the statistics.
    """
    if patch_px is None:
        return images
    mean, deviation = sliding_statistics(images, patch_px, valid)
    return (images - mean) / deviation


def as_pixels(prediction: Tensor, images: Tensor, patch_px: int | None) -> Tensor:
    """A prediction of `pixel_targets` in the scale of the images, for pictures.

    With normalized targets each pixel is put back to scale with the true local mean and deviation, which the encoder does
    not predict: such a picture knows the masked area's brightness and contrast.
    """
    prediction = prediction.to(images.dtype)
    if patch_px is None:
        return prediction
    mean, deviation = sliding_statistics(images, patch_px)
    return prediction * deviation + mean


def note_on_targets(provenance: Mapping[str, Any], patch_px: int | None) -> str:
    """What differs between the targets of an earlier run and these; empty for nothing."""
    earlier = provenance.get("norm_target_patch")
    if not earlier or earlier == patch_px:
        return ""
    return f"; they predict pixels normalized over {earlier} px: model.norm_target_patch {earlier} goes on like that"


def sliding_statistics(images: Tensor, patch_px: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each pixel's neighborhood, a square of `patch_px` clipped at the border.

    The deviation is sqrt(unbiased variance + 1e-6). A clipped square is a product of two intervals, so the mean over it
    is the mean over rows of the mean over columns: 2 · 47 additions per pixel and not 47².

    Args:
        images: (B, channels, height, width), float.
        valid: bool of the same shape, the pixels that count; None for all.

    Returns:
        Two tensors of the images' shape.
    """
    # E[x²] − E[x]² in float32 has no digits left for a flat area of a contrasting image. MPS has no float64.
    pixels = images.float() if images.device.type == "mps" else images.double()
    count = box_count(images.shape[-2:], patch_px, pixels)  # type: ignore[arg-type]
    share = 1.0
    if valid is not None:
        pixels = pixels * valid
        share = box_mean(valid.to(pixels.dtype), patch_px).clamp(min=1e-12)  # type: ignore[assignment]
        count = count * share
    mean = box_mean(pixels, patch_px) / share
    variance = (box_mean(pixels.square(), patch_px) / share - mean.square()) * count / (count - 1).clamp(min=1)
    return mean.to(images.dtype), (variance.clamp(min=0) + 1e-6).sqrt().to(images.dtype)


def box_mean(images: Tensor, patch_px: int) -> Tensor:
    """Mean over the part inside the image of the `patch_px` × `patch_px` square around each pixel."""
    half = patch_px // 2
    rows = F.avg_pool2d(images, (patch_px, 1), stride=1, padding=(half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, patch_px), stride=1, padding=(0, half), count_include_pad=False)


def box_count(size: tuple[int, int], patch_px: int, like: Tensor) -> Tensor:
    """Number of pixels that the square around each pixel has inside the image: (height, width), of `like`'s type."""
    half = patch_px // 2
    sides = []
    for side in size:
        position = torch.arange(side, device=like.device)
        sides.append((position + half).clamp(max=side - 1) - (position - half).clamp(min=0) + 1)
    return (sides[0][:, None] * sides[1][None, :]).to(like.dtype)
