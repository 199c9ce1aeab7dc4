"""Which labeled scenes train and which validate, drawn by seeds: for label maps and boxes alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from simmim.data.label_map_files import SceneStatistics
from simmim.messages import counted


@dataclass(frozen=True)
class SceneDraw:
    """How scenes are drawn in a study, beside their number and the seed.

    Attributes:
        validation_seed: draws the fifth that is held out, whatever the seed is; by default the seed draws it.
        pool: (part, number of parts): the training scenes are divided at random, and labels are drawn from this part alone.
        fold: (part, number of parts) in cross-validation: the drawn scenes are divided, and this part validates.
    """

    validation_seed: int | None = None
    pool: tuple[int, int] | None = None
    fold: tuple[int, int] | None = None


AS_EVER = SceneDraw()  # of a single run


class ChosenScenes(NamedTuple):
    """Rows of the training part. `validation` is None where the source's validation part is to validate."""

    train: list[int]
    validation: list[int] | None


@dataclass(frozen=True)
class SceneSource:
    """The scenes of a training part, of which some are chosen.

    Attributes:
        path: of the source.
        scenes: what each holds.
        values: of the classes in `scenes`.
        has_validation: whether the source has a part that validates; else a fifth is held out.
        files: number of the file of each, where scenes are pages of files: they resemble one another, and stay together.
    """

    path: str
    scenes: Sequence[SceneStatistics] = field(repr=False)
    values: tuple[int, ...]
    has_validation: bool
    files: tuple[int, ...] | None = field(default=None, repr=False)

    def hold_out(self, seed: int, draw: SceneDraw, generator: random.Random | None = None) -> ChosenScenes:
        """All scenes, or four fifths and one where a fifth is held out.

        Raises:
            ValueError: as `hold_out_fifth`.
        """
        rows = list(range(len(self.scenes)))
        if self.has_validation:
            return ChosenScenes(rows, None)
        if draw.validation_seed is not None:
            generator = random.Random(f"validation/{draw.validation_seed}")
        return ChosenScenes(*hold_out_fifth(rows, generator or random.Random(f"scenes/{seed}"), self.path, self.files))

    def choose(self, labels: int | None, seed: int, draw: SceneDraw) -> ChosenScenes:
        """The scenes of a run.

        Args:
            labels: number of scenes, every class among them; None for all.

        Raises:
            ValueError: as `hold_out_fifth` and `draw_scenes`; where there are fewer scenes than parts.
        """
        generator = random.Random(f"scenes/{seed}")
        rows, validation = self.hold_out(seed, draw, generator)
        if draw.pool is not None:
            rows = part_of(rows, draw.pool, "pool", self.files)
        if labels is not None:
            rows = draw_scenes(self.scenes, rows, labels, self.values, generator)
        if draw.fold is not None:
            validation = part_of(rows, draw.fold, f"folds/{seed}", self.files)
            rows = sorted(set(rows) - set(validation))
        return ChosenScenes(rows, validation)


def rows_by_file(rows: Sequence[int], files: Sequence[int] | None) -> dict[int, list[int]]:
    """Rows that stay together: those of one file, or each alone.

    Args:
        files: of each row; None where each is a file.
    """
    together: dict[int, list[int]] = {}
    for row in rows:
        together.setdefault(row if files is None else files[row], []).append(row)
    return together


def part_of(rows: Sequence[int], part: tuple[int, int], name: str, files: Sequence[int] | None = None) -> list[int]:
    """One of the even parts into which rows, or their files, are divided at random.

    Args:
        part: (part, number of parts).
        name: of the random order.
        files: as of `rows_by_file`.

    Raises:
        ValueError: where there are fewer rows, or files, than parts.
    """
    (number, count), together = part, rows_by_file(rows, files)
    if len(together) < count:
        pages = "" if files is None else f", pages of {counted(len(together), 'file')},"
        raise ValueError(
            f"{counted(len(rows), 'labeled scene')}{pages} cannot be divided into {count} parts: give fewer parts, "
            "or more scenes"
        )
    order = random.Random(name).sample(list(together), len(together))
    return sorted(row for key in order[number::count] for row in together[key])


def hold_out_fifth(
    rows: list[int], generator: random.Random, path: str, files: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Rows to train on and to validate with: of pages of files, whole files.

    Args:
        files: as of `rows_by_file`.

    Raises:
        ValueError: for a single row, or file.
    """
    together = rows_by_file(rows, files)
    if len(together) < 2:
        pages, least = (", pages of 1 file, which resemble one another", "2 files") if len(rows) > 1 else ("", "2")
        raise ValueError(
            f"{path!r} has {counted(len(rows), 'scene')}{pages}: give at least {least}, one to train on and one to validate "
            "with"
        )
    drawn = generator.sample(list(together), max(1, len(together) // 5))
    held_out = sorted(row for key in drawn for row in together[key])
    return sorted(set(rows) - set(held_out)), held_out


def draw_scenes(
    scenes: Sequence[SceneStatistics], rows: Sequence[int], labels: int, values: Sequence[int], generator: random.Random
) -> list[int]:
    """`labels` of `rows`: first, for each class without a scene yet, the rarest class first, one that has it; then any.

    Args:
        values: of the classes.

    Raises:
        ValueError: if there are not as many, they are too few to have every class among them, or a class is in none.
    """
    if not 1 <= labels <= len(rows):
        raise ValueError(
            f"{counted(labels, 'labeled scene')} asked for, there are {len(rows)} to train on: give 1 to {len(rows)}"
        )
    order = list(rows)
    generator.shuffle(order)
    rows_with = {value: [row for row in order if value in scenes[row].counts] for value in values}
    chosen: list[int] = []
    for value in sorted(values, key=lambda value: (len(rows_with[value]), value)):
        if not rows_with[value]:
            raise ValueError(
                f"{counted(labels, 'labeled scene')} asked for, and a class is in none of the {len(rows)}: give more scenes"
            )
        if not any(value in scenes[row].counts for row in chosen):
            chosen.append(rows_with[value][0])
    if len(chosen) > labels:
        raise ValueError(
            f"{counted(labels, 'labeled scene')} asked for, too few to have all {len(rows_with)} classes: give "
            f"{len(chosen)} or more"
        )
    drawn = set(chosen)
    others = [row for row in order if row not in drawn]
    return sorted(chosen + others[: labels - len(chosen)])
