"""How many threads a run on a CPU uses: as many as there are cores that other processes leave free."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from tqdm import tqdm

CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # environment variables
FIRST_LOOK_S = 0.5  # least time over which others are observed before the first step
NEXT_LOOK_S, LONGEST_LOOK_S = 5.0, 60.0
# Two threads that wait for each other are as fast as one when one of them has half of a core. A little less than 1/2, so
# that a process that has half of a core, which it shares with a thread of ours, counts as busy.
ROUNDING = 0.45


@dataclass(frozen=True)
class Usage:
    """Seconds since an arbitrary start.

    Attributes:
        clock: that have passed.
        busy: for which all cores that this process may use were busy, in sum.
        own: of it by this process and its workers.
    """

    clock: float
    busy: float
    own: float


def read_usage(proc: Path = Path("/proc")) -> Usage | None:
    """What the cores have done until now; None where the system does not tell."""
    try:
        cores, tick = os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK")
        busy = 0
        for line in (proc / "stat").read_text(encoding="ascii").splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:8])
                busy += user + nice + system + sum(interrupts)  # the last of them is what other machines take
        own = time.process_time()
        for worker in multiprocessing.active_children():
            # The name, in parentheses, may have blanks. Two numbers are user and system time.
            fields = (
                (proc / str(worker.pid) / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            )
            own += (int(fields[11]) + int(fields[12])) / tick
    except (OSError, ValueError, IndexError, AttributeError):  # another system, or a worker that has just ended
        return None
    return Usage(time.monotonic(), busy / tick, own)


def cores_of_others(before: Usage, after: Usage) -> float:
    """How many cores other processes have kept busy between two readings."""
    return max(0.0, (after.busy - before.busy - after.own + before.own) / (after.clock - before.clock))


def num_useful_threads(most: int, cores: int, others: float) -> int:
    """The number of threads for `cores` of which others use some: 1 to `most`."""
    return max(1, min(most, math.floor(cores - others + ROUNDING)))


def are_threads_chosen() -> bool:
    """Whether the user has set the number of threads."""
    return any(os.environ.get(name) for name in CHOSEN_BY_USER)


def is_crowded(others: float) -> bool:
    """Whether other processes, which keep that many cores busy, leave this one fewer cores than it has threads."""
    return torch.get_num_threads() + others - len(os.sched_getaffinity(0)) > ROUNDING


@contextlib.contextmanager
def threads_of_a_run(look_s: float = FIRST_LOOK_S) -> Iterator[bool]:
    """Inside the block torch has as many threads as a run on a CPU would begin with (`LeaveBusyCores`). It yields whether
    other processes take cores that this one could use.

    Args:
        look_s: for which others are observed before the block.
    """
    most, before = torch.get_num_threads(), read_usage()
    time.sleep(look_s if before else 0.0)
    after = read_usage()
    others = cores_of_others(before, after) if before and after else 0.0
    try:
        crowded = after is not None and is_crowded(others)
        if crowded and not are_threads_chosen():
            torch.set_num_threads(num_useful_threads(most, len(os.sched_getaffinity(0)), others))
        yield crowded
    finally:
        torch.set_num_threads(most)


class LeaveBusyCores(pl.Callback):
    """Gives up threads of torch and the kernels for cores that other processes keep busy, and takes them back later.

    Products wait for their slowest thread. Beside a process that keeps one of two cores busy, two threads would be slower
    than one, and many times slower where that process has precedence. A step decides for the steps after it. Before the
    first step one look decides, later two in succession, and looks become rarer with each change.

    Does nothing on other devices, in several processes, and where the user has set the number of threads by the environment.

    Args:
        quiet: whether to say nothing of a change.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.most, self.changes = quiet, 1, 0
        self.last: Usage | None = None
        self.previous = 0  # what the look before has found

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to observe, where there is something to decide."""
        self.most = torch.get_num_threads()
        if (
            self.most > 1
            and not are_threads_chosen()
            and trainer.world_size == 1
            and trainer.strategy.root_device.type == "cpu"
        ):
            self.last = read_usage()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch, batch_index: int) -> None:
        """Look at the cores, now and then."""
        if self.last is None:
            return
        is_first, passed = not self.previous, time.monotonic() - self.last.clock
        if is_first and passed < FIRST_LOOK_S:
            time.sleep(FIRST_LOOK_S - passed)
        elif not is_first and passed < min(NEXT_LOOK_S * 2**self.changes, LONGEST_LOOK_S):
            return
        usage = read_usage()
        if usage is None:
            return
        cores, others = len(os.sched_getaffinity(0)), cores_of_others(self.last, usage)
        found = num_useful_threads(self.most, cores, others)
        if found != torch.get_num_threads() and (is_first or found == self.previous):
            torch.set_num_threads(found)
            self.changes += 1
            if not self.quiet:
                tqdm.write(  # beside the progress line
                    f"{found} of {self.most} threads: other processes keep {others:.1f} of {cores} cores busy "
                    f"(OMP_NUM_THREADS={self.most} would keep all)"
                )
        self.last, self.previous = usage, found

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Leave the process as it was."""
        if self.last is not None:
            torch.set_num_threads(self.most)
            self.last = None
