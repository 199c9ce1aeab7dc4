"""Parts of error messages that several packages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message about an unknown name: the nearest known one, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" known: {', '.join(sorted(known))}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the error's class name where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
