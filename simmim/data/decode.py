"""From a file's bytes to pixels, upright, in the channels that the model takes.

A JPEG is decoded when a view asks for pixels, and no finer than the view needs; other formats are decoded when opened.
Images of 1 or 3 channels go through Pillow; arrays (`.npy`) and TIFF files with other counts are resized channel by
channel by the same filter. Which filters there are: `INTERPOLATIONS`.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Size = tuple[int, int]
Box = tuple[float, float, float, float]

# What opening or cropping an image raises when the file is at fault. Decoders signal broken files by almost any
# exception; `decoding` turns it into one of these, so that a view's own error is not taken for a broken image.
UNREADABLE = (OSError, ValueError)

MAX_PIXELS = 200_000_000

# Formats with a signature. Pillow knows more, but some have none, so that noise passes for an image (TGA, PCX), some
# start other programs (EPS), and some hold a second image with a size of its own (ICO).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "QOI", "SGI", "PSD")

# A JPEG is decoded at the coarsest of 1, 1/2, 1/4, 1/8 that leaves at least so many pixels a target pixel, on either
# side. Measured on crops of 0.67 and more of 1600x1200 photos to 192 px, in dB against a full decode (mean, worst) and
# ms (18 in full): 1 and 1.25 alike 47, 43, 5.2; 1.5: 51, 44, 6.8; 2: 54, 51, 8.0. 47 dB is 1.1 levels root mean square.
PIXELS_KEPT = 1.25
# Sharper filters show more of what a coarse decode has lost. Bicubic, photos of 1600x1200 and 4000x3000 to 224 px: at 1.25
# 39 to 45 dB and 5 to 10 levels off in the worst 1 % of pixels; at 2: 48 to 53 dB, 3 levels at most, Lanczos alike.
SHARP_PIXELS_KEPT = 2.0
# From how many pixels a target pixel, along a side, Pillow's shortcut of averaging whole pixels first is faster than
# torch's filter; with a gap of 3 its manual calls the result nearly that of the filter alone. For bilinear only: who
# asks for another filter wants that filter, and the shortcut is up to 5 levels off.
SHORTCUT_FROM, REDUCING_GAP = 8.0, 3.0
THUMBNAIL_PIXELS = 128 * 128  # up to so many pixels torch's start costs more than its filter gains


class Interpolation(NamedTuple):
    """A filter that images are resized by; antialiased when they shrink, all but nearest.

    Attributes:
        code: Pillow's.
        reach: how far it looks, in target pixels when the image shrinks, in the image's own when it grows.
        pixels_kept: so many pixels a target pixel a JPEG's decode leaves at least; infinite where none may be averaged.
        by_torch: whether torch has the same.
    """

    code: Image.Resampling
    reach: int
    pixels_kept: float
    by_torch: bool = False


INTERPOLATIONS = {
    "nearest": Interpolation(Image.Resampling.NEAREST, 1, math.inf),
    "bilinear": Interpolation(Image.Resampling.BILINEAR, 1, PIXELS_KEPT, by_torch=True),
    "bicubic": Interpolation(Image.Resampling.BICUBIC, 2, SHARP_PIXELS_KEPT, by_torch=True),
    "lanczos": Interpolation(Image.Resampling.LANCZOS, 3, SHARP_PIXELS_KEPT),
}

NUMPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two are BigTIFF's
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"RIFF": "WebP"}
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")

# EXIF's orientation: how to turn the stored picture upright, and which of the upright picture's axes (x, y) run against
# the stored one's. From 5 on the axes are exchanged too.
TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}
ORIENTATION = 0x0112  # TIFF's and EXIF's number of the tag; the next ones are TIFF's
PHOTOMETRIC, SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 262, 277, 338
COLOR_SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # by PHOTOMETRIC, without alpha or other extras


class Picture:
    """One image in memory, in any of Pillow's modes.

    Attributes:
        size: (width, height) in pixels, upright.
        channels: of what `crop` returns.
        image: the pixels, in mode L or RGB.
    """

    def __init__(self, image: Image.Image, channels: int | None = None) -> None:
        shown = on_white(image)
        self.image = shown.convert("L") if channels == 1 else shown
        self.size, self.channels = image.size, channels or len(shown.getbands())

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        """The part inside `box` (left, top, right, bottom in upright pixels), resized to `size` (height, width) by one
        of `INTERPOLATIONS`: (channels, height, width) uint8.

        Raises:
            One of `UNREADABLE` when the file turns out broken; ValueError for a box that holds nothing, and for an
            unknown interpolation.
        """
        return _tensor(_resized(self.image, _inside(box, self.size), size, interpolation), self.channels)

    def decoded(self) -> Picture:
        """This picture with all its pixels in memory and no file open."""
        return self


class JpegPicture(Picture):
    """A JPEG file of which only the header was read. Every crop decodes it anew, as coarsely as the crop allows."""

    def __init__(self, record: dict, image: Image.Image, channels: int | None) -> None:
        self.record, self.opened = record, image
        self.channels = channels or (1 if image.mode == "L" else 3)
        self.orientation = orientation(image)
        self.size = image.size[::-1] if self.orientation >= 5 else image.size

    def __del__(self) -> None:
        if self.opened is not None:
            self.opened.fp.close()

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        """As `Picture.crop`, decoding no finer than `size` needs."""
        box, kept = _inside(box, self.size), known_interpolation(interpolation).pixels_kept
        if math.isinf(kept):
            # Turned before it is resized: of two pixels equally near, Pillow takes the right or lower one.
            return self.decoded().crop(box, size, interpolation)
        left, top, right, bottom = stored_box(box, self.size, self.orientation)
        height, width = size[::-1] if self.orientation >= 5 else size
        image, scale = self._load(max(width / (right - left), height / (bottom - top)) * kept)
        # An odd last row or column makes the coarse image larger than its scale says, never smaller.
        box = (left / scale, top / scale, right / scale, bottom / scale)
        view = _resized(image, box, (height, width), interpolation)
        return _tensor(upright(view, self.orientation), self.channels)

    def decoded(self) -> Picture:
        return Picture(turned(self._load(1)[0], self.orientation), self.channels)

    def _load(self, share: float) -> tuple[Image.Image, float]:
        """The stored picture with at least `share` of its pixels a side, and how many times smaller it is."""
        with decoding():
            image, self.opened = self.opened or _open_pillow(_stream(self.record)), None
            with image.fp:
                width = image.size[0]
                wanted = tuple(max(1, math.ceil(side * share)) for side in image.size)
                coarse = image.draft("L" if self.channels == 1 else None, wanted)
                image.load()
            return on_white(image), width / coarse[1][2] if coarse else 1.0


class ArrayPicture(Picture):
    """An array with any number of channels, in memory or on disk; values other than uint8 and bool are scaled by the
    array's range when they are cropped.

    Args:
        values: (channels, height, width) of bool or any real numbers.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.channels, self.size = values.shape[0], values.shape[:0:-1]

    @functools.cached_property
    def range(self) -> tuple[float, float]:
        """Of all channels together, so that their ratios stay."""
        lows, highs = zip(*map(value_range, self.values))
        return min(lows), max(highs)

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        """As `Picture.crop`, channel by channel."""
        box, how = _inside(box, self.size), known_interpolation(interpolation)
        # The filter reaches over the edges of the box.
        over_x, over_y = (how.reach * ((box[2 + axis] - box[axis]) / size[1 - axis] + 2) for axis in (0, 1))
        left, top = max(0, math.floor(box[0] - over_x)), max(0, math.floor(box[1] - over_y))
        region = np.s_[top : math.ceil(box[3] + over_y), left : math.ceil(box[2] + over_x)]
        box = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        parts = []
        for channel in self.values:
            view = Image.fromarray(np.ascontiguousarray(self._shown(channel[region])))
            parts.append(np.asarray(view.resize(size[::-1], how.code, box=box)))
        # Beside an edge the sharper filters exceed the values' range.
        return torch.from_numpy(np.stack(parts).round().clip(0, 255).astype(np.uint8))

    def decoded(self) -> Picture:
        return ArrayPicture(np.stack([self._shown(channel).round().astype(np.uint8) for channel in self.values]))

    def _shown(self, part: np.ndarray) -> np.ndarray:
        """Of a part of a channel, uint8 or float32 in [0, 255]."""
        if part.dtype == np.uint8:
            return part
        return part * np.uint8(255) if part.dtype == bool else scaled(part, *self.range)


