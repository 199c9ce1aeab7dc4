"""From a record to a picture: which decoder opens it, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from simmim.data.addresses import Address, Tile, parse_address, without_tile
from simmim.data.deep import DeepPicture, StoredValues
from simmim.data.file_checks import BY_TILES, check_size
from simmim.data.file_formats import TiffFormat
from simmim.data.known_formats import detect_format, detect_path
from simmim.data.open_windows import OpenWindows
from simmim.data.orientation import read_orientation, turn_upright
from simmim.data.pictures import ArrayPicture, JpegPicture, Picture
from simmim.data.pillow_guard import decoding, open_pillow
from simmim.data.pixel_values import PHOTOMETRIC, to_gray_or_rgb, type_range
from simmim.data.records import Record, open_record
from simmim.data.tiff import over_white
from simmim.data.windows import ChannelImage, DecodedImage, WindowedImage
from simmim.messages import counted
from simmim.reading import Reading

MAX_PIXELS = 200_000_000
STRETCHED = Reading()  # as version 0.1: values deeper than 8 bits by each image's own range, the first page

SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"RIFF": "WebP"}

IMAGE_DESCRIPTION, BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 270, 258, 277, 338  # TIFF's tags
_OPEN = OpenWindows()

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
        reading: how files become pictures; by default values deeper than 8 bits are stretched by the image's own range, and
            of several pages the first is read.

    Raises:
        One of `UNREADABLE` if the file is broken, missing, too large, no image, or of another channel count. A file that is
        cut short may be noticed only when it is cropped.
    """
    with decoding():
        address = parse_address(record["path"] or "")
        if address.tile:
            return _stored_to_picture(_read_tile(record, address.tile, max_pixels, reading), channels, reading)
        if len(address.files) > 1:
            return _stored_to_picture(_read_channel_files(address, max_pixels), channels, reading)
        if found := detect_path(record):
            kind, path = found
            return _stored_to_picture(kind.read(path, reading, address.page, max_pixels), channels, reading)
        stream = open_record(record)
        try:
            image = open_pillow(stream)
        except UnidentifiedImageError:
            with stream:
                stored = _read_by_format(stream, record, reading, address.page, max_pixels)
                return _stored_to_picture(stored, channels, reading)
        except BaseException:
            stream.close()
            raise
        by_values = reading.is_deep or reading.channels_used is not None
        if image.format in ("JPEG", "MPO") and channels in (None, 1, 3) and not by_values:
            picture = JpegPicture(record, image, channels)  # closes the stream
            check_size((image.height, image.width), max_pixels)
            return picture
        with stream:
            check_size((image.height, image.width), max_pixels, BY_TILES if image.format == "TIFF" else "")
            if by_values or (reading.range == "type" and image.mode[0] in "IF") or _holds_pages(image, reading):
                stored = _read_values(stream, record, image, reading, address.page, max_pixels)
                return _stored_to_picture(stored, channels, reading)
            return _open_loaded(stream, record, image, channels, max_pixels, reading)


def open_stored(
    record: Record, max_pixels: int = MAX_PIXELS, levels: bool = False, reading: Reading = STRETCHED
) -> StoredValues | None:
    """The values of one record's image as its files store them, of the channels that are used; None if they have 8 bits.

    Args:
        levels: return 8-bit values too.

    Raises:
        One of `UNREADABLE`, as `open_picture` does.
    """
    with decoding():
        address = parse_address(record["path"] or "")
        if address.tile:
            stored = _read_tile(record, address.tile, max_pixels, reading)
            return stored.select(reading) if levels or stored.is_deep else None
        if len(address.files) > 1:
            stored = _read_channel_files(address, max_pixels)
            return stored.select(reading) if levels or stored.is_deep else None
        if found := detect_path(record):
            kind, path = found
            stored = kind.read(path, reading, address.page, max_pixels)
            return stored.select(reading) if levels or stored.is_deep else None
        with open_record(record) as stream:
            try:
                image = open_pillow(stream)
            except UnidentifiedImageError:
                stored = _read_by_format(stream, record, reading, address.page, max_pixels)
                return stored.select(reading) if levels or stored.is_deep else None
            check_size((image.height, image.width), max_pixels)
            if not levels and not _is_deep(image):
                return None
            return _read_values(stream, record, image, reading, address.page, max_pixels).select(reading)


def count_images(record: Record, reading: Reading) -> int:
    """How many images a record's file holds.

    Raises:
        One of `UNREADABLE`, also for pages that nothing explains.
    """
    with decoding():
        if found := detect_path(record):
            kind, path = found
            return kind.count(path, reading)
        with open_record(record) as stream:
            of_file = detect_format(stream)
            return of_file.count(stream, reading) if of_file else 1


