"""Settings of the toy task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simmim.finetune.classification.settings import ClassificationSettings


@dataclass(frozen=True, kw_only=True)
class ToySettings(ClassificationSettings):
    """One fine-tuning run of the toy task.

    Args:
        greeting: text that the run ends with.
    """

    task: ClassVar[str] = "toy"

    greeting: str = "well done"
