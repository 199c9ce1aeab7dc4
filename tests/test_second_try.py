"""A crash in gloo is told from every other end of a run; a test is tried again for it alone, and the summary says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from second_try import PRINT_STACKS, GlooCrash, crashed_in_gloo, unexpected_end

# A process with a gloo group of its own sends a signal to one of its threads: the main one or gloo's.
CRASH = (
    PRINT_STACKS
    + """
import ctypes, os, time
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def threads():
    return {{open(f"/proc/self/task/{{task}}/comm").read().strip(): int(task) for task in os.listdir("/proc/self/task")}}
while "gloo_tcp_loop" not in threads():  # a thread gives itself its name after it has started
    time.sleep(0.01)
thread = threads()["gloo_tcp_loop"] if {in_gloo} else os.getpid()
ctypes.CDLL(None).syscall({tgkill}, os.getpid(), thread, {number})
time.sleep(30)
"""
)
TGKILL = {"x86_64": 234, "aarch64": 131}.get(os.uname().machine)


@pytest.mark.skipif(not sys.platform.startswith("linux") or TGKILL is None, reason="sends a signal to one thread of Linux")
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
@pytest.mark.parametrize("in_gloo", [True, False])
def test_a_crash_in_gloo_is_told_by_its_stack(fork_server, in_gloo, number):
    prelude = CRASH.format(in_gloo=in_gloo, tgkill=TGKILL, number=int(number))
    code, output = fork_server.start("--help", prelude=prelude, env={"GLOO_SOCKET_IFNAME": "lo"}).wait()
    assert code == -number and "gloo::transport" in output, "the other threads' stacks name gloo in any case"
    assert crashed_in_gloo(code, output) == in_gloo
    assert not crashed_in_gloo(1, output) and not crashed_in_gloo(-signal.SIGKILL, output)
    other_end = (1, "Connection closed by peer [gloo/transport/tcp/pair.cc]")
    assert isinstance(unexpected_end([(code, output), other_end]), GlooCrash) == in_gloo
    assert not isinstance(unexpected_end([(code, output)]), GlooCrash), "of one process nothing is tried again"


TESTS = """
import pytest
from pathlib import Path
from second_try import GlooCrash

def once(error):
    before = Path(__file__).with_suffix("." + error.args[0])
    if not before.exists():
        before.touch()
        raise error

@pytest.mark.two_processes
def test_gloo():
    once(GlooCrash("exit code -11"))

@pytest.mark.two_processes
def test_other():
    once(AssertionError("exit code -6"))

def test_unmarked():
    once(GlooCrash("exit code -7"))
"""


def test_only_marked_tests_are_tried_again_and_each_is_reported(tmp_path):
    (tmp_path / "conftest.py").write_text("from second_try import *\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-markers", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 failed, 1 passed, 1 rerun" in done.stdout, done.stdout + done.stderr
    assert "SECOND TRY of test_it.py::test_gloo: second_try.GlooCrash: exit code -11" in done.stdout
    assert done.stdout.count("SECOND TRY") == 1
