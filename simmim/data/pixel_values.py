"""Pixel values of any type and mode as 8-bit gray or RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

PHOTOMETRIC = 262  # TIFF's tag that says what a sample means; 0: white is zero


def to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode in mode L if it is gray, else in RGB. Transparency is laid over white; values deeper than
    8 bits are scaled by their range."""
    if image.mode[0] in "IF":
        return _deep_to_gray(image)
    gray = image.mode in ("1", "L", "LA", "La") or (image.mode == "P" and _has_gray_palette(image))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        # Pillow converts La to LA only.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == ("L" if gray else "RGB") else image.convert("RGB").convert("L" if gray else "RGB")


def _has_gray_palette(image: Image.Image) -> bool:
    """Whether all colors that the image uses are gray, as in many scans."""
    used = np.flatnonzero(image.histogram())
    colors: np.ndarray = np.reshape(image.getpalette("RGB"), (-1, 3))  # type: ignore[arg-type]
    colors = colors[used[used < len(colors)]]
    return bool((colors == colors[:, :1]).all())


def _deep_to_gray(image: Image.Image) -> Image.Image:
    """Mode L of a loaded image of 16-bit, 32-bit or float values; a transparent value becomes white."""
    values = np.asarray(image)
    opaque = values != image.info["transparency"] if "transparency" in image.info else None
    low, high = finite_range(values if opaque is None else values[opaque])
    pixels = np.empty(values.shape, dtype=np.uint8)
    for first in range(0, len(values), 256):  # float64 of all pixels at once would need eight times the memory
        pixels[first : first + 256] = scale_to_255(values[first : first + 256], low, high).round()
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # Pillow inverts such values up to 8 bits only
        pixels = 255 - pixels
    return Image.fromarray(pixels if opaque is None else np.where(opaque, pixels, np.uint8(255)))


def finite_range(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite value; zeros if there is none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def scale_to_255(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`values` from [low, high] to [0, 255], float32. NaN becomes 0, infinities become the ends of the range."""
    if values.dtype == np.uint16 and values.size > 2**16:
        return scale_to_255(np.arange(2**16), low, high)[values]
    # Halves, because the span from the smallest to the largest float overflows.
    span = max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    with np.errstate(invalid="ignore", over="ignore"):
        shares = np.clip((values.astype(np.float64) / 2 - low / 2) / span, 0, 1)
    return (np.nan_to_num(shares, nan=0.0) * 255).astype(np.float32)


def type_range(dtype: np.dtype) -> tuple[float, float]:
    """The smallest and largest value of a type; 0 and 1 of floating-point numbers and bool."""
    if dtype.kind in "iu":
        return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    return 0.0, 1.0
