"""Pillow and other decoders: the formats that are read, and one kind of error for all broken files."""

from __future__ import annotations

import functools
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image

# What opening or cropping an image raises if its file is at fault. Decoders report broken files by almost any exception;
# `decoding` turns it into one of these, so that an error of a view is not mistaken for a broken image.
UNREADABLE = (OSError, ValueError)

# Formats with a signature. Pillow reads more, but some have no signature, so that noise passes for an image (TGA, PCX),
# some start other programs (EPS), and some hold a second image with a size of its own (ICO).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "QOI", "SGI", "PSD")

_LOCK = threading.Lock()
_num_inside = 0
_saved_state: list = []


@contextmanager
def decoding() -> Iterator[None]:
    """Surround every call of a decoder: its exceptions become one of `UNREADABLE`, its warnings are silent, and Pillow's
    limit of pixels is off.

    Limit and warnings are global in Pillow and Python: the first thread that enters changes them, the last one that leaves
    restores them.
    """
    global _num_inside
    with _LOCK:
        if not _num_inside:
            silence = warnings.catch_warnings()
            silence.__enter__()
            warnings.filterwarnings("ignore", module=r"(PIL|pydicom|zarr)\.")
            _saved_state[:] = [silence, Image.MAX_IMAGE_PIXELS]
            Image.MAX_IMAGE_PIXELS = None
        _num_inside += 1
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
            _num_inside -= 1
            if not _num_inside:
                silence, Image.MAX_IMAGE_PIXELS = _saved_state
                silence.__exit__(None, None, None)


def describe_error(error: Exception) -> str:
    """Why an image was not read, in one line that names no object in memory."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"<?\S+ object at 0x[0-9a-fA-F]+>?", "the data", " ".join(text.split()))
    return text or type(error).__name__


def open_pillow(stream: BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS`; only its header is read.

    Raises:
        PIL.UnidentifiedImageError: if the file is of none of these formats.
    """
    return Image.open(stream, formats=_available_formats())


@functools.cache
def _available_formats() -> tuple[str, ...]:
    Image.init()  # Pillow raises for the name of a format that it was built without
    silence_logger("PIL")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def silence_logger(name: str) -> None:
    """Keep Python from printing a library's log records about broken files. A handler that the user installs gets them."""
    if not logging.getLogger(name).handlers:
        logging.getLogger(name).addHandler(logging.NullHandler())
