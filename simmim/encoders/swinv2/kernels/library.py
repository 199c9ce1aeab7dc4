"""Compiles the kernels in C for the processor, once, and loads them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from simmim.c_library import SWITCH, compile_library, find_compiler, library_file, processor_flag
from simmim.encoders.shifted_windows.geometry import MASKED_LOGIT, OTHER_GROUP_LOGIT, REGIONS
from simmim.encoders.swinv2.model import MAX_BIAS, SMALLEST_NORM
from simmim.messages import first_line

HEADERS = ("vectors.h", "share.h", "tiles.h", "product.h", "attention.h")
SOURCES = ("share.c", "attention_forward.c", "attention_backward.c", "bias.c", "gradients.c", "pointwise.c")
# Contraction to fused multiply-adds is GCC's default. No flag lets a compiler reorder sums.
FLAGS = (
    *("-O3", "-fPIC", "-shared", "-pthread", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    "-fopenmp-simd",
    f"-DMASKED_LOGIT=({MASKED_LOGIT}f)",
    f"-DOTHER_GROUP_LOGIT=({OTHER_GROUP_LOGIT}f)",
    f"-DREGIONS={REGIONS}",
    f"-DSMALLEST_NORM={SMALLEST_NORM}f",
    f"-DMAX_BIAS={MAX_BIAS}f",
)

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
OPTIONS = [("bf16", INT), ("threads", INT)]


def fields(names: str, ctype: type) -> list[tuple[str, type]]:
    """Fields of one type, their names separated by blanks."""
    return [(name, ctype) for name in names.split()]


class Attention(ctypes.Structure):
    """As in attention.h."""

    _fields_ = [
        *fields("qkv q_bias v_bias scale table offset_of token_of region_of", POINTER),
        *fields("label_rows images tokens windows window_tokens heads head_dim offsets", LONG),
        *OPTIONS,
    ]


class Bias(ctypes.Structure):
    """As in bias.c."""

    _fields_ = [*fields("coords weight1 bias1 weight2", POINTER), *fields("offsets hidden heads", LONG), ("threads", INT)]


class Join(ctypes.Structure):
    """As in pointwise.c."""

    _fields_ = [
        *fields("branch bias norm_weight norm_bias drop_factors", POINTER),
        *fields("rows rows_per_image dim", LONG),
        ("epsilon", ctypes.c_float),
        *OPTIONS,
    ]


class Merging(ctypes.Structure):
    """As in pointwise.c."""

    _fields_ = [*fields("images height width dim", LONG), *OPTIONS]


SIGNATURES = {
    "attention_forward": [ctypes.POINTER(Attention), POINTER, POINTER],
    "attention_backward": [ctypes.POINTER(Attention), *[POINTER] * 7],
    "bias_forward": [ctypes.POINTER(Bias), POINTER],
    "bias_backward": [ctypes.POINTER(Bias), *[POINTER] * 5],
    "join_forward": [ctypes.POINTER(Join), *[POINTER] * 4],
    "join_backward": [ctypes.POINTER(Join), *[POINTER] * 8],
    "gelu_forward": [*[POINTER] * 3, LONG, LONG, INT, INT],
    "gelu_backward": [*[POINTER] * 5, LONG, LONG, INT, INT],
    "merging_forward": [ctypes.POINTER(Merging), POINTER, POINTER],
    "merging_backward": [ctypes.POINTER(Merging), POINTER, POINTER],
    "has_weight_gradient": [],
    "weight_gradient": [*[POINTER] * 3, LONG, LONG, LONG, INT],
}


class KernelLibrary:
    """The compiled functions."""

    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))
        for name, arguments in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, INT

        self.has_weight_gradient = bool(self.library.has_weight_gradient())

    def call(self, name: str, *arguments) -> None:
        """Call one of `SIGNATURES`.

        Raises:
            MemoryError: when its scratch memory cannot be allocated.
        """
        if getattr(self.library, name)(*arguments):
            raise MemoryError(f"no memory for the kernel {name}")


@lru_cache(maxsize=1)
def get_kernels() -> KernelLibrary | None:
    """The kernels, compiled or loaded at the first call; None where that fails (`unavailable_reason`)."""
    try:
        return load_kernels()
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        _problems.append(first_line(error))
        return None


_problems: list[str] = []
_open_contexts = 0  # of `disabled`


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """A context in which every encoder runs the reference implementation, on any device. For comparisons."""
    global _open_contexts
    _open_contexts += 1
    try:
        yield
    finally:
        _open_contexts -= 1


def is_disabled() -> bool:
    """Whether kernels are turned off, by `disabled` or by the environment variable."""
    return bool(_open_contexts) or os.environ.get(SWITCH) == "0"


def unavailable_reason() -> str:
    """Why there are no kernels, in one line; empty if there are."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    return _problems[-1] if _problems else ""


def load_kernels() -> KernelLibrary:
    """Load the kernels from the cache, or compile them into it.

    Raises:
        ValueError: when they are turned off, or there is no compiler, or it fails.
    """
    if os.environ.get(SWITCH, "1") == "0":
        raise ValueError(f"switched off by {SWITCH}=0")
    if os.name != "posix":
        raise ValueError("not supported on this system")
    compiler, folder = find_compiler(), Path(__file__).parent
    file = library_file("kernels", compiler, FLAGS, [folder / name for name in (*HEADERS, *SOURCES)])
    if file.is_file():
        with contextlib.suppress(OSError):
            return KernelLibrary(file)
    if compile_kernels(compiler, folder, file):
        return KernelLibrary(file)
    raise ValueError(f"{' '.join(compiler)} does not compile them")


def compile_kernels(compiler: list[str], sources: Path, file: Path) -> bool:
    """Compile the kernels in the folder `sources` to `file`, by an atomic write. Returns whether the compiler succeeded."""
    return compile_library(compiler, [*FLAGS, processor_flag()], [sources / name for name in SOURCES], file)
