"""Compiles the kernels in C for the processor, once, and loads them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from simmim.encoders.shifted_windows.geometry import MASKED_LOGIT, OTHER_GROUP_LOGIT, REGIONS
from simmim.encoders.swinv2.model import MAX_BIAS, SMALLEST_NORM
from simmim.messages import first_line

HEADERS, SOURCES = ("vectors.h", "share.h", "product.h"), ("share.c", "attention.c", "bias.c", "pointwise.c")
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
SWITCH = "SIMMIM_KERNELS"  # environment variable; 0 turns the kernels off
TIMEOUT_S = 120  # of the compiler

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
OPTIONS = [("bf16", INT), ("threads", INT)]


def fields(names: str, ctype: type) -> list[tuple[str, type]]:
    """Fields of one type, their names separated by blanks."""
    return [(name, ctype) for name in names.split()]


class Attention(ctypes.Structure):
    """As in attention.c."""

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
}


class KernelLibrary:
    """The compiled functions."""

    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))
        for name, arguments in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, INT

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
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIMEOUT_S).stdout
    folder = Path(__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in (*HEADERS, *SOURCES))
    # Machines with different processors may share a home folder.
    identity = b"\n".join((sources, version, repr((compiler, FLAGS)).encode(), processor_features().encode()))
    digest = hashlib.sha256(identity).hexdigest()[:16]
    file = cache_folder() / f"kernels-{digest}.so"
    if file.is_file():
        with contextlib.suppress(OSError):
            return KernelLibrary(file)
    if compile_kernels(compiler, folder, file):
        return KernelLibrary(file)
    raise ValueError(f"{' '.join(compiler)} does not compile them")


def find_compiler() -> list[str]:
    """The command of the C compiler.

    Raises:
        ValueError: when there is none.
    """
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise ValueError("no C compiler: cc, gcc or clang, or the one in the environment variable CC")


def processor_features() -> str:
    """A text that differs between processors with different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def processor_flag() -> str:
    """The flag by which a compiler uses all instructions of this processor."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def cache_folder() -> Path:
    """The folder for compiled kernels: in the user's cache, or in the temporary folder if that cannot be written.

    Raises:
        OSError: when neither is safe to use.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(base) / "simmim" / "kernels", Path(tempfile.gettempdir()) / f"simmim-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # A library is code: no other user may be able to replace it.
        status = folder.lstat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    raise OSError("no folder to keep compiled kernels in")


def compile_kernels(compiler: list[str], sources: Path, file: Path) -> bool:
    """Compile the kernels in the folder `sources` to `file`, by an atomic write. Returns whether the compiler succeeded."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        output = Path(folder) / file.name
        command = [*compiler, *FLAGS, processor_flag(), *(str(sources / name) for name in SOURCES), "-o", str(output), "-lm"]
        if subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode:
            return False
        with output.open("rb+") as library:
            os.fsync(library.fileno())
        os.replace(output, file)
    return True
