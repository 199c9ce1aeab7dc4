"""Threads of torch that wait for each other take no time from the one that is waited for."""

import os
import subprocess
import sys

import pytest
import torch

from simmim.cli import waiting

SCRIPT = """
import sys
from simmim.cli.main import main
sys.exit(main(["plan", "--preset", "nano", "--image", "96"]) or "torch" not in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
@pytest.mark.parametrize(
    "chosen, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_openmp_is_told_before_it_is_loaded(chosen, expected):
    """By the command, unless the user has chosen: OpenMP itself says what it has read."""
    environment = {name: value for name, value in os.environ.items() if name not in waiting.WAIT_VARIABLES}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **chosen}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr, done.stderr


def test_too_late(monkeypatch):
    """In a process that has loaded torch the variable would only reach its children."""
    assert torch.get_num_threads()
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert not waiting.let_waiting_threads_sleep() and "GOMP_SPINCOUNT" not in os.environ
