"""Settings of a study: what is varied over the runs of a task; those of a study of classification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from simmim.finetune.classification.settings import ClassificationSettings
from simmim.messages import did_you_mean

ALL = "all"
DEFAULT = "default"  # among layer decays
PLAIN, SEMI = "plain", "semi"
ARMS = (PLAIN, SEMI)
# A study may grow. Each trial knows what it was computed with.
MAY_GROW = ("labels", "seeds", "against", "processes", "keep_weights")
PRETRAINED, SCRATCH = "pre-trained", "from scratch"  # names of starts


@dataclass(frozen=True, kw_only=True)
class StudyFields:
    """What a study varies over the runs of a task, whatever the task.

    A study's settings are a dataclass of the task's settings and of this, with `task` and `labels` of its own; it calls
    `check_study` when it is made.

    Args:
        labels: numbers of labels, separated by commas; all is every training image.
        seeds: trials of each arm per number of labels. A seed determines labels, initial weights and order, for all arms
            alike.
        against: further encoders to compare with, paths separated by commas.
        scratch: compare with the same architecture from scratch.
        arms: how each of these is fine-tuned, separated by commas: plain, on the labels alone.
        lr_factors: factors of optim.lr that every arm tries at every number of labels, by cross-validation on the labels
            alone. A single one tunes nothing.
        layer_decays: layer decays tried together with each of them; default is that of optim, or of a run with this number
            of labels. By default that and 1, as a decay that suits pre-trained weights hardly trains the first layers of an
            encoder from scratch. Twice as many runs tune as with an empty list, which tunes the learning rate alone.
        folds: number of parts of the cross-validation; fewer where there are fewer labels.
        tuning_seeds: choices of labels that are cross-validated; the best rates over all serve every seed.
        processes: trials at a time; by default one per core for nano and micro on a CPU, else one.
        keep_weights: keep checkpoints and encoder of every trial, not its curves alone.
    """

    run_class: ClassVar[type]  # settings of a single run
    known_arms: ClassVar[tuple[str, ...]] = (PLAIN,)
    tune_arms: ClassVar[bool] = False  # these two are settings of some tasks
    disjoint: ClassVar[bool] = False

    labels: str | int | tuple[Any, ...] = (20, 100)
    seeds: int = 5
    against: str | tuple[str, ...] = ()
    scratch: bool = True
    arms: str | tuple[str, ...] = ()
    lr_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    layer_decays: tuple[float | str, ...] = (DEFAULT, 1.0)
    folds: int = 3
    tuning_seeds: int = 1
    processes: int | None = None
    keep_weights: bool = False

    def check_study(self) -> None:
        """Take lists apart, and refuse what cannot work.

        Raises:
            ValueError: naming the setting.
        """
        if self.init == "none":  # type: ignore[attr-defined]
            raise ValueError("a study compares an encoder with others: give it by init")
        if self.data.fold is not None:  # type: ignore[attr-defined]
            raise ValueError("data.fold is set by the study: give the number of parts of its cross-validation by folds")
        if self.task != type(self).task:  # type: ignore[attr-defined]
            raise ValueError(f"task is {self.task!r} in the settings of a study of {type(self).task}")  # type: ignore[attr-defined]
        labels = str(self.labels).split(",") if isinstance(self.labels, str | int) else self.labels
        parsed = tuple(parse_labels(value) for value in labels)
        object.__setattr__(self, "labels", parsed)
        against = self.against.split(",") if isinstance(self.against, str) else self.against
        object.__setattr__(self, "against", tuple(path.strip() for path in against if path.strip()))
        given = self.arms.split(",") if isinstance(self.arms, str) else self.arms
        object.__setattr__(self, "arms", tuple(dict.fromkeys(name.strip() for name in given if name.strip())))
        self.check_arms()
        for name in ("lr_factors", "layer_decays"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not parsed or len(set(parsed)) < len(parsed):
            raise ValueError(f"labels are {self.labels}: give different numbers, 1,5,20 for instance")
        if not self.lr_factors or min(self.lr_factors) <= 0:
            raise ValueError(f"lr_factors are {self.lr_factors}: give positive factors of optim.lr; 1 alone tunes nothing")
        if any(decay != DEFAULT and (isinstance(decay, str) or not 0 < decay <= 1) for decay in self.layer_decays):
            raise ValueError(f"layer_decays are {self.layer_decays}: give factors in (0, 1], or {DEFAULT}")
        if not self.scratch and not self.against:
            raise ValueError("there is nothing to compare with: leave scratch true, or give an encoder by against")
        for name, least in (("seeds", 2), ("folds", 2), ("tuning_seeds", 1), ("processes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: give {least} or more")

    def check_arms(self) -> None:
        """Refuse arms that the task has not.

        Raises:
            ValueError: naming the arm, and those that there are.
        """
        for name in self.arms:
            if name in ARMS and name not in self.known_arms:
                raise ValueError(
                    f"{type(self).task} has no arm {name!r}: it learns from labels alone, leave arms out"  # type: ignore[attr-defined]
                )
            if name not in self.known_arms:
                raise ValueError(f"unknown arm {name!r}{did_you_mean(name, self.known_arms)}")

    @property
    def recipes(self) -> tuple[str, ...]:
        """The arms, resolved, in the order of the report."""
        return (PLAIN,)

    @property
    def all_seeds(self) -> range:
        """The seeds of the judged runs."""
        return range(self.seed, self.seed + self.seeds)  # type: ignore[attr-defined]

    @property
    def divided_seeds(self) -> range:
        """The seeds whose labels are divided to choose rates; none where there is a single rate."""
        chooses = len(set(self.lr_factors)) * max(1, len(set(self.layer_decays))) > 1
        return self.all_seeds[: self.tuning_seeds if chooses else 0]

    def recipe_settings(self, recipe: str) -> Any:
        """Settings of one run that starts from `init`, by the name of an arm."""
        return self.run_settings()

    def run_settings(self) -> Any:
        """Settings of one run that starts from `init`, of the task's class."""
        names = [field.name for field in fields(self.run_class) if field.name != "labels"]  # of which a run has one number
        return self.run_class(**{name: getattr(self, name) for name in names})

    def start_names(self) -> dict[str, str]:
        """Encoder by start: "pre-trained", and the others by the names of their folders, numbered where two are equal."""
        names = {PRETRAINED: self.init}  # type: ignore[attr-defined]
        for path in self.against:
            name, number = Path(path).name, 2
            while name in taken(names) or f"{name} {SEMI}" in names:
                name, number = f"{Path(path).name} {number}", number + 1
            names[name] = path
        return names


