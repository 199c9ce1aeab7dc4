"""A run on a CPU leaves cores that other processes keep busy to them."""

from types import SimpleNamespace

import pytest
import torch

from simmim.training import threads
from simmim.training.threads import LeaveBusyCores, Usage, cores_of_others, num_useful_threads, read_usage

STAT = """cpu  900 0 0 0 0 0 0 0 0 0
cpu0 100 20 30 5000 70 1 2 7 50 0
cpu1 200 0 40 5000 0 0 0 0 0 0
cpu2 999 999 999 0 0 0 0 0 0 0
intr 1 2 3
"""


def test_usage_is_that_of_the_allowed_cores(tmp_path, monkeypatch):
    """Without the time for which they were idle or waited, and with that of the run's workers."""
    (tmp_path / "stat").write_text(STAT)
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "stat").write_text(f"77 (a (b) c) S {' '.join(map(str, range(4, 14)))} 300 50 0 0\n")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(threads.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(threads.time, "process_time", lambda: 0.25)
    assert read_usage(tmp_path).own == 0.25
    monkeypatch.setattr(threads.multiprocessing, "active_children", lambda: [SimpleNamespace(pid=77)])
    usage = read_usage(tmp_path)
    assert (usage.busy, usage.own) == (4.0, 3.75)
    (tmp_path / "77" / "stat").unlink()
    assert read_usage(tmp_path) is None


def test_the_share_of_others():
    assert cores_of_others(Usage(10, 50, 20), Usage(14, 57, 23)) == 1.0
    assert cores_of_others(Usage(10, 50, 20), Usage(14, 53, 24)) == 0.0  # clocks of the system are coarse


@pytest.mark.parametrize(
    "most, cores, others, expected",
    [(2, 2, 0, 2), (2, 2, 0.4, 2), (2, 2, 0.5, 1), (2, 2, 2, 1), (16, 16, 1, 15), (4, 8, 3, 4), (4, 8, 6, 2), (8, 8, 9, 1)],
)
def test_threads_for_what_is_free(most, cores, others, expected):
    assert num_useful_threads(most, cores, others) == expected


@pytest.fixture
def observed(monkeypatch):
    """`observed(others, quiet=False)`: the numbers of threads of a run of a step a second, of two cores, of which others use
    so much in each of the seconds."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 1})
    number = [2]
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(threads.torch, "set_num_threads", lambda count: number.__setitem__(0, count))

    def observed(others, quiet=False, world_size=1, device="cpu"):
        now = [0]
        monkeypatch.setattr(threads, "read_usage", lambda: Usage(now[0], sum(others[: now[0]]) + now[0], now[0]))
        monkeypatch.setattr(threads, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=None))
        trainer = SimpleNamespace(world_size=world_size, strategy=SimpleNamespace(root_device=torch.device(device)))
        callback, seen = LeaveBusyCores(quiet), []
        callback.on_fit_start(trainer, None)
        for step in range(len(others)):
            now[0] = step + 1
            callback.on_train_batch_start(trainer, None, None, step)
            seen.append(number[0])
        callback.teardown(trainer, None, "fit")
        assert number == [2]
        return seen

    return observed


def test_a_busy_neighbor_from_the_start(observed, capsys):
    """The first step is taken with the right number already; later the run has both cores again."""
    assert observed([0.9] * 3 + [0.0] * 30) == [1] * 20 + [2] * 13
    first, second = capsys.readouterr().out.splitlines()
    assert first == "1 of 2 threads: other processes keep 0.9 of 2 cores busy (OMP_NUM_THREADS=2 would keep all)"
    assert second.startswith("2 of 2 threads: other processes keep 0.0")


def test_a_moment_changes_nothing(observed, capsys):
    """Two looks in succession decide; and quietly where the run is quiet."""
    assert observed([0.0] * 3 + [1.0] * 4 + [0.0] * 10) == [2] * 17
    assert observed([0.0] * 3 + [1.0] * 20, quiet=True) == [2] * 10 + [1] * 13
    assert not capsys.readouterr().out


@pytest.mark.parametrize("case", [{"world_size": 2}, {"device": "cuda"}])
def test_other_runs_keep_their_threads(observed, case, monkeypatch):
    assert observed([1.0] * 9, **case) == [2] * 9


def test_the_user_decides(observed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert observed([1.0] * 9) == [2] * 9
