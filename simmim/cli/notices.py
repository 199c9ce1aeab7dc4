"""The library's notices, which are Python warnings, as lines of the command."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from simmim.messages import Notice


@contextmanager
def notices_as_lines(print_line: Callable[[str], object]) -> Iterator[None]:
    """Inside the block, each `Notice` is given to `print_line`, once however often it is repeated.

    Of several processes, each of which runs the whole command, the first one speaks. Other warnings are shown as ever.
    """
    told: set[str] = set()
    show = warnings.showwarning

    def show_warning(message, category, *place) -> None:
        if not issubclass(category, Notice):
            show(message, category, *place)
        elif str(message) not in told and is_first_process():
            told.add(str(message))
            print_line(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        warnings.showwarning = show_warning  # type: ignore[assignment]
        yield


def is_first_process() -> bool:
    """As the trainer's; a process that has not loaded it is alone."""
    trainer = sys.modules.get("simmim.training.trainer")
    return trainer is None or trainer.is_first_process()
