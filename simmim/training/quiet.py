"""Output of libraries that a run does without."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
    ".*is not a resumable dataloader.*|.*dataloader that is not resumable.*",
    ".*found in the `src` dir.*|.*treespec.*",
    ".*in eval mode at the start of training.*",
)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence, inside the block, Lightning's advice on things that the run decides, and tracebacks of threads that could not
    write. Errors and the toolkit's own lines stay.

    A thread that cannot write, TensorBoard's for instance, needs no traceback: the main thread meets the same error and ends
    the run with one line.
    """
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    excepthook = threading.excepthook

    def print_unless_io(arguments: threading.ExceptHookArgs) -> None:
        if not issubclass(arguments.exc_type, OSError):
            excepthook(arguments)

    try:
        threading.excepthook = print_unless_io
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        threading.excepthook = excepthook
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
