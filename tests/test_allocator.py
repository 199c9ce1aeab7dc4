"""Freed memory is kept. Each test runs in a process of its own: the C library's configuration cannot be unended."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from simmim.cli.allocator import keep_freed_memory
if sys.argv[1] != "leave":
    print(keep_freed_memory())
if sys.argv[1] == "ask":
    sys.exit()
import torch
def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
# Aligned blocks leave slivers in glibc's thread cache, which holds seven of a size; until it is full, they part the
# freed blocks from each other, and each next one grows the heap.
for _ in range(24):
    torch.ones(9 * 2**20)
before = page_faults()
for _ in range(10):
    torch.ones(9 * 2**20)
print(page_faults() - before)
"""
PAGES = 9 * 2**20 * 4 // 4096  # of one of the tensors, which are larger than all that glibc keeps by itself, 32 MiB


def output_of(mode, **environment):
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_pages_are_allocated_once():
    (faults,) = output_of("leave")
    assert int(faults) > 5 * PAGES
    configured, kept = output_of("keep")
    assert configured == "True" and int(kept) < int(faults) / 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize(
    "name, value", [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=9")]
)
def test_the_users_configuration_wins(name, value):
    assert output_of("ask", **{name: value})[0] == "False"