def open_picture(record: dict, channels: int | None, max_pixels: int = MAX_PIXELS) -> Picture:
    """Open one row's image, `{"bytes": …, "path": …}`, to be seen in so many channels.

    With 1 or 3 channels gray and color stand in for one another and transparency is laid over white; other counts are
    the file's own. Values deeper than 8 bits are scaled by the image's own range.

    Args:
        channels: None takes the file's: 1 for gray, 3 for color, its count for arrays and other bands.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        One of `UNREADABLE` when the file is broken, missing, too large, no image, or of another channel count. A file
        that is cut short may show only when it is cropped.
    """
    with decoding():
        stream = _stream(record)
        try:
            image = _open_pillow(stream)
        except UnidentifiedImageError:
            with stream:
                return _open_array(stream, record, channels, max_pixels)
        except BaseException:
            stream.close()
            raise
        if image.format in ("JPEG", "MPO") and channels in (None, 1, 3):
            picture = JpegPicture(record, image, channels)  # closes the stream
            _check_size(*image.size, max_pixels)
            return picture
        with stream:
            _check_size(*image.size, max_pixels)
            bands = stated_channels(image)
            if bands not in (1, 3) and channels in (None, bands):
                return _pictured(_read_tiff(stream, channels, max_pixels), channels)
            if bands not in (1, 3) and (bands, channels) != (4, 3):
                raise ValueError(f"has {bands} channels, expected {channels}")
            image.load()
            # After loading: only then is a PNG's orientation known, and a TIFF's dealt with by Pillow itself.
            image = turned(image, orientation(image))
            if channels in (None, 1, 3):
                return Picture(image, channels)
            # Four or two channels may also be those of an image with alpha, or inks.
            if len(image.getbands()) != channels:
                raise ValueError(f"has {len(image.getbands())} channels, expected {channels}")
            return ArrayPicture(np.array(image).transpose(2, 0, 1))


