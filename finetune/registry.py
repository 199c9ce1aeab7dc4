"""Labeled tasks by name. The only file that knows concrete tasks; each is imported when it is first asked for.

A new task is a folder with a `settings.py` and a `task.py`, and a line in `TASKS`; with a `study.py` it can be studied too.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simmim.messages import did_you_mean

if TYPE_CHECKING:
    from simmim.finetune.label_study.task_study import TaskStudy
    from simmim.finetune.settings import TransferSettings
    from simmim.finetune.task import Task


class TaskEntry(NamedTuple):
    """Where a task is defined.

    Attributes:
        package: its modules `settings` and `task` define the two classes.
        settings: name of the settings class, a subclass of `TransferSettings`.
        task: name of the `Task`.
    """

    package: str
    settings: str
    task: str


TASKS = {
    "classification": TaskEntry("simmim.finetune.classification", "ClassificationSettings", "Classification"),
    "segmentation": TaskEntry("simmim.finetune.segmentation", "SegmentationSettings", "Segmentation"),
    "detection": TaskEntry("simmim.finetune.detection", "DetectionSettings", "Detection"),
}


def settings_class(name: str) -> type[TransferSettings]:
    """The settings class of a task. Imports no training library.

    Raises:
        ValueError: for an unknown task, naming the nearest known one.
    """
    entry = task_entry(name)
    return getattr(import_module(f"{entry.package}.settings"), entry.settings)


def study_of(name: str) -> TaskStudy:
    """The study of a task, from the module `study` of its package.

    Raises:
        ValueError: as `settings_class`; for a task without a study.
    """
    home = f"{task_entry(name).package}.study"
    try:
        return import_module(home).STUDY
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise ValueError(f"{name} has no study: its folder has no study.py") from None


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: as `settings_class`.
    """
    entry = task_entry(name)
    return getattr(import_module(f"{entry.package}.task"), entry.task)()


def task_of_model(path: str | Path) -> Task:
    """The task whose model is at `path`: the one that recognizes it, else the first, which explains what is missing."""
    tasks = [task_named(name) for name in TASKS]
    return next((task for task in tasks if task.recognizes(path)), tasks[0])


def task_entry(name: str) -> TaskEntry:
    """The row of `TASKS`.

    Raises:
        ValueError: as `settings_class`.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    return TASKS[name]
