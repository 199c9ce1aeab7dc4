"""Slides that are several files: which of them belong together."""

from __future__ import annotations

import os
from collections.abc import Iterable

MIRAX = ".mrxs"  # its tiles lie in the folder of its name
HAMAMATSU = (".vms", ".vmu")  # text files that name the others
LONGEST_TEXT_BYTES = 2**16


def may_have_companions(path: str) -> bool:
    """Whether a file may be of a slide that is several files, by its name."""
    return path.lower().endswith((MIRAX, *HAMAMATSU))


def companions_of(path: str) -> list[str]:
    """Paths of the folder or the files that belong to a slide, beside its own file; none for other files."""
    stem, ending = os.path.splitext(path)
    if ending.lower() == MIRAX:
        return [stem] if os.path.isdir(stem) else []
    return named_files(path) if ending.lower() in HAMAMATSU else []


def named_files(path: str) -> list[str]:
    """The files beside a Hamamatsu slide that it names."""
    try:
        with open(path, encoding="latin-1") as file:
            lines = file.read(LONGEST_TEXT_BYTES).splitlines()
    except OSError:
        return []
    folder = os.path.dirname(path)
    values = (line.partition("=")[2].strip() for line in lines)
    found = (os.path.join(folder, value) for value in values if value and os.path.basename(value) == value)
    return sorted({file for file in found if os.path.isfile(file)})


def belonging_files(paths: Iterable[str]) -> set[str]:
    """Paths of all folders and files that belong to the slides among `paths`."""
    slides = [path for path in paths if may_have_companions(path)]
    return {companion for path in slides for companion in companions_of(path)}