def open_windows(record: Record, max_pixels: int = MAX_PIXELS, reading: Reading = STRETCHED) -> WindowedImage:
    """Open an image of which parts are read. To be closed.

    Args:
        max_pixels: that may be decoded at once. A TIFF file in tiles and a mapped file may have any size; formats of which
            no part can be decoded alone may not.

    Raises:
        One of `UNREADABLE`, as `open_picture` does.
    """
    with decoding():
        address = parse_address(record["path"] or "")
        if len(address.files) > 1:
            files: list[Record] = [{"bytes": None, "path": file} for file in address.files]
            return ChannelImage([open_windows(file, max_pixels, STRETCHED) for file in files], address.names)
        if found := detect_path(record):
            kind, path = found
            return kind.open_windows(path, reading, address.page, max_pixels)
        stream = open_record(record)
        of_file = detect_format(stream)
        if of_file:
            try:
                return of_file.open_windows(stream, record, reading, address.page, max_pixels)
            except ValueError as error:
                if "imagecodecs" not in str(error):  # Pillow has codecs of its own
                    raise
        stream.close()
        whole: Record = {"bytes": record["bytes"], "path": without_tile(record["path"] or "") or None}
        stored = open_stored(whole, max_pixels, levels=True, reading=replace(reading, channels_used=None))
        assert stored is not None, "levels are asked for"
        return DecodedImage(stored)


def read_image(record: Record, channels: int) -> Image.Image:
    """Decode one record's image in full, upright, in mode L (`channels` 1) or RGB (3).

    Raises:
        One of `UNREADABLE`, as `open_picture` does.
    """
    return open_picture(record, channels).decoded().image.convert("L" if channels == 1 else "RGB")


# --- what Pillow opens ---------------------------------------------------------------------------------------------------


def file_channels(image: Image.Image) -> int:
    """Channels of a file opened by Pillow: 1 for gray, 3 for color in any encoding, with alpha or without; the count of
    samples for a TIFF file with further bands, which Pillow would drop."""
    if image.format == "TIFF":
        samples, extras = image.tag_v2.get(SAMPLES_PER_PIXEL, 1), image.tag_v2.get(EXTRA_SAMPLES, ())  # type: ignore[attr-defined]
        further = samples - COLOR_SAMPLES.get(image.tag_v2.get(PHOTOMETRIC), samples)  # type: ignore[attr-defined]
        if further > 1 or (further == 1 and extras == (0,)):
            return samples
    return 1 if image.mode[0] in "IF" or image.mode in ("1", "L", "LA", "La") else 3


