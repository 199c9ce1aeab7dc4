"""Pictures of what a model reconstructs. Tensors in, images out; nothing here writes or logs."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

COLUMNS = ("original", "masked", "prediction pasted", "full prediction")
MASK_GRAY, GAP_PX, LABEL_PX = 0.5, 4, 14
BRIGHT = 0.99  # of a composite's values, this share is shown below white
MIN_CELL_PX = 96  # small images are enlarged, pixel by pixel, until a person can see them


def reconstruction_panels(
    images: Tensor, mask: Tensor, prediction: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The four views of each image, in [0, 1]: original, masked, prediction pasted into the mask, full prediction.

    Args:
        images, prediction: (B, channels, height, width), normalized by `mean` and `std`.
        mask: (B, H, W) bool at patch resolution, True = masked.

    Returns:
        (B, 4, 3, height, width). One channel is shown as gray; two and more than three are a composite of colors, as
        bright as leaves the original's colors apart.
    """
    means, stds = (images.new_tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    images, prediction = ((pixels.float() * stds + means).clamp(0, 1) for pixels in (images, prediction))
    height, width = images.shape[-2:]
    scale = -(-height // mask.shape[-2])
    hidden = mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None, :height, :width]
    images, prediction = composite(images), composite(prediction)
    values = images.flatten(1)  # kthvalue, as quantile refuses large batches in older versions of torch
    brightest = values.kthvalue(math.ceil(BRIGHT * values.shape[1]), dim=1).values.clamp(min=1).view(-1, 1, 1, 1)
    images, prediction = ((pixels / brightest).clamp(max=1) for pixels in (images, prediction))
    masked = images.masked_fill(hidden, MASK_GRAY)
    return torch.stack([images, masked, torch.where(hidden, prediction, images), prediction], dim=1)


def as_color(pixels: Tensor) -> Tensor:
    """Pixels of any number of channels as colors, (…, channels, height, width) in [0, 1] to (…, 3, height, width).

    One channel is gray and three are red, green and blue. Of other numbers each channel shines in a color of its own, as in
    pictures of fluorescence; the colors are evenly spaced hues.
    """
    return composite(pixels).clamp(max=1)


def composite(pixels: Tensor) -> Tensor:
    """`as_color` with sums above 1, where several channels are bright."""
    channels = pixels.shape[-3]
    if channels in (1, 3):
        return pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    colors = pixels.new_tensor([colorsys.hsv_to_rgb(channel / channels, 1.0, 1.0) for channel in range(channels)])
    return torch.einsum("...chw,ck->...khw", pixels, colors)


def reconstruction_grid(
    images: Tensor,
    mask: Tensor,
    prediction: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    across: int = 1,
) -> Image.Image:
    """`reconstruction_panels` as one labeled picture, a row an image, `across` images beside one another."""
    panels = reconstruction_panels(images, mask, prediction, mean, std).cpu()
    factor = max(1, -(-MIN_CELL_PX // max(panels.shape[-2:])))
    if factor > 1:
        panels = rearrange(F.interpolate(panels.flatten(0, 1), scale_factor=factor), "(b k) c h w -> b k c h w", k=4)
    count, _, _, height, width = panels.shape
    rows, block = -(-count // across), 4 * (width + GAP_PX) + 3 * GAP_PX
    picture = Image.new("RGB", (across * block - 3 * GAP_PX - GAP_PX, LABEL_PX + rows * (height + GAP_PX)), "white")
    draw = ImageDraw.Draw(picture)
    for column in range(min(across, count)):
        for view, label in enumerate(COLUMNS):
            draw.text((column * block + view * (width + GAP_PX), 1), label, fill="black")
    for index, views in enumerate(panels):
        top = LABEL_PX + (index // across) * (height + GAP_PX)
        for view, pixels in enumerate(views):
            cell = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            picture.paste(Image.fromarray(cell), ((index % across) * block + view * (width + GAP_PX), top))
    return picture
