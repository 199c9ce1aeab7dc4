"""From a record to a picture: which decoder opens it, and what is refused."""

from __future__ import annotations

from importlib.util import find_spec
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from simmim.data.deep import DeepPicture, StoredValues
from simmim.data.orientation import ORIENTATION, ORIENTATIONS, Size, read_orientation, turn_array_upright, turn_upright
from simmim.data.pictures import ArrayPicture, JpegPicture, Picture
from simmim.data.pillow_guard import decoding, open_pillow, silence_logger
from simmim.data.pixel_values import PHOTOMETRIC, to_gray_or_rgb, type_range
from simmim.data.records import Record, open_record
from simmim.reading import Reading

MAX_PIXELS = 200_000_000
STRETCHED = Reading()  # values deeper than 8 bits by each image's own range

NUMPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two are BigTIFF's
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"RIFF": "WebP"}
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")

BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 258, 277, 338  # TIFF's tags
COLOR_SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # by PHOTOMETRIC, without alpha or other extra samples


def open_picture(
    record: Record, channels: int | None, max_pixels: int = MAX_PIXELS, reading: Reading = STRETCHED
) -> Picture:
    """Open one record's image.

    With 1 or 3 channels gray and color stand in for one another and transparency is laid over white; any other count must
    be the file's own.

    Args:
        channels: of the picture's crops. None takes the file's: 1 for gray, 3 for color, its count for arrays and other
            bands.
        max_pixels: larger images are refused before they are decoded.
        reading: how values become pictures; by default those deeper than 8 bits are stretched by the image's own range.

    Raises:
        One of `UNREADABLE` if the file is broken, missing, too large, no image, or of another channel count. A file that is
        cut short may be noticed only when it is cropped.
    """
    with decoding():
        stream = open_record(record)
        try:
            image = open_pillow(stream)
        except UnidentifiedImageError:
            with stream:
                return _stored_to_picture(_read_array(stream, record, channels, max_pixels), channels, reading)
        except BaseException:
            stream.close()
            raise
        if image.format in ("JPEG", "MPO") and channels in (None, 1, 3) and not reading.is_deep:
            picture = JpegPicture(record, image, channels)  # closes the stream
            _check_size((image.height, image.width), max_pixels)
            return picture
        with stream:
            _check_size((image.height, image.width), max_pixels)
            if reading.is_deep or (reading.range == "type" and image.mode[0] in "IF"):
                return _stored_to_picture(_read_values(stream, image, channels, max_pixels), channels, reading)
            return _open_loaded(stream, image, channels, max_pixels, reading)


def open_stored(
    record: Record, channels: int | None, max_pixels: int = MAX_PIXELS, levels: bool = False
) -> StoredValues | None:
    """The values of one record's image as its file stores them; None if they have 8 bits.

    Args:
        levels: return 8-bit values too.

    Raises:
        One of `UNREADABLE`, as `open_picture` does.
    """
    with decoding(), open_record(record) as stream:
        try:
            image = open_pillow(stream)
        except UnidentifiedImageError:
            stored = _read_array(stream, record, channels, max_pixels)
            return stored if levels or stored.is_deep else None
        _check_size((image.height, image.width), max_pixels)
        return _read_values(stream, image, channels, max_pixels) if levels or _is_deep(image) else None


