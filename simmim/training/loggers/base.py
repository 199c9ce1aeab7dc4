"""The protocol between a run and its loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import yaml
from pytorch_lightning.loggers import Logger

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Session:
    """What loggers are told when training starts or resumes.

    Args:
        step: optimizer steps taken before, 0 in a new run.
        config: text of the run's config.yaml.
        environment: versions and devices, by name.
        monitor: validation metric by which the best model is chosen; None where there are no validation images.
    """

    step: int
    config: str
    environment: Mapping[str, str]
    monitor: str | None

    def settings(self) -> dict[str, bool | int | float | str]:
        """The configuration, flat, by dotted keys."""
        return flatten(yaml.safe_load(self.config) or {})


class RunLogger(Logger):
    """A logger that may show more than metrics. By default it ignores what it cannot show."""

    def describe(self, session: Session) -> None:
        """Show what the run is. Whatever is logged from now on belongs to `session.step` and later steps."""

    def log_picture(self, name: str, picture: Image.Image, step: int, caption: str) -> None:
        """Show a picture beside those of other steps."""

    def log_per_block(self, scalars: Mapping[str, float], step: int) -> None:
        """Show some scalars of each block of the encoder, by grouped names. They are too many for a table or a service."""


def log_picture(loggers: Iterable[Logger], name: str, picture: Image.Image, step: int, caption: str) -> None:
    """Show a picture in all loggers that can.

    Args:
        step: counted from 0, as of scalars.
        caption: what the picture holds, its columns for instance.
    """
    for logger in cast(Iterable[RunLogger], loggers):
        logger.log_picture(name, picture, step, caption)


def flatten(values: Mapping, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings by dotted keys; lists as text, None as none."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat
