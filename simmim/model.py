"""SimMIM (arXiv 2111.09886): mask, encode, predict the pixels by one linear layer, L1 over what was masked.

Shape letters: B images, H W tokens of the first stage in height and width, C channels of a feature map. A mask is
(B, H, W) bool at patch resolution, True = masked.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.fused import plainly_eager
from simmim.swinv2 import SwinV2, at_least_float32

EMPTY_MASK = 1e-5  # pixels: the reference's guard, which a count of thousands does not feel


class SimMIMOutput(NamedTuple):
    """The loss, a scalar; on request the prediction, (B, channels, height, width) in the space of the targets."""

    loss: Tensor
    reconstruction: Tensor | None


class SimMIM(nn.Module):
    """An encoder under masked image modelling.

    Args:
        encoder: any `SwinV2`.
        norm_target_patch: side in pixels, odd, of the sliding patch by whose mean and deviation each target pixel is
            normalised (47 for Swin V2's own pre-training); None predicts raw, that is only preprocessed, pixels.
    """

    def __init__(self, encoder: SwinV2, norm_target_patch: int | None = None) -> None:
        super().__init__()
        if norm_target_patch is not None and (norm_target_patch < 3 or norm_target_patch % 2 == 0):
            raise ValueError(f"norm_target_patch is {norm_target_patch}: give an odd number of pixels, 47 as published")
        self.encoder = encoder
        self.norm_target_patch = norm_target_patch
        self.mask_token = nn.Parameter(torch.zeros(encoder.config.embed_dim))
        self.decoder = nn.Linear(encoder.dim, encoder.stride**2 * encoder.config.in_channels)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def own_state(self) -> dict[str, Tensor]:
        """The weights that are not the encoder's: mask token and decoder."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    def forward(self, images: Tensor, mask: Tensor, return_reconstruction: bool = False) -> SimMIMOutput:
        """Loss of predicting the masked pixels of `images` from the visible ones.

        Args:
            images: (B, channels, height, width), float, normalised.
            mask: (B, H, W) bool, True = masked.
        """
        tokens = self.substitute(self.encoder.embed(images), mask)
        features = self.encoder.encode(tokens).features
        hidden = None if return_reconstruction else self.masked_squares(mask, images)
        if hidden is not None:
            return SimMIMOutput(self.loss_of_squares(features, self.targets(images), hidden), None)
        reconstruction = self.predict(features, images.shape[-2:])
        loss = masked_l1(reconstruction, self.targets(images), mask, self.encoder.config.patch_size)
        return SimMIMOutput(loss, reconstruction if return_reconstruction else None)

    def substitute(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Masked tokens, (B, H, W, C), replaced by the one learned mask token."""
        if mask.shape != tokens.shape[:3] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}: expected bool {tuple(tokens.shape[:3])}, True = masked, "
                "one entry a patch"
            )
        return torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)

    def predict(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Pixels from the last feature map, (B, C, h, w): each token gives its stride × stride square."""
        stride = self.encoder.stride
        pixels = self.decoder(rearrange(features, "b c h w -> b h w c"))
        image = rearrange(pixels, "b h w (c p q) -> b c (h p) (w q)", p=stride, q=stride)
        return image[..., : image_size[0], : image_size[1]]

    def masked_squares(self, mask: Tensor, images: Tensor) -> Tensor | None:
        """Which of the last map's tokens are masked, (B, h, w) bool, each with its whole square of pixels; None where a
        square is masked in part, and where choosing among them costs more than it saves: a GPU would have to tell how
        many there are, and a compiler to know."""
        stride = self.encoder.stride
        if mask.device.type != "cpu" or not plainly_eager() or images.shape[-2] % stride or images.shape[-1] % stride:
            return None
        side = stride // self.encoder.config.patch_size
        patches = rearrange(mask, "b (h p) (w q) -> b h w (p q)", p=side, q=side)
        whole = patches.all(dim=-1)
        return whole if torch.equal(whole, patches.any(dim=-1)) else None

    def loss_of_squares(self, features: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
        """`masked_l1` of what `predict` would give, without predicting what is not asked for.

        Args:
            features: (B, C, h, w).
            hidden: as from `masked_squares`.
        """
        stride = self.encoder.stride
        pixels = self.decoder(rearrange(features, "b c h w -> b h w c")[hidden])
        squares = rearrange(at_least_float32(targets), "b c (h p) (w q) -> b h w c p q", p=stride, q=stride)
        error = (pixels.to(squares.dtype) - squares[hidden].flatten(1)).abs()
        return error.sum() / (len(error) * stride**2 + EMPTY_MASK) / targets.shape[1]

    def targets(self, images: Tensor) -> Tensor:
        """What the masked pixels are compared with: the images, or the images normalised over a sliding patch."""
        if self.norm_target_patch is None:
            return images
        mean, deviation = sliding_statistics(images, self.norm_target_patch)
        return (images - mean) / deviation

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The prediction as pixels in the scale of `images`, for looking at: (B, channels, height, width) float.

        With normalised targets each pixel is put back to scale with the true local mean and deviation, which the
        encoder does not predict: such a picture knows the masked area's brightness and contrast.
        """
        reconstruction = self(images, mask, return_reconstruction=True).reconstruction.to(images.dtype)
        if self.norm_target_patch is None:
            return reconstruction
        mean, deviation = sliding_statistics(images, self.norm_target_patch)
        return reconstruction * deviation + mean


def masked_l1(reconstruction: Tensor, target: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Mean absolute error over masked pixels and channels, equation 1 of the paper; 0 where nothing is masked.

    Args:
        reconstruction: (B, channels, height, width), as `target`.
        mask: (B, H, W) bool at patch resolution, True = masked.
    """
    target = at_least_float32(target)  # half precision cannot even count the pixels of a batch
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
    pixels = pixels[..., : target.shape[-2], : target.shape[-1]].to(target.dtype)
    error = (reconstruction.to(target.dtype) - target).abs() * pixels
    return error.sum() / (pixels.sum() + EMPTY_MASK) / target.shape[1]


def sliding_statistics(images: Tensor, patch_px: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each pixel's neighbourhood, a square of `patch_px` clipped at the border.

    The deviation is sqrt(unbiased variance + 1e-6). A clipped square is a product of two intervals, so the mean over it
    is the mean over rows of the mean over columns: 2 · 47 additions a pixel and not 47².

    Args:
        images: (B, channels, height, width), float.

    Returns:
        Two tensors of the images' shape.
    """
    # E[x²] − E[x]² in float32 has no digits left for a flat area of a contrasting image. MPS has no float64.
    pixels = images.float() if images.device.type == "mps" else images.double()
    mean = box_mean(pixels, patch_px)
    count = box_count(images.shape[-2:], patch_px, pixels)
    variance = (box_mean(pixels.square(), patch_px) - mean.square()) * count / (count - 1).clamp(min=1)
    return mean.to(images.dtype), (variance.clamp(min=0) + 1e-6).sqrt().to(images.dtype)


def box_mean(images: Tensor, patch_px: int) -> Tensor:
    """Mean over the `patch_px` × `patch_px` square around each pixel, over what of it lies in the image."""
    half = patch_px // 2
    rows = F.avg_pool2d(images, (patch_px, 1), stride=1, padding=(half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, patch_px), stride=1, padding=(0, half), count_include_pad=False)


def box_count(size: tuple[int, int], patch_px: int, like: Tensor) -> Tensor:
    """How many pixels of the square around each pixel lie in the image: (height, width), of `like`'s type."""
    half = patch_px // 2
    sides = []
    for side in size:
        position = torch.arange(side, device=like.device)
        sides.append((position + half).clamp(max=side - 1) - (position - half).clamp(min=0) + 1)
    return (sides[0][:, None] * sides[1][None, :]).to(like.dtype)
