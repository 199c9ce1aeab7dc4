"""The parts of a labeled source: which names mean training, validation and test, which are used, and which left aside."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from simmim.messages import counted, notify

# Usual names, compared in lower case.
TRAINING, VALIDATION, TEST = "training", "validation", "test"
PART_NAMES = {
    TRAINING: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
    TEST: ("test", "testing"),
}
EXPECTED = "expected train (or training), and val (valid, validation, dev, eval) or test (testing)"


class Parts(NamedTuple):
    """The names of the parts that are used.

    Attributes:
        train: to train on.
        validation: to validate with; a test part where there is no other. None where a share of `train` is to be held out.
        left_aside: all other names.
    """

    train: str
    validation: str | None
    left_aside: tuple[str, ...]

    @property
    def used(self) -> dict[str, str]:
        """The names by "train" and, where there is one, "validation", or "test" where a test part is to validate."""
        if self.validation is None:
            return {"train": self.train}
        return {"train": self.train, "test" if meaning_of(self.validation) == TEST else "validation": self.validation}

    def report(self, source: str, sizes: Mapping[str, int]) -> None:
        """A `Notice` of what is left aside.

        Args:
            source: as the user gave it.
            sizes: images in each part that is left aside. Parts without images are not worth a line.
        """
        named = [f"{name} ({counted(sizes[name], 'image')})" for name in self.left_aside if sizes[name]]
        if named:
            use = f"{self.train} is trained on and " + (
                f"{self.validation} validates" if self.validation else "a fifth of it is held out to validate with"
            )
            notify(f"{' and '.join(named)} of {source!r} {'is' if len(named) == 1 else 'are'} left aside: {use}")


def validating_use(uses: Container[str]) -> str | None:
    """Which of the keys of `Parts.used` is to validate; None where a share of the training part is to be held out."""
    return next((use for use in ("validation", "test") if use in uses), None)


def meaning_of(name: str) -> str | None:
    """`TRAINING`, `VALIDATION` or `TEST`; None for a name that is none of the usual ones."""
    return next((meaning for meaning, names in PART_NAMES.items() if name.lower() in names), None)


def assign_parts(names: Iterable[str], source: str) -> Parts | None:
    """Which of some names are used for what; None if none of them means training.

    Args:
        source: that has parts of these names, for error messages.

    Raises:
        ValueError: if two names mean the same.
    """
    names = tuple(names)
    by_meaning: dict[str | None, list[str]] = {}
    for name in names:
        by_meaning.setdefault(meaning_of(name), []).append(name)
    if TRAINING not in by_meaning:
        return None
    for meaning, same in by_meaning.items():
        if meaning and len(same) > 1:
            raise ValueError(f"{source!r} has {' and '.join(same)}, which both mean {meaning}: merge or rename one of them")
    train = by_meaning[TRAINING][0]
    validation = next((by_meaning[meaning][0] for meaning in (VALIDATION, TEST) if meaning in by_meaning), None)
    return Parts(train, validation, tuple(name for name in names if name not in (train, validation)))


def assign_splits(sizes: Mapping[str, int], source: str) -> Parts:
    """As `assign_parts`, of splits that are known to be parts, with a report. A single one is trained on, whatever its name.

    Args:
        sizes: rows by name of the split.

    Raises:
        ValueError: also if none of several means training.
    """
    parts = assign_parts(sizes, source)
    if parts is None and len(sizes) == 1:
        [name] = sizes
        if meaning_of(name):
            notify(f"{source!r} has the part {name} alone: it is trained on, and a fifth of it is held out to validate with")
        return Parts(name, None, ())
    if parts is None:
        raise ValueError(f"{source!r} has the parts {', '.join(sizes)}, and none to train on: {EXPECTED}; rename one")
    parts.report(source, sizes)
    return parts
