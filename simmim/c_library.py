"""C for the processor, compiled once for a machine and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SWITCH = "SIMMIM_KERNELS"  # environment variable; 0 turns all compiled code off
TIMEOUT_S = 120  # of the compiler


def library_file(name: str, compiler: list[str], flags: Sequence[str], sources: Sequence[Path]) -> Path:
    """The file of a library, there or not: another one for other sources, flags, compilers and processors.

    Raises:
        OSError: where no folder for it is safe to use.
    """
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIMEOUT_S).stdout
    content = b"".join(source.read_bytes() for source in sources)
    # Machines with different processors may share a home folder.
    identity = b"\n".join((content, version, repr((compiler, tuple(flags))).encode(), processor_features().encode()))
    return cache_folder() / f"{name}-{hashlib.sha256(identity).hexdigest()[:16]}.so"


def compile_library(compiler: list[str], flags: Sequence[str], sources: Sequence[Path], file: Path) -> bool:
    """Compile a library, whose file appears whole or not at all. Returns whether the compiler succeeded."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        output = Path(folder) / file.name
        command = [*compiler, *flags, *map(str, sources), "-o", str(output), "-lm"]
        if subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode:
            return False
        with output.open("rb+") as library:
            os.fsync(library.fileno())
        os.replace(output, file)
    return True


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