def _is_deep(image: Image.Image) -> bool:
    """Whether a file opened by Pillow stores more than 8 bits, as far as it can be read so."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8  # type: ignore[attr-defined]
    return image.mode[0] in "IF" or (_is_deep_png(image) and find_spec("imagecodecs") is not None)


def _is_deep_png(image: Image.Image) -> bool:
    """Whether it is a 16-bit PNG file in color, or gray with transparency, of which Pillow reads the upper 8 bits."""
    return image.format == "PNG" and image.mode[0] != "I" and ";16B" in str(getattr(image, "tile", ""))


def _holds_pages(image: Image.Image, reading: Reading) -> bool:
    """Whether a file opened by Pillow is a TIFF file that may hold several pages, and these are asked for."""
    if image.format != "TIFF" or reading.pages == "first":
        return False
    description = str(image.tag_v2.get(IMAGE_DESCRIPTION, ""))  # type: ignore[attr-defined]
    # ImageJ and tifffile may describe a stack by one page.
    return getattr(image, "is_animated", False) or "images=" in description or '"shape":' in description


def _open_loaded(
    stream: BinaryIO, record: Record, image: Image.Image, channels: int | None, max_pixels: int, reading: Reading
) -> Picture:
    """A file that Pillow opens, other than JPEG: decoded by Pillow, or by tifffile if it has further bands."""
    bands = file_channels(image)
    if bands not in (1, 3) and channels in (None, bands):
        return _stored_to_picture(_read_by_format(stream, record, reading, None, max_pixels), channels, reading)
    if bands not in (1, 3) and (bands, channels) != (4, 3):
        raise ValueError(f"has {counted(bands, 'channel')}, expected {channels}")
    image.load()
    # After loading: a PNG's orientation is known only then, and Pillow has turned a TIFF itself.
    image = turn_upright(image, read_orientation(image))
    if channels in (None, 1, 3):
        return Picture(image, channels)
    # Two or four channels may also be those of an image with alpha, or inks.
    if len(image.getbands()) != channels:
        raise ValueError(f"has {counted(len(image.getbands()), 'channel')}, expected {channels}")
    return ArrayPicture(np.array(image).transpose(2, 0, 1))


def _read_values(
    stream: BinaryIO, record: Record, image: Image.Image, reading: Reading, page: int | None, max_pixels: int
) -> StoredValues:
    """The values of a file that Pillow opens, by another library where Pillow would drop bits, bands or pages."""
    several = _holds_pages(image, reading)
    if image.format == "TIFF" and (_is_deep(image) or file_channels(image) not in (1, 3) or several):
        try:
            return TiffFormat().read(stream, record, reading, page, max_pixels)
        except ValueError as error:
            # Pillow has codecs of its own.
            if "imagecodecs" not in str(error) or several or (_is_deep(image) and image.mode[0] not in "IF"):
                raise
    if _is_deep_png(image):
        return StoredValues(_read_deep_png(stream))
    image.load()
    image = turn_upright(image, read_orientation(image))
    if image.mode[0] in "IF":
        nodata = image.info.get("transparency")
        return StoredValues(np.asarray(image)[None], nodata if isinstance(nodata, int | float) else None)
    levels = np.asarray(to_gray_or_rgb(image))
    return StoredValues(levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1))


def _read_deep_png(stream: BinaryIO) -> np.ndarray:
    """A 16-bit PNG file: (channels, height, width) uint16, laid over white where it is transparent."""
    try:
        import imagecodecs
    except ImportError:
        raise ValueError("16-bit color PNG needs imagecodecs: pip install 'simmim-toolkit[tiff]'") from None
    stream.seek(0)
    values = np.moveaxis(imagecodecs.png_decode(stream.read()), -1, 0)
    return over_white(values) if len(values) in (2, 4) else values


# --- what other libraries read -------------------------------------------------------------------------------------------


def _read_by_format(stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
    """A file of one of `FILE_FORMATS`, or no image."""
    kind = detect_format(stream)
    if kind:
        return kind.read(stream, record, reading, page, max_pixels)
    head = stream.read(16)
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            raise ValueError(f"{name} file with a broken header")
    raise ValueError("not an image")


def _read_tile(record: Record, tile: Tile, max_pixels: int, reading: Reading) -> StoredValues:
    """The values of a part of an image."""
    level, left, top, width, height = tile
    whole = replace(reading, channels_used=None, channel_names=())  # channels are selected from what is read
    with _OPEN.borrow(record, max_pixels, whole, open_windows) as image:
        if level >= len(image.levels):
            raise ValueError(f"holds {counted(len(image.levels), 'level')}, and has no level {level}")
        rows, columns = image.levels[level]
        if top + height > rows or left + width > columns:
            raise ValueError(f"has changed: level {level} is {rows}x{columns} pixels now (height x width)")
        stored = image.read(level, (left, top, left + width, top + height))
        return replace(stored, values=np.array(stored.values))


def _read_channel_files(address: Address, max_pixels: int) -> StoredValues:
    """Files that are the channels of one image.

    Raises:
        One of `UNREADABLE`, also when their sizes differ, or one of them has several channels.
    """
    planes = []
    for file in address.files:
        stored = open_stored({"bytes": None, "path": file}, max_pixels, levels=True, reading=STRETCHED)
        assert stored is not None, "levels are asked for"
        if len(stored.values) != 1:
            raise ValueError(f"{file}: has {counted(len(stored.values), 'channel')}, expected the one of its name")
        planes.append(stored)
    if len(sizes := {plane.values.shape for plane in planes}) > 1:
        shown = ", ".join(f"{height}x{width}" for _, height, width in sorted(sizes))
        raise ValueError(f"its channels differ in size (height x width): {shown}")
    nodata = {plane.nodata for plane in planes}
    values = np.concatenate([plane.values for plane in planes])
    return StoredValues(values, nodata.pop() if len(nodata) == 1 else None, address.names)


def _stored_to_picture(stored: StoredValues, channels: int | None, reading: Reading) -> Picture:
    """Stored values as a picture: as shares if the collection is deep; through Pillow if 8-bit levels are gray or color."""
    stored = stored.select(reading)
    _check_channels(len(stored.values), channels)
    if reading.is_deep:
        return DeepPicture(stored, channels, reading)
    values = stored.values
    ends = type_range(values.dtype) if reading.range == "type" else None
    if len(values) not in (1, 3) or channels not in (None, 1, 3):
        return ArrayPicture(values, ends)
    pixels = ArrayPicture(values, ends).decoded().values.transpose(1, 2, 0)
    return Picture(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if len(values) == 1 else pixels)), channels)


def _check_channels(stored: int, channels: int | None) -> None:
    if channels not in (None, stored) and not (stored in (1, 3) and channels in (1, 3)):
        raise ValueError(f"has {counted(stored, 'channel')}, expected {channels}")
