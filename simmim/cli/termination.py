"""SIGTERM as an exception, so that a command that is stopped leaves no temporary files."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM came, from a scheduler or `kill`. No `Exception`, so that nothing takes it for an error of its own.

    Attributes:
        exit_code: 128 and the signal's number, as shells report it.
    """

    exit_code = 128 + signal.SIGTERM

    def __init__(self) -> None:
        super().__init__("stopped by SIGTERM")


@contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """Inside the block the first SIGTERM raises `Terminated`; a second one ends the process at once, as does the first in
    processes that are forked off. Nothing is changed where something else handles the signal already."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() == owner:
            raise Terminated
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
