"""The unlabeled images of a study: what every run leaves out, said once, and numbers of labels that leave none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.finetune.label_study.settings import ALL, SEMI, SemiStudyFields
from simmim.finetune.self_training.unlabeled import Labels, UnlabeledImages, file_digests, open_unlabeled
from simmim.messages import counted
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

Draw = Callable[[int | str, int], Labels]


@dataclass(frozen=True)
class FoundUnlabeled:
    """The unlabeled images of a study.

    Attributes:
        unlabeled: of the first run.
        unit: what a number of labels counts.
        used_up: numbers of labels at which a run would have no unlabeled image left, since all are labeled ones.
    """

    unlabeled: UnlabeledImages
    unit: str
    used_up: tuple[int | str, ...] = ()

    def notes(self, settings: SemiStudyFields) -> tuple[str, ...]:
        """What the report says of the arms with unlabeled images."""
        name = Path(settings.unlabeled or "").name
        notes = [f"Arms named {SEMI} learn from the unlabeled images in {name} too."]
        if not settings.tune_arms:
            notes.append(
                "They take the rates that the same start has chosen without these (tune_arms: true gives them own)."
            )
        if self.used_up:
            numbers = f"{', '.join(map(str, self.used_up))} {self.unit}"
            notes.append(f"With {numbers} none of these images is unlabeled.")
        return tuple(notes)


def find_unlabeled(
    settings: SemiStudyFields, labels: Mapping[int | str, float], draw: Draw, reading: Reading, unit: str
) -> FoundUnlabeled:
    """Open the unlabeled images; prints what all runs leave out, and numbers of labels at which the arm is left out.

    Args:
        labels: as of `StudyResult`, in ascending order.
        draw: what a run with a number of labels, or "all", and a seed learns from, and what judges it.
        reading: how values become pictures, as for the labeled images.
        unit: what a number of labels counts.

    Raises:
        ValueError: as `open_unlabeled`; where no number of labels leaves unlabeled images.
    """
    path = settings.unlabeled
    assert path is not None
    first: int = settings.seed  # type: ignore[attr-defined]
    column = settings.data.unlabeled_column  # type: ignore[attr-defined]
    unlabeled = open_unlabeled(path, draw(next(iter(labels)), first), draw(ALL, first), reading, column)
    total = len(unlabeled.images) + unlabeled.num_labeled + unlabeled.num_judging
    judging = f"{unlabeled.num_judging:,} of them judge and are left out" if unlabeled.num_judging else "none of them judges"
    print(f"unlabeled  {counted(total, 'image')}; {judging}; each run also leaves out those whose labels it learns from")
    used_up = numbers_that_leave_none(settings, unlabeled.digests, labels, draw)
    if used_up:
        numbers = f"{', '.join(map(str, used_up))} {unit}"
        print(f"left out   {SEMI} with {numbers}: all unlabeled images are labeled ones")
    if len(used_up) == len(labels):
        raise ValueError(
            f"data.unlabeled: all {counted(total, 'image')} of {path!r} are labeled or judge: give others, or fewer labels"
        )
    return FoundUnlabeled(unlabeled, unit, used_up)


def numbers_that_leave_none(
    settings: SemiStudyFields, digests: Collection[bytes], labels: Mapping[int | str, float], draw: Draw
) -> tuple[int | str, ...]:
    """The numbers of labels at which all unlabeled images are labeled ones in the run of some seed.

    Args:
        digests: of the unlabeled images, whichever are labeled in some run.
        labels, draw: as of `find_unlabeled`.
    """

    def all_in(train: datasets.Dataset) -> bool:
        return len(train) >= len(digests) and set(file_digests(train)).issuperset(digests)

    first: int = settings.seed  # type: ignore[attr-defined]
    # All training images are read once, not those of each draw; seeds that share none have no draw of all.
    if not settings.disjoint and not all_in(draw(ALL, first).train):
        return ()
    return tuple(value for value in labels if any(all_in(draw(value, seed).train) for seed in settings.all_seeds))