def read_image(record: dict, channels: int) -> Image.Image:
    """Decode one row's image in full, upright, in mode L (`channels` 1) or RGB (3).

    Raises:
        One of `UNREADABLE`, as `open_picture` does.
    """
    return open_picture(record, channels).decoded().image.convert("L" if channels == 1 else "RGB")


def describe_error(error: Exception) -> str:
    """Why an image was not read, in one line that names no object in memory."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"<?\S+ object at 0x[0-9a-fA-F]+>?", "the data", " ".join(text.split()))
    return text or type(error).__name__


# --- values ----------------------------------------------------------------------------------------------------------


def on_white(image: Image.Image) -> Image.Image:
    """A loaded image of any mode in mode L, where it is gray, or RGB: transparency over white, values deeper than 8
    bits scaled by their range."""
    if image.mode[0] in "IF":
        return _scaled_image(image)
    gray = image.mode in ("1", "L", "LA", "La") or (image.mode == "P" and _gray_palette(image))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        # Out of La Pillow knows only the way to LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == ("L" if gray else "RGB") else image.convert("RGB").convert("L" if gray else "RGB")


def _gray_palette(image: Image.Image) -> bool:
    """Whether all colors are gray that the image uses; scans often come so."""
    used = np.flatnonzero(image.histogram())
    colors = np.reshape(image.getpalette("RGB"), (-1, 3))
    colors = colors[used[used < len(colors)]]
    return bool((colors == colors[:, :1]).all())


def _scaled_image(image: Image.Image) -> Image.Image:
    """Mode L of a loaded image of 16-bit, 32-bit or float values; a transparent value becomes white."""
    values = np.asarray(image)
    opaque = values != image.info["transparency"] if "transparency" in image.info else None
    low, high = value_range(values if opaque is None else values[opaque])
    pixels = np.empty(values.shape, dtype=np.uint8)
    for first in range(0, len(values), 256):  # 64-bit numbers of all pixels at once would take eight times its memory
        pixels[first : first + 256] = scaled(values[first : first + 256], low, high).round()
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # white is 0, which Pillow minds up to 8 bits only
        pixels = 255 - pixels
    return Image.fromarray(pixels if opaque is None else np.where(opaque, pixels, np.uint8(255)))


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite value; zeros where there is none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`values` from [low, high] to [0, 255], float32; NaN becomes 0, infinities the ends."""
    if values.dtype == np.uint16 and values.size > 2**16:
        return scaled(np.arange(2**16), low, high)[values]
    # Halves, because the span from the smallest to the largest float is no float.
    span = max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    with np.errstate(invalid="ignore", over="ignore"):
        shares = np.clip((values.astype(np.float64) / 2 - low / 2) / span, 0, 1)
    return (np.nan_to_num(shares, nan=0.0) * 255).astype(np.float32)


