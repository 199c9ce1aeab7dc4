"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
OWN_CHOICE = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """From now on the process keeps what it frees, for itself; whether the C library could be told so.

    glibc gives large blocks back to the system as soon as they are freed, and a training step on a CPU, which frees and
    asks for the same again thousands of times, then spends one part in twenty waiting for pages of zeros. Whoever has set
    one of malloc's environment variables has chosen otherwise.
    """
    chosen = any(name in os.environ for name in OWN_CHOICE) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    # musl has neither, and another allocator, preloaded, its own.
    if not hasattr(library, "gnu_get_libc_version") or "LD_PRELOAD" in os.environ:
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
