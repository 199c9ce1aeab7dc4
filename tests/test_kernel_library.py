"""The library of kernels for a CPU: found or compiled by a process, or done without."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from fork_server import finish

from simmim import c_library
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.encoders.swinv2.kernels import dispatch, library


def test_fewer_threads_than_asked_for(tmp_path):
    """A system that grants less than torch asks for gets the same numbers, not half of them."""
    environment = {"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "4"}
    script = f"""
import os
{SCRIPT}
os.environ["SIMMIM_KERNELS"] = "0"
print(features().item())
"""
    # Not a fork: OpenMP reads its variables when it is loaded.
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    by_kernels, by_reference = done.stdout.splitlines()
    value, said = by_kernels.split("|")
    assert said == "kernels" and float(value) == pytest.approx(float(by_reference), rel=1e-5)


SCRIPT = """
import torch
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config, kernels
torch.manual_seed(0)
encoder = build(SwinV2Config(16, (1,), (2,), window_size=4))
encoder.layers[0].blocks[0].norm1.weight.data.fill_(1)
def features():
    return encoder(torch.arange(3072.0).view(1, 3, 32, 32).sin()).pooled.square().sum()
print(features().item(), kernels.unavailable_reason() or 'kernels', sep='|')
"""


@pytest.fixture
def features_in_a_process(fork_server):
    """`features_in_a_process(cache, **environment)`: what a process computes, and says of the kernels, which it finds or
    compiles in a cache folder."""

    def features_in_a_process(cache, **environment):
        environment = {"XDG_CACHE_HOME": str(cache), **environment}
        found, version = finish([fork_server.start("--version", prelude=SCRIPT, env=environment)]).splitlines()
        assert version.startswith("simmim ")
        value, said = found.split("|")
        return float(value), said

    return features_in_a_process


def test_without_a_compiler_the_reference_implementation_runs(features_in_a_process, tmp_path):
    """Silently, with the reason at hand and nothing left in the cache; the next process with a compiler has the kernels."""
    broken = tmp_path / "broken-cc"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\n'
        'for word; do [ "$before" = -o ] && echo half > "$word"; before=$word; done\nexit 1\n'
    )
    broken.chmod(0o755)
    expected, said = features_in_a_process(tmp_path / "cache", SIMMIM_KERNELS="0")
    assert said == "switched off by SIMMIM_KERNELS=0"
    for compiler, problem in ((str(broken), "does not compile them"), (str(tmp_path / "none"), "No such file")):
        value, said = features_in_a_process(tmp_path / "cache", CC=compiler)
        assert value == pytest.approx(expected, rel=1e-5) and problem in said
        assert not list((tmp_path / "cache").rglob("*.so"))
    value, said = features_in_a_process(tmp_path / "cache")
    assert said == "kernels" and value == pytest.approx(expected, rel=1e-5)
    (kept,) = (tmp_path / "cache" / "simmim" / "kernels").glob("kernels-*")
    assert kept.suffix == ".so"


def test_a_run_says_whether_it_has_kernels(monkeypatch, tmp_path):
    """Who trains on a CPU without a compiler should know why it is slow."""
    from simmim.training.trainer import build_trainer, machine

    options = {"devices": 1, "precision": "32-true", "accumulate": 1, "callbacks": [], "log_every_steps": 1}
    built = build_trainer(tmp_path, 1, extra={"accelerator": "cpu"}, **options)
    encoder = build(SwinV2Config(16, (1,), (2,)))
    assert encoder.has_kernels(torch.device("cpu"))
    assert machine(built, encoder) == "1 × cpu (compiled kernels)"
    monkeypatch.setattr(dispatch, "get_kernels", lambda: None)
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda: "no C compiler")
    assert machine(built, encoder) == "1 × cpu (no compiled kernels, so slower: no C compiler)"
    assert not encoder.has_kernels(torch.device("cpu"))


def test_a_cache_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    """A library is code: it is loaded from a folder of one's own alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(c_library.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = c_library.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = c_library.cache_folder()
    assert own == tmp_path / "simmim" / "kernels"
    own.chmod(0o777)
    assert c_library.cache_folder() == folder


def test_a_library_that_was_cut_short_is_made_anew(features_in_a_process, tmp_path):
    """Of nothing, as a machine that lost its power may leave it."""
    assert library.get_kernels()  # in the cache of this process
    shutil.copytree(c_library.cache_folder(), tmp_path / "simmim" / "kernels")
    expected, _ = features_in_a_process(tmp_path)
    (kept,) = (tmp_path / "simmim" / "kernels").glob("kernels-*")
    whole = kept.stat().st_size
    kept.write_bytes(b"")
    assert features_in_a_process(tmp_path) == (expected, "kernels") and kept.stat().st_size == whole