# --- geometry --------------------------------------------------------------------------------------------------------


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or EXIF is broken, which is no reason to lose the image."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in TURNS else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A stored picture, upright."""
    return image.transpose(TURNS[orientation][0]) if orientation in TURNS else image


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (channels, height, width), upright; a view."""
    _, mirrored, upended = TURNS.get(orientation, (None, False, False))
    pixels = pixels.swapaxes(1, 2) if orientation >= 5 else pixels
    return pixels[:, :: -1 if upended else 1, :: -1 if mirrored else 1]


def stored_box(box: Box, size: Size, orientation: int) -> Box:
    """Where a box in the upright picture of `size` (width, height) lies in the stored one."""
    left, top, right, bottom = box
    _, mirrored, upended = TURNS.get(orientation, (None, False, False))
    if mirrored:
        left, right = size[0] - right, size[0] - left
    if upended:
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def _inside(box: Box, size: Size) -> Box:
    """`box` without what rounding has put outside the picture, which Pillow would refuse."""
    left, top, right, bottom = box
    if not (-1 < left < right < size[0] + 1 and -1 < top < bottom < size[1] + 1):
        raise ValueError(f"no box of a picture of {size[0]}x{size[1]} pixels: {box}")
    return max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])


def known_interpolation(name: str) -> Interpolation:
    """A row of `INTERPOLATIONS`.

    Raises:
        ValueError: for another name, listing those.
    """
    if name not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {name!r}: give one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def _resized(image: Image.Image, box: Box, size: Size, interpolation: str) -> np.ndarray:
    """The part of an image, mode L or RGB, inside `box`, resized to `size` (height, width): (bands, height, width).

    All ways are the same filter, within 1 level (bicubic's but for 1 pixel in 1,000, beside edges, where it matters which
    axis goes first); Pillow's looks over the edges of a fractional box. Of a box of whole pixels torch is two to three
    times as fast, 0.3 ms for 0.9 of a photo of 500x375 pixels; of a thumbnail Pillow is, 20 µs for 110 of a digit.
    """
    how, shortcut = known_interpolation(interpolation), interpolation == "bilinear"
    across, down = box[2] - box[0], box[3] - box[1]
    whole = all(float(edge).is_integer() for edge in box)
    if whole:
        image, box = image.crop(tuple(map(int, box))), (0, 0, across, down)
    far = shortcut and max(across / size[1], down / size[0]) >= SHORTCUT_FROM
    if whole and how.by_torch and across * down > THUMBNAIL_PIXELS and not far:
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return torch.nn.functional.interpolate(pixels[None], size, mode=interpolation, antialias=True)[0].numpy()
    view = image.resize(size[::-1], how.code, box=box, reducing_gap=REDUCING_GAP if shortcut else None)
    pixels = np.array(view)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _tensor(pixels: np.ndarray, channels: int) -> Tensor:
    """(bands, height, width) as a tensor of its own, gray repeated for color."""
    return torch.from_numpy(np.array(np.broadcast_to(pixels, (channels, *pixels.shape[1:])), order="C"))


# --- files -----------------------------------------------------------------------------------------------------------


def _stream(record: dict) -> BinaryIO:
    """The file's bytes, opened; neither empty nor anything but a file (reading from a pipe would wait for ever)."""
    data, path = record["bytes"], record["path"]
    if data is None:
        if path is None:
            raise ValueError("neither bytes nor a path")
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("a folder, not a file" if stat.S_ISDIR(found.st_mode) else "not a regular file")
        if found.st_size:
            return open(path, "rb")
    elif data:
        return io.BytesIO(data)
    raise ValueError("empty file")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # Pillow fails at names that it was built without
    _silence("PIL")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _silence(name: str) -> None:
    """Keep Python from printing a library's reports of what is wrong with a file, where nobody handles them."""
    if not logging.getLogger(name).handlers:
        logging.getLogger(name).addHandler(logging.NullHandler())


def _open_pillow(stream: BinaryIO) -> Image.Image:
    return Image.open(stream, formats=_formats())


def _open_array(stream: BinaryIO, record: dict, channels: int | None, max_pixels: int) -> Picture:
    """What Pillow does not know: an array, a TIFF file of uncommon values, or no image."""
    stream.seek(0)
    head = stream.read(16)
    if head.startswith(NUMPY_MAGIC):
        return _pictured(_read_npy(stream, record, channels, max_pixels), channels)
    if head.startswith(TIFF_MAGICS):
        return _pictured(_read_tiff(stream, channels, max_pixels), channels)
    if head[4:12] in HEIC_BRANDS:
        raise ValueError("HEIC image: convert it to JPEG or PNG")
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            raise ValueError(f"{name} file with a broken header")
    raise ValueError("not an image")