@dataclass(frozen=True, kw_only=True)
class SemiStudyFields(StudyFields):
    """What a study of a task varies that learns from unlabeled images too: its settings have data.unlabeled and
    self_training.

    Args:
        arms: how each start is fine-tuned, separated by commas: plain, on the labels alone; semi, with the images of
            data.unlabeled too (see self_training). By default plain, and both where data.unlabeled gives images.
        semi_steps: length of the runs with unlabeled images in optimizer steps; by default steps or epochs where one is
            given, else what finetune takes with unlabeled images.
        tune_arms: choose rates for semi by runs of its own. By default, as these are long, semi takes the rates that the
            same encoder has chosen without unlabeled images.
    """

    may_change_on_resume: ClassVar[tuple[str, ...]] = (
        *MAY_GROW,
        "arms",
        "data.unlabeled",
        "data.unlabeled_column",
        "self_training",
        "semi_steps",
        "tune_arms",
    )
    known_arms: ClassVar[tuple[str, ...]] = ARMS

    semi_steps: int | None = None
    tune_arms: bool = False  # type: ignore[misc]

    @property
    def unlabeled(self) -> str | None:
        """The source of the unlabeled images."""
        return self.data.unlabeled  # type: ignore[attr-defined]

    def check_study(self) -> None:
        """As of `StudyFields`.

        Raises:
            ValueError: naming the setting.
        """
        super().check_study()
        if self.semi_steps is not None and self.semi_steps < 1:
            raise ValueError(f"semi_steps is {self.semi_steps}: give 1 or more")

    def check_arms(self) -> None:
        """Refuse arms that are unknown or lack what they need.

        Raises:
            ValueError: for an unknown arm, unlabeled images without an arm for them, and the other way round.
        """
        super().check_arms()
        arms = self.arms
        if SEMI in arms and self.unlabeled is None:
            raise ValueError(f"arms are {','.join(arms)}: {SEMI} learns from unlabeled images, give them by data.unlabeled")
        if arms and SEMI not in arms and self.unlabeled is not None:
            raise ValueError(f"data.unlabeled is given and no arm learns from it: add {SEMI} to arms, or leave it out")
        if self.unlabeled is None and (self.semi_steps is not None or self.tune_arms):
            raise ValueError("semi_steps and tune_arms are about unlabeled images: give them by data.unlabeled")

    @property
    def recipes(self) -> tuple[str, ...]:
        """The arms, resolved, in the order of the report."""
        default = (PLAIN,) if self.unlabeled is None else ARMS
        return tuple(name for name in ARMS if name in (self.arms or default))

    def recipe_settings(self, recipe: str) -> Any:
        """Settings of one run that starts from `init`, with or without unlabeled images."""
        run = self.run_settings()
        if recipe == PLAIN:
            data = replace(run.data, unlabeled=None, unlabeled_column=None)
            return replace(run, data=data, self_training=type(run.self_training)())
        return run if self.semi_steps is None else replace(run, epochs=None, steps=self.semi_steps)


@dataclass(frozen=True, kw_only=True)
class StudySettings(ClassificationSettings, SemiStudyFields):
    """Accuracy against labels per class: pre-trained, from scratch and other encoders, several seeds each.

    Args:
        task: what is learned: classification, segmentation, detection.
        labels: numbers of labels per class, separated by commas; all is every training image.
    """

    may_change_on_resume: ClassVar[tuple[str, ...]] = SemiStudyFields.may_change_on_resume
    run_class: ClassVar[type] = ClassificationSettings

    task: str = "classification"  # type: ignore[misc]
    labels: str | int | tuple[Any, ...] = (1, 2, 5, 10, 20, 50)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_study()
        if self.labels_per_class is not None:
            raise ValueError("labels_per_class is a setting of a single run: give a study's numbers by labels, as in 1,5,20")


def count_parts(folds: int, value: int | str, per_class: float) -> int:
    """Parts that labels are divided into to choose rates; 1 where they cannot be divided.

    Args:
        value: number of labels that was asked for, or "all".
        per_class: mean number of labels.
    """
    # Of a class with fewer labels some parts have none; the number asked for is what the largest classes have.
    return min(folds, int(per_class if value == ALL else value))


def taken(starts: Iterable[str]) -> set[str]:
    """Names that no further start may have: those of the arms that there are."""
    starts = (*starts, SCRATCH)
    return {*starts, *(f"{start} {SEMI}" for start in starts)}


def parse_labels(value: Any) -> int | str:
    """A number of labels per class, or "all".

    Raises:
        ValueError: for anything else.
    """
    text = str(value).strip()
    if text != ALL and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"labels per class {text!r} is not a number from 1 on: give numbers or {ALL}, 1,5,20,{ALL}")
    return ALL if text == ALL else int(text)
