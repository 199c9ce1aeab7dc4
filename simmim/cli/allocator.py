"""Whether the C library keeps freed memory."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Variables by which a user configures malloc.
MALLOC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Make the process keep the memory that it frees, and return whether the C library was configured so.

    glibc returns large blocks to the system as soon as they are freed. A training step on a CPU frees and allocates the same
    blocks thousands of times, and would spend one part in twenty waiting for pages of zeros. Nothing is changed where the
    user has set one of malloc's environment variables.
    """
    configured = any(name in os.environ for name in MALLOC_VARIABLES)
    configured = configured or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if configured or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    # musl has no such options, and a preloaded allocator has its own.
    if not hasattr(library, "gnu_get_libc_version") or "LD_PRELOAD" in os.environ:
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
