"""The unlabeled images of a study: what every run leaves out, said once, and numbers of labels that leave none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simmim.data import LabeledSource
from simmim.finetune.classification.self_training.unlabeled import UnlabeledImages, file_digests, open_unlabeled
from simmim.finetune.label_study.settings import ALL, PLAIN, SEMI, StudySettings
from simmim.reading import Reading


@dataclass(frozen=True)
class FoundUnlabeled:
    """The unlabeled images of a study.

    Attributes:
        unlabeled: of the first run.
        used_up: numbers of labels at which a run would have no unlabeled image left, since all are labeled ones.
    """

    unlabeled: UnlabeledImages
    used_up: tuple[int | str, ...] = ()

    def notes(self, settings: StudySettings) -> tuple[str, ...]:
        """What the report says of the arms with unlabeled images."""
        name = Path(settings.data.unlabeled or "").name
        notes = [f"Arms named {SEMI} learn from the unlabeled images in {name} too."]
        if not settings.tune_arms:
            notes.append(
                "They take the rates that the same start has chosen without these (tune_arms: true gives them own)."
            )
        if self.used_up:
            notes.append(f"With {', '.join(map(str, self.used_up))} labels per class none of these images is unlabeled.")
        return tuple(notes)


def find_unlabeled(
    settings: StudySettings,
    source: LabeledSource,
    labels: dict[int | str, float],
    validation_seed: int | None,
    reading: Reading,
) -> FoundUnlabeled:
    """Open the unlabeled images; prints what all runs leave out, and numbers of labels at which the arm is left out.

    Args:
        source: the labeled images.
        labels: as of `StudyResult`, in ascending order.
        validation_seed: as of `LabeledSource.draw`.
        reading: how values become pictures, as for the labeled images.

    Raises:
        ValueError: as `open_unlabeled`; where no number of labels leaves unlabeled images and there is no other arm.
    """
    path, seeds = settings.data.unlabeled, range(settings.seed, settings.seed + settings.seeds)
    assert path is not None
    fewest = source.draw(per_class_of(next(iter(labels))), settings.seed, validation_seed)
    everything = source.draw(None, settings.seed, validation_seed)
    unlabeled = open_unlabeled(path, fewest, everything, reading, settings.data.unlabeled_column)
    total = len(unlabeled.images) + unlabeled.num_labeled + unlabeled.num_judging
    judging = f"{unlabeled.num_judging:,} of them judge and are left out" if unlabeled.num_judging else "none of them judges"
    print(f"unlabeled  {total:,} images; {judging}; each run also leaves out those whose labels it learns from")
    used_up = tuple(value for value in labels if leaves_none(unlabeled, source, value, seeds, validation_seed))
    if used_up:
        print(
            f"left out   {SEMI} with {', '.join(map(str, used_up))} labels per class: all unlabeled images are labeled ones"
        )
    if len(used_up) == len(labels) and PLAIN not in settings.recipes:
        raise ValueError(
            f"data.unlabeled: all {total:,} images of {path!r} are labeled or judge: give others, or fewer labels"
        )
    return FoundUnlabeled(unlabeled, used_up)


def leaves_none(
    unlabeled: UnlabeledImages, source: LabeledSource, labels: int | str, seeds: range, validation_seed: int | None
) -> bool:
    """Whether all unlabeled images are labeled ones in the run of some seed."""
    for seed in seeds:
        train = source.draw(per_class_of(labels), seed, validation_seed).train
        if len(train) < len(unlabeled.images):
            return False  # some are left, whichever are labeled
        if set(file_digests(unlabeled.images)) <= set(file_digests(train)):
            return True
    return False


def per_class_of(labels: int | str) -> int | None:
    """A number of labels as `LabeledSource.draw` takes it."""
    return None if labels == ALL else int(labels)