def _read_npy(stream: BinaryIO, record: dict, channels: int | None, max_pixels: int) -> np.ndarray:
    """The array in a `.npy` file as (channels, height, width), on disk where it lies in a file of its own."""
    stream.seek(0)
    on_disk = record["bytes"] is None
    values = np.load(record["path"] if on_disk else stream, mmap_mode="r" if on_disk else None, allow_pickle=False)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"holds {values.dtype} values, not real numbers")
    if values.ndim not in (2, 3):
        raise ValueError(f"an array of {values.ndim} dimensions, expected 2 or 3")
    if values.ndim == 2:
        values = values[None]
    elif values.shape[2] <= values.shape[0]:
        values = values.transpose(2, 0, 1)
    _check_size(values.shape[2], values.shape[1], max_pixels)
    _check_channels(len(values), channels)
    return values


def _read_tiff(stream: BinaryIO, channels: int | None, max_pixels: int) -> np.ndarray:
    """The first page of a TIFF file: (channels, height, width), its samples together or plane after plane."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("needs tifffile: pip install tifffile") from None
    _silence("tifffile")
    stream.seek(0)
    with tifffile.TiffFile(stream) as tiff:
        page = tiff.pages.first
        _check_size(page.imagewidth, page.imagelength, max_pixels)
        _check_channels(page.samplesperpixel, channels)
        if page.axes not in ("YX", "YXS", "SYX"):
            raise ValueError(f"a TIFF page with axes {page.axes}, expected a picture")
        values = page.asarray()
        values = {"YX": values[None], "YXS": np.moveaxis(values, -1, 0), "SYX": values}[page.axes]
        if page.photometric == 0:  # white is 0
            values = -values if values.dtype.kind == "f" else ~values
        tag = page.tags.get(ORIENTATION)
    return upright(values, tag.value if tag and tag.value in TURNS else 1)


def _pictured(values: np.ndarray, channels: int | None) -> Picture:
    """An array (channels, height, width) as a picture: by Pillow, where it is gray or color."""
    if len(values) not in (1, 3) or channels not in (None, 1, 3):
        return ArrayPicture(values)
    pixels = ArrayPicture(values).decoded().values.transpose(1, 2, 0)
    return Picture(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if len(values) == 1 else pixels)), channels)


def stated_channels(image: Image.Image) -> int:
    """What a file opened by Pillow holds: 1 gray, 3 color, whatever stands for it and with alpha or without; any other
    count for a TIFF file with bands besides, which Pillow would drop."""
    if image.format == "TIFF":
        samples, extras = image.tag_v2.get(SAMPLES_PER_PIXEL, 1), image.tag_v2.get(EXTRA_SAMPLES, ())
        beyond = samples - COLOR_SAMPLES.get(image.tag_v2.get(PHOTOMETRIC), samples)
        if beyond > 1 or (beyond == 1 and extras == (0,)):
            return samples
    return 1 if image.mode[0] in "IF" or image.mode in ("1", "L", "LA", "La") else 3


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels")
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} = {width * height} pixels, more than the limit of {max_pixels}")


def _check_channels(found: int, channels: int | None) -> None:
    if channels not in (None, found) and not (found in (1, 3) and channels in (1, 3)):
        raise ValueError(f"has {found} channels, expected {channels}")


_LOCK = threading.Lock()
_entered = 0
_outside: list = []


@contextmanager
def decoding() -> Iterator[None]:
    """Around all that Pillow and others do with a file: whatever they raise becomes one of `UNREADABLE`, Pillow's own
    limit of pixels is off and its warnings are silent.

    Both are global in Pillow and Python: the first thread that enters changes them, the last that leaves restores them.
    """
    global _entered
    with _LOCK:
        if not _entered:
            silence = warnings.catch_warnings()
            silence.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _outside[:] = [silence, Image.MAX_IMAGE_PIXELS]
            Image.MAX_IMAGE_PIXELS = None
        _entered += 1
    try:
        yield
    except UNREADABLE:
        raise
    except MemoryError as error:
        raise ValueError("not enough memory to decode it") from error
    except Exception as error:
        raise ValueError(f"broken file ({type(error).__name__}: {describe_error(error)})") from error
    finally:
        with _LOCK:
            _entered -= 1
            if not _entered:
                silence, Image.MAX_IMAGE_PIXELS = _outside
                silence.__exit__(None, None, None)
