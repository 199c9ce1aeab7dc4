"""Notices, and parts of error messages that several packages share."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterable, Iterator


class Notice(UserWarning):
    """What a user should know, and what is no error: images that are left out, for instance. The command prints each once,
    as one line; in Python they are warnings."""


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Inside the block a `Notice` is not shown: it has been already, or does not matter there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        yield


def notify(text: str) -> None:
    """Warn of `text`, one line."""
    warnings.warn(text, Notice, stacklevel=3)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message about an unknown name: the nearest known one, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" known: {', '.join(sorted(known))}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the error's class name where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def counted(number: float, noun: str) -> str:
    """A number with its noun: 1 image, 1,204 images, 0.5 epochs, 2 classes."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun if number == 1 else plural(noun)}"


def every(number: int, noun: str) -> str:
    """How often: every step, every 20 steps."""
    return f"every {noun if number == 1 else counted(number, noun)}"


def plural(noun: str) -> str:
    """Of a noun that has a regular one: images, classes, boxes."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def name_some(names: Iterable[str], most: int = 3) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    return "; ".join(names[:most]) + (f"; and {len(names) - most:,} more" if len(names) > most else "")


def length_text(seconds: float) -> str:
    """A length of time in words: 3 h 20 min, 12 min, 100 s."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def gflops_text(flops: float) -> str:
    """FLOPs in GFLOPs, three significant digits: 0.0136, 7.08, 21.2, 1,230."""
    digits, exponent = f"{flops / 1e9:.2e}".split("e")
    return f"{float(f'{digits}e{exponent}'):,.{max(0, 2 - int(exponent))}f}"
