"""Compiles the kernels for the machine at hand, once, and loads them."""

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

from simmim.encoders.swinv2.geometry import MASKED_LOGIT
from simmim.messages import first_line

HEADERS, SOURCES = ("vectors.h", "product.h"), ("attention.c", "bias.c", "pointwise.c")
# Contraction to fused multiply-adds is GCC's default; nothing here lets a compiler reorder sums.
FLAGS = (
    "-O3",
    "-fPIC",
    "-shared",
    "-std=gnu11",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DMASKED_LOGIT=({MASKED_LOGIT}f)",
)
OPENMP = "-fopenmp"
SWITCH = "SIMMIM_KERNELS"  # environment variable: 0 for none
PATIENCE_S = 120

pointer = ctypes.c_void_p
number = ctypes.c_long


class Attention(ctypes.Structure):
    """As in attention.c."""

    _fields_ = [
        *(
            (name, pointer)
            for name in (
                "qkv",
                "q_bias",
                "v_bias",
                "scale",
                "table",
                "offset_of",
                "token_of",
                "region_of",
            )
        ),
        *(
            (name, number)
            for name in (
                "images",
                "tokens",
                "windows",
                "window_tokens",
                "heads",
                "head_dim",
                "offsets",
            )
        ),
        ("half", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


class Bias(ctypes.Structure):
    """As in bias.c."""

    _fields_ = [
        *((name, pointer) for name in ("coords", "weight1", "bias1", "weight2")),
        *((name, number) for name in ("offsets", "hidden", "heads")),
        ("threads", ctypes.c_int),
    ]


class Join(ctypes.Structure):
    """As in pointwise.c."""

    _fields_ = [
        *((name, pointer) for name in ("branch", "bias", "gain", "shift", "keep")),
        *((name, number) for name in ("rows", "rows_an_image", "dim")),
        ("epsilon", ctypes.c_float),
        ("half", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


class Merging(ctypes.Structure):
    """As in pointwise.c."""

    _fields_ = [
        *((name, number) for name in ("images", "height", "width", "dim")),
        ("half", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


ARGUMENTS = {
    "attention_forward": [ctypes.POINTER(Attention), pointer, pointer],
    "attention_backward": [ctypes.POINTER(Attention), *[pointer] * 7],
    "bias_forward": [ctypes.POINTER(Bias), pointer],
    "bias_backward": [ctypes.POINTER(Bias), *[pointer] * 5],
    "join_forward": [ctypes.POINTER(Join), *[pointer] * 4],
    "join_backward": [ctypes.POINTER(Join), *[pointer] * 8],
    "gelu_forward": [pointer, pointer, pointer, number, number, ctypes.c_int, ctypes.c_int],
    "gelu_backward": [*[pointer] * 5, number, number, ctypes.c_int, ctypes.c_int],
    "merging_forward": [ctypes.POINTER(Merging), pointer, pointer],
    "merging_backward": [ctypes.POINTER(Merging), pointer, pointer],
}


class Kernels:
    """The compiled functions; `threaded` where they may use several threads."""

    def __init__(self, file: Path, threaded: bool) -> None:
        self.threaded, self.library = threaded, ctypes.CDLL(str(file))
        for name, arguments in ARGUMENTS.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int

    def call(self, name: str, *arguments) -> None:
        """Run one of `ARGUMENTS`.

        Raises:
            MemoryError: when there is none for its scratch.
        """
        if getattr(self.library, name)(*arguments):
            raise MemoryError(f"no memory for {name} of the fused kernels")


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The kernels, compiled at the first call on this machine; None where there is no compiler for them (`reason`)."""
    try:
        return load()
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        problem.append(first_line(error))
        return None


problem: list[str] = []
_disabled = 0  # contexts of `disabled` that are open


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """A context in which every encoder computes by its plain lines, on any device; for comparisons."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


def is_disabled() -> bool:
    """Whether kernels are switched off, by `disabled` or by the environment variable."""
    return bool(_disabled) or os.environ.get(SWITCH) == "0"


def reason() -> str:
    """Why `kernels` is None: one line."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    return problem[-1] if problem else ""


def load() -> Kernels:
    """From the cache, or compiled into it.

    Raises:
        ValueError: where they are switched off, or no compiler is found or it fails.
    """
    if os.environ.get(SWITCH, "1") == "0":
        raise ValueError(f"switched off by {SWITCH}=0")
    if os.name != "posix":
        raise ValueError("not for this system")
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=PATIENCE_S).stdout
    home = Path(__file__).parent
    sources = b"".join((home / name).read_bytes() for name in (*HEADERS, *SOURCES))
    # A home folder may be shared by machines whose processors differ.
    identity = b"\n".join((sources, version, repr((compiler, FLAGS)).encode(), processor().encode()))
    digest = hashlib.sha256(identity).hexdigest()[:16]
    for threaded in (True, False):
        file = cache_folder() / f"kernels-{digest}{'' if threaded else '-serial'}.so"
        if file.is_file():
            with contextlib.suppress(OSError):
                return Kernels(file, threaded)
        if compiled(compiler, home, file, threaded):
            return Kernels(file, threaded)
    raise ValueError(f"{' '.join(compiler)} does not compile them")


def find_compiler() -> list[str]:
    """The C compiler's command.

    Raises:
        ValueError: when there is none.
    """
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise ValueError("no C compiler: cc, gcc or clang, or the one that the environment variable CC names")


def processor() -> str:
    """What tells this processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def for_processor() -> str:
    """The flag that lets a compiler use all of this processor's instructions."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def cache_folder() -> Path:
    """Where compiled kernels are kept; a folder of this user's own, below the temporary one, where home is read-only."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(base) / "simmim" / "kernels", Path(tempfile.gettempdir()) / f"simmim-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # Nobody else may have laid a library there.
        status = folder.lstat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    raise OSError("no folder to keep compiled kernels in")


def compiled(compiler: list[str], home: Path, file: Path, threaded: bool) -> bool:
    """Whether the kernels could be compiled to `file`, which is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        whole = Path(folder) / file.name
        flags = [*FLAGS, for_processor(), *([OPENMP] if threaded else [])]
        command = [*compiler, *flags, *(str(home / name) for name in SOURCES), "-o", str(whole), "-lm"]
        if subprocess.run(command, capture_output=True, timeout=PATIENCE_S).returncode:
            return False
        with whole.open("rb+") as library:
            os.fsync(library.fileno())
        os.replace(whole, file)
    return True
