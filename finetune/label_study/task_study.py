"""What a task contributes to a study: its settings, its score, and which numbers of labels there are.

A task with a study has a module `study` whose `STUDY` is a `TaskStudy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simmim.finetune.label_study.results import Measure
from simmim.finetune.start import Start
from simmim.messages import counted

if TYPE_CHECKING:
    import datasets

    from simmim.finetune.label_study.arms import Arm


@dataclass(frozen=True)
class OpenedLabels:
    """The labels of a study.

    Attributes:
        train, validation: all training images, and those that judge; column `image`, undecoded.
        labels: mean number of labels by the number that was asked for, in ascending order: those that there are.
        validation_seed: of the fifth that is held out once for all trials; None where the source has a validation part.
        test_validates: whether the images that judge are a part that is called test.
        used_up: numbers of labels that leave no unlabeled image.
        notes: what the report says beside the numbers, a sentence each.
        own: what the task wants to know of them later.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    labels: Mapping[int | str, float]
    validation_seed: int | None
    test_validates: bool = False
    used_up: tuple[int | str, ...] = ()
    notes: tuple[str, ...] = ()
    own: Any = None

    @property
    def judged_by(self) -> str:
        """Which images judge."""
        part = f"of the {'test' if self.test_validates else 'validation'} part"
        origin = part if self.validation_seed is None else f"that seed {self.validation_seed} holds out once"
        return f"{counted(len(self.validation), 'image')} {origin}"


def no_check(arm: Arm, start: Start, opened: OpenedLabels, device: str) -> None:
    """Nothing to check."""


@dataclass(frozen=True)
class TaskStudy:
    """The study of one task.

    Attributes:
        settings: a dataclass of `StudyFields` and the settings of the task.
        measure: what is measured.
        default_layer_decay: of a run with a number of labels.
        open_labels: reads the labels of a study's settings, and prints which numbers are left out. Raises ValueError where
            they cannot be read, or none is left.
        check_start: of an arm, where its runs start, the labels, and the device: raises ValueError where a run could not
            start, and notifies of what runs lack, as they are silent.
        measure_of: settings to what is measured, where that depends on them; else `measure`.
    """

    settings: type
    measure: Measure
    default_layer_decay: Callable[[float], float]
    open_labels: Callable[[Any], OpenedLabels]
    check_start: Callable[[Arm, Start, OpenedLabels, str], None] = no_check
    measure_of: Callable[[Any], Measure] | None = None


def validation_seed_of(settings: Any, has_validation: bool) -> int | None:
    """The seed of the fifth that is held out once for all trials; None where the source has a validation part.

    Args:
        settings: of a study.
    """
    if has_validation:
        return None
    given = settings.data.validation_seed
    return settings.seed if given is None else given
