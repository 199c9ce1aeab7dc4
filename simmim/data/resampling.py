"""Pillow's bilinear filter in compiled C: the same pixels to the last bit in a fifth of the time, for 8-bit gray and color.

Without a C compiler, and where its pixels are not those of the installed Pillow, it is not used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from simmim.c_library import SWITCH, compile_library, find_compiler, library_file, processor_flag
from simmim.data.orientation import Box, Size

SOURCE = Path(__file__).with_name("resample.c")
# Without contraction to fused multiply-adds, by which weights would differ from Pillow's.
FLAGS = ("-O3", "-fPIC", "-shared", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno")
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
TWO_LONGS, FOUR_FLOATS = LONG * 2, ctypes.c_float * 4


class Resampler:
    """The compiled function.

    Args:
        columns_first: whether this Pillow goes along columns before it goes along rows where that is less work.
    """

    def __init__(self, file: Path, columns_first: bool = True) -> None:
        self.file, self.columns_first = file, columns_first
        self.function = ctypes.CDLL(str(file)).resample
        self.function.argtypes = [POINTER, LONG, LONG, TWO_LONGS, LONG, LONG, FOUR_FLOATS, LONG, LONG, INT, POINTER]
        self.function.restype = INT

    def __call__(self, pixels: np.ndarray, box: Box, size: Size, origin: tuple[int, int], whole: Size) -> np.ndarray:
        """A box of an image, resized: (bands, height, width) uint8.

        Args:
            pixels: (height, width) or (height, width, 3) uint8, the pixels of a row beside each other: all of the image that
                the filter looks at.
            box: left, top, right, bottom in pixels of the whole image.
            size: (height, width) of the result.
            origin: (left, top) of `pixels` in the whole image.
            whole: (height, width) of the whole image.

        Raises:
            MemoryError: when its scratch memory cannot be allocated.
        """
        bands = 1 if pixels.ndim == 2 else pixels.shape[2]
        result = np.empty((bands, *size), np.uint8)
        (height, width), (out_height, out_width) = whole, size
        # Newer Pillows' rule, found by their results: which axis goes first makes a difference of one level.
        tall = out_height < height and height - out_height > 2 * (width - out_width)
        failed = self.function(
            *(pixels.ctypes.data, pixels.strides[0], bands, TWO_LONGS(*origin), width, height, FOUR_FLOATS(*box)),
            *(out_width, out_height, int(tall and self.columns_first), result.ctypes.data),
        )
        if failed:
            raise MemoryError("no memory to resize an image")
        return result

    def is_pillows(self) -> bool:
        """Whether it makes what the installed Pillow makes."""
        noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
        cases = [((90, 60, 3), (40, 41)), ((96, 40, 3), (30, 38)), ((31, 64), (64, 50))]
        for shape, size in cases:
            pixels = np.ascontiguousarray(
                noise[: shape[0], : shape[1]] if len(shape) == 3 else noise[: shape[0], : shape[1], 0]
            )
            box = (0.25, 0.5, shape[1] - 1.75, shape[0] - 0.6)
            expected = np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=box))
            expected = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
            if not np.array_equal(self(pixels, box, size, (0, 0), (shape[0], shape[1])), expected):
                return False
        return True


@functools.lru_cache(maxsize=1)
def get_resampler() -> Resampler | None:
    """The compiled function, made or loaded at the first call; None where that fails or pixels are not Pillow's."""
    if os.environ.get(SWITCH) == "0" or os.name != "posix":
        return None
    try:
        compiler, flags = find_compiler(), [*FLAGS, processor_flag()]
        file = library_file("resample", compiler, flags, [SOURCE])
        if file.is_file():
            with contextlib.suppress(OSError, AttributeError):
                return choose_order(file)
        return choose_order(file) if compile_library(compiler, flags, [SOURCE], file) else None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None


def choose_order(file: Path) -> Resampler | None:
    """The function in the order of the installed Pillow."""
    return next((made for made in (Resampler(file, True), Resampler(file, False)) if made.is_pillows()), None)
