"""Processes that run trials, and that end with the study, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from simmim.messages import Notice

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def trial_pool(processes: int) -> Iterator[Executor | None]:
    """Processes for trials, each on one core where there are several. After an error, trials that wait are not started.

    Args:
        processes: 0 for none: trials run in this process.
    """
    if not processes:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=prepare_process, initargs=(processes > 1,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def prepare_process(one_thread: bool) -> None:
    """Set up a process for trials: it ends with the study, however the study ends.

    Args:
        one_thread: compute in one thread, where several processes would compete for the cores.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", Notice)  # the study has read the same images and has said what there is to say
    if one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)


def end_with_parent() -> None:
    """Wait until the process that started this one has ended, and end, so that a killed study leaves no process."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_in_pool(pool: Executor | None, run: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
    """Run every job, and yield each with its result when it is done.

    Args:
        pool: of `trial_pool`; None for this process, one job after the other.
    """
    if pool is None:
        for job in jobs:
            yield job, run(job)
        return
    running = {pool.submit(run, job): job for job in jobs}
    for future in as_completed(running):
        yield running[future], future.result()
