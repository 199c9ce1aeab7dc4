"""Processes that trials run in, which end with the study, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def trial_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for trials, each on one core where there are several; what has not begun is given up on an error."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=prepare_process, initargs=(processes > 1,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def prepare_process(one_core: bool) -> None:
    """Set up a process for trials: it ends with the study, however that ends, and has one thread where there are several
    processes, which would fight for cores."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    if one_core:
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)


def end_with_parent() -> None:
    """Wait until the process that started this one is gone, and end; a killed study leaves nothing running."""
    multiprocessing.parent_process().join()
    os._exit(1)


def results(pool: ProcessPoolExecutor, run: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
    """Run every job in the pool: each and its result, as they are done."""
    running = {pool.submit(run, job): job for job in jobs}
    for future in as_completed(running):
        yield running[future], future.result()
