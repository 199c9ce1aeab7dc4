"""From a file's bytes to pixels, upright, in the channels that the model takes."""
from __future__ import annotations

import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Size = tuple[int, int]

# What reading an image can raise when the file is at fault. Pillow signals broken files by SyntaxError and ValueError
# too, and decompression bombs by an exception of its own.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class Picture:
    """One image, opened. Pixels are decoded when a view asks for them.

    Attributes:
        size: (width, height) in pixels, upright.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image, self.size = image, image.size

    def crop(self, box: tuple[float, float, float, float], size: Size) -> Tensor:
        """The part inside `box` (left, top, right, bottom in upright pixels), resized to `size` (height, width) by an
        antialiased bilinear filter: (channels, height, width) uint8."""
        view = self.image.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        pixels = np.array(view)
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())

    def decoded(self) -> Picture:
        """This picture with all its pixels in memory and no file open."""
        return self


def open_picture(record: dict, channels: int) -> Picture:
    """Open one row's image, `{"bytes": …, "path": …}`, to be seen in so many channels.

    Raises:
        One of `UNREADABLE` when the file is broken, missing or no image.
    """
    return Picture(read_image(record, channels))


def read_image(record: dict, channels: int) -> Image.Image:
    """Decode one row's image, upright, in mode L (`channels` 1) or RGB (3).

    Transparency is laid over white; 16-bit, 32-bit and float images are scaled by their own range.

    Raises:
        One of `UNREADABLE` when the file is broken, missing or no image.
    """
    if record["bytes"] is None and not os.path.getsize(record["path"]):
        raise ValueError("empty file")
    with Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = np.nanmin(values), np.nanmax(values)
        image = Image.fromarray(np.nan_to_num((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def reason(error: Exception) -> str:
    """Why an image was not read, in one line."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text or type(error).__name__
