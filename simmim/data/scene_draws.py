"""Which labeled scenes train and which validate, drawn by seeds: for label maps and boxes alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from simmim.data.label_map_files import SceneStatistics


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
    """

    path: str
    scenes: Sequence[SceneStatistics] = field(repr=False)
    values: tuple[int, ...]
    has_validation: bool

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
        return ChosenScenes(*hold_out_fifth(rows, generator or random.Random(f"scenes/{seed}"), self.path))

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
            rows = part_of(rows, draw.pool, "pool")
        if labels is not None:
            rows = draw_scenes(self.scenes, rows, labels, self.values, generator)
        if draw.fold is not None:
            validation = part_of(rows, draw.fold, f"folds/{seed}")
            rows = sorted(set(rows) - set(validation))
        return ChosenScenes(rows, validation)


def part_of(rows: Sequence[int], part: tuple[int, int], name: str) -> list[int]:
    """One of the even parts into which rows are divided at random.

    Args:
        part: (part, number of parts).
        name: of the random order.

    Raises:
        ValueError: where there are fewer rows than parts.
    """
    number, count = part
    if len(rows) < count:
        raise ValueError(
            f"{len(rows)} labeled scenes cannot be divided into {count} parts: give fewer parts, or more scenes"
        )
    return sorted(random.Random(name).sample(list(rows), len(rows))[number::count])


def hold_out_fifth(rows: list[int], generator: random.Random, path: str) -> tuple[list[int], list[int]]:
    """Rows to train on and to validate with.

    Raises:
        ValueError: for a single row.
    """
    if len(rows) < 2:
        raise ValueError(f"{path!r} has 1 scene: give at least 2, one to train on and one to validate with")
    held_out = sorted(generator.sample(rows, max(1, len(rows) // 5)))
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
        raise ValueError(f"{labels} labeled scenes asked for, there are {len(rows)} to train on: give 1 to {len(rows)}")
    order = list(rows)
    generator.shuffle(order)
    rows_with = {value: [row for row in order if value in scenes[row].counts] for value in values}
    chosen: list[int] = []
    for value in sorted(values, key=lambda value: (len(rows_with[value]), value)):
        if not rows_with[value]:
            raise ValueError(
                f"{labels} labeled scenes asked for, and a class is in none of the {len(rows)}: give more scenes"
            )
        if not any(value in scenes[row].counts for row in chosen):
            chosen.append(rows_with[value][0])
    if len(chosen) > labels:
        raise ValueError(
            f"{labels} labeled scenes asked for, too few to have all {len(rows_with)} classes: give {len(chosen)} or more"
        )
    others = [row for row in order if row not in set(chosen)]
    return sorted(chosen + others[: labels - len(chosen)])
