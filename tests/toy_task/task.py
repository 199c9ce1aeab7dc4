"""A toy task: classification by top-5 accuracy, under another loss name. An example for a new task.

`registry.TASKS["toy"] = TaskEntry("toy_task", "ToySettings", "ToyTask")` registers it.
"""

from __future__ import annotations

from dataclasses import replace

from simmim.finetune.classification.task import Classification
from simmim.finetune.task import PreparedTask, ReportLine, Task
from simmim.training.loggers.names import LossNames
from toy_task.settings import ToySettings


class ToyTask(Task):
    """One class per image; the five most likely classes are considered."""

    def prepare(self, settings: ToySettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
        prepared = Classification().prepare(settings, device, report_line)
        return replace(
            prepared,
            monitor="top5_accuracy",
            loss=LossNames("toy_loss", "as cross entropy"),
            validation_batch_size=7,
            closing_text=lambda run: f"{settings.greeting}\n",
        )
