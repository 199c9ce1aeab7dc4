"""How long threads that have nothing to do look for work before they sleep."""

from __future__ import annotations

import os
import sys

# Variables by which a user configures the waiting of OpenMP's threads.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LOOKS = 1000  # some 20 to 50 µs, about what it takes to wake a thread


def let_waiting_threads_sleep() -> bool:
    """Make threads of torch sleep soon where they wait for each other, and return whether that was configured.

    GNU's OpenMP, which torch uses on Linux, lets them look for work for several milliseconds after each operator. Beside
    other processes that takes time from the thread that is waited for, and a step takes five to twenty times as long
    (benchmarks/README.md). OpenMP reads its variables once, when torch is loaded. Nothing is changed after that, or where
    the user has set one of them.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAIT_VARIABLES):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(LOOKS)
    return True