def _is_deep(image: Image.Image) -> bool:
    """Whether a file opened by Pillow stores more than 8 bits, as far as it can be read so."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8  # type: ignore[attr-defined]
    return image.mode[0] in "IF" or (_is_deep_png(image) and find_spec("imagecodecs") is not None)


def _is_deep_png(image: Image.Image) -> bool:
    """Whether it is a 16-bit PNG file in color, or gray with transparency, of which Pillow reads the upper 8 bits."""
    return image.format == "PNG" and image.mode[0] != "I" and ";16B" in str(getattr(image, "tile", ""))


def read_image(record: Record, channels: int) -> Image.Image:
    """Decode one record's image in full, upright, in mode L (`channels` 1) or RGB (3).

    Raises:
        One of `UNREADABLE`, as `open_picture` does.
    """
    return open_picture(record, channels).decoded().image.convert("L" if channels == 1 else "RGB")


def file_channels(image: Image.Image) -> int:
    """Channels of a file opened by Pillow: 1 for gray, 3 for color in any encoding, with alpha or without; the count of
    samples for a TIFF file with further bands, which Pillow would drop."""
    if image.format == "TIFF":
        samples, extras = image.tag_v2.get(SAMPLES_PER_PIXEL, 1), image.tag_v2.get(EXTRA_SAMPLES, ())  # type: ignore[attr-defined]
        further = samples - COLOR_SAMPLES.get(image.tag_v2.get(PHOTOMETRIC), samples)  # type: ignore[attr-defined]
        if further > 1 or (further == 1 and extras == (0,)):
            return samples
    return 1 if image.mode[0] in "IF" or image.mode in ("1", "L", "LA", "La") else 3


def _open_loaded(stream: BinaryIO, image: Image.Image, channels: int | None, max_pixels: int, reading: Reading) -> Picture:
    """A file that Pillow opens, other than JPEG: decoded by Pillow, or by tifffile if it has further bands."""
    bands = file_channels(image)
    if bands not in (1, 3) and channels in (None, bands):
        return _stored_to_picture(StoredValues(_read_tiff(stream, channels, max_pixels)), channels, reading)
    if bands not in (1, 3) and (bands, channels) != (4, 3):
        raise ValueError(f"has {bands} channels, expected {channels}")
    image.load()
    # After loading: a PNG's orientation is known only then, and Pillow has turned a TIFF itself.
    image = turn_upright(image, read_orientation(image))
    if channels in (None, 1, 3):
        return Picture(image, channels)
    # Two or four channels may also be those of an image with alpha, or inks.
    if len(image.getbands()) != channels:
        raise ValueError(f"has {len(image.getbands())} channels, expected {channels}")
    return ArrayPicture(np.array(image).transpose(2, 0, 1))


def _read_values(stream: BinaryIO, image: Image.Image, channels: int | None, max_pixels: int) -> StoredValues:
    """The values of a file that Pillow opens, by another library where Pillow would drop bits or bands."""
    if image.format == "TIFF" and (_is_deep(image) or file_channels(image) not in (1, 3)):
        return StoredValues(_read_tiff(stream, channels, max_pixels))
    if _is_deep_png(image):
        return StoredValues(_read_deep_png(stream, channels))
    image.load()
    image = turn_upright(image, read_orientation(image))
    if image.mode[0] in "IF":
        nodata = image.info.get("transparency")
        return StoredValues(np.asarray(image)[None], nodata if isinstance(nodata, int | float) else None)
    levels = np.asarray(to_gray_or_rgb(image))
    return StoredValues(levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1))


def _read_deep_png(stream: BinaryIO, channels: int | None) -> np.ndarray:
    """A 16-bit PNG file: (channels, height, width) uint16, laid over white where it is transparent."""
    try:
        import imagecodecs
    except ImportError:
        raise ValueError("16-bit color PNG needs imagecodecs: pip install 'simmim-toolkit[tiff]'") from None
    stream.seek(0)
    values = np.moveaxis(imagecodecs.png_decode(stream.read()), -1, 0)
    if len(values) in (2, 4):
        opacity = values[-1:] / np.float64(2**16 - 1)
        values = (values[:-1] * opacity + (2**16 - 1) * (1 - opacity)).round().astype(np.uint16)
    _check_channels(len(values), channels)
    return values


def _read_array(stream: BinaryIO, record: Record, channels: int | None, max_pixels: int) -> StoredValues:
    """A file that Pillow does not open: an array, a TIFF file of uncommon values, or no image."""
    stream.seek(0)
    head = stream.read(16)
    if head.startswith(NUMPY_MAGIC):
        return StoredValues(_read_npy(stream, record, channels, max_pixels))
    if head.startswith(TIFF_MAGICS):
        return StoredValues(_read_tiff(stream, channels, max_pixels))
    if head[4:12] in HEIC_BRANDS:
        raise ValueError("HEIC image: convert it to JPEG or PNG")
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            raise ValueError(f"{name} file with a broken header")
    raise ValueError("not an image")


def _read_npy(stream: BinaryIO, record: Record, channels: int | None, max_pixels: int) -> np.ndarray:
    """The array of a `.npy` file as (channels, height, width), memory-mapped if it is a file on disk."""
    stream.seek(0)
    on_disk = record["bytes"] is None
    values = np.load(record["path"] if on_disk else stream, mmap_mode="r" if on_disk else None, allow_pickle=False)  # type: ignore[arg-type]
    if values.dtype.kind not in "biuf":
        raise ValueError(f"holds {values.dtype} values, not real numbers")
    if values.ndim not in (2, 3):
        raise ValueError(f"an array of {values.ndim} dimensions, expected 2 or 3")
    if values.ndim == 2:
        values = values[None]
    elif values.shape[2] <= values.shape[0]:
        values = values.transpose(2, 0, 1)
    _check_size(values.shape[1:], max_pixels)
    _check_channels(len(values), channels)
    return values


def _read_tiff(stream: BinaryIO, channels: int | None, max_pixels: int) -> np.ndarray:
    """The first page of a TIFF file, samples interleaved or in planes: (channels, height, width)."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("needs tifffile: pip install tifffile") from None
    silence_logger("tifffile")
    stream.seek(0)
    with tifffile.TiffFile(stream) as tiff:
        page = tiff.pages.first
        _check_size((page.imagelength, page.imagewidth), max_pixels)
        _check_channels(page.samplesperpixel, channels)
        if page.axes not in ("YX", "YXS", "SYX"):
            raise ValueError(f"a TIFF page with axes {page.axes}, expected a picture")
        values = page.asarray()
        values = {"YX": values[None], "YXS": np.moveaxis(values, -1, 0), "SYX": values}[page.axes]
        if page.photometric == 0:  # white is 0
            values = -values if values.dtype.kind == "f" else ~values
        tag = page.tags.get(ORIENTATION)
    return turn_array_upright(values, tag.value if tag and tag.value in ORIENTATIONS else 1)


def _stored_to_picture(stored: StoredValues, channels: int | None, reading: Reading) -> Picture:
    """Stored values as a picture: as shares if the collection is deep; through Pillow if 8-bit levels are gray or color."""
    if reading.is_deep:
        return DeepPicture(stored, channels, reading)
    values = stored.values
    ends = type_range(values.dtype) if reading.range == "type" else None
    if len(values) not in (1, 3) or channels not in (None, 1, 3):
        return ArrayPicture(values, ends)
    pixels = ArrayPicture(values, ends).decoded().values.transpose(1, 2, 0)
    return Picture(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if len(values) == 1 else pixels)), channels)


def _check_size(size: Size, max_pixels: int) -> None:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels (height x width)")
    if height * width > max_pixels:
        raise ValueError(f"{height}x{width} = {height * width} pixels (height x width), more than the limit of {max_pixels}")


def _check_channels(stored: int, channels: int | None) -> None:
    if channels not in (None, stored) and not (stored in (1, 3) and channels in (1, 3)):
        raise ValueError(f"has {stored} channels, expected {channels}")
