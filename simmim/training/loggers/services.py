"""Services that a run logs to when they are asked for: Weights & Biases and MLflow.

Nothing leaves the machine unless a service is asked for by name. Then the run goes there, and no statistics about the user:
see `Service.environment`.
"""

from __future__ import annotations

import os
import uuid
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from simmim.messages import first_line
from simmim.training.loggers.base import RunLogger, Session
from simmim.training.loggers.names import Names

if TYPE_CHECKING:
    from PIL import Image


class Service(RunLogger):
    """A service through Lightning's logger, with grouped names.

    It is opened when training starts, when the run folder exists. A resumed run goes on in the entry whose id is in
    RUN/NAME.id. No service removes anything: what a killed run logged beyond its checkpoint stays there.

    Attributes:
        key: name of the service and of its Python package.
        environment: variables that are set before its package is imported, unless the user has set them. Both packages
            report on their users by default, to their makers and wherever the run goes.
        hint: tail of the message where it cannot be opened.
    """

    key: ClassVar[str]
    environment: ClassVar[Mapping[str, str]] = {}
    hint: ClassVar[str] = ""

    def __init__(self, run: Path, names: Names) -> None:
        super().__init__()
        self.run, self.names = run, names
        self.logger: Logger | None = None

    @property
    def name(self) -> str:
        return self.key

    @property
    def version(self) -> str:
        return ""

    @abstractmethod
    def open_logger(self, entry_id: str | None) -> Logger:
        """Lightning's logger, with its entry made; its `version` is the entry's id.

        Args:
            entry_id: of a run that is resumed.
        """

    def open(self) -> Logger:
        """Lightning's logger, which the first call makes: only a run that trains imports the package and makes folders.

        Raises:
            ValueError: when the service cannot be opened, in one line.
        """
        if self.logger is None:
            for variable, value in self.environment.items():
                os.environ.setdefault(variable, value)
            file = self.run / f"{self.key}.id"
            known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
            try:
                logger = self.open_logger(known)
                entry_id = logger.version  # of MLflow, this makes the entry
            except Exception as error:
                raise ValueError(f"logger {self.key!r} cannot be opened: {first_line(error)}{self.hint}") from error
            self.logger = logger
            file.write_text(f"{entry_id}\n", encoding="utf-8")
        return self.logger

    @rank_zero_only
    def describe(self, session: Session) -> None:
        """Log the settings, by dotted keys."""
        self.open().log_hyperparams(session.settings())

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Do nothing: `describe` logs them all."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics by grouped names."""
        self.open().log_metrics(self.names.grouped(metrics), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Tell the service how the run ended."""
        if self.logger is not None:
            self.logger.finalize(status)


class Wandb(Service):
    """Weights & Biases: an entry in project simmim or $WANDB_PROJECT. WANDB_MODE=offline keeps it in RUN/wandb for
    `wandb sync`."""

    key = "wandb"
    environment: ClassVar = {"WANDB_ERROR_REPORTING": "false"}
    hint = "; WANDB_MODE=offline keeps all in the run folder"
    own_entries: ClassVar[set[str]] = set()  # ids of the entries that this process has opened

    def open_logger(self, entry_id: str | None) -> Logger:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        # A process has one entry open at a time, and Lightning goes on writing into it: right for one that the user opened,
        # wrong for that of the run before.
        if wandb.run is not None and wandb.run.id in self.own_entries:
            wandb.finish()
        entry_id = entry_id or uuid.uuid4().hex[:8]
        self.own_entries.add(entry_id)
        project = os.environ.get("WANDB_PROJECT", "simmim")
        logger = WandbLogger(name=self.run.name, save_dir=str(self.run), version=entry_id, project=project, log_model=False)
        _ = logger.experiment  # opens the entry, so that errors are raised here
        return logger

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, step: int, caption: str) -> None:
        """Show a picture in a panel."""
        self.open().log_image(name, [picture], step=step, caption=[caption])  # type: ignore[attr-defined]


class MLflow(Service):
    """MLflow: a run of experiment simmim or $MLFLOW_EXPERIMENT_NAME, at $MLFLOW_TRACKING_URI or else in a database in
    RUN/mlflow."""

    key = "mlflow"
    environment: ClassVar = {"MLFLOW_DISABLE_TELEMETRY": "true"}

    def open_logger(self, entry_id: str | None) -> Logger:
        from pytorch_lightning.loggers import MLFlowLogger

        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            # Of the two kinds of local store this is the one that MLflow still opens without being told to.
            folder = self.run.absolute() / "mlflow"
            folder.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{folder.as_posix()}/mlflow.db", (folder / "artifacts").as_uri()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "simmim")
        return MLFlowLogger(experiment, self.run.name, uri, artifact_location=artifacts, run_id=entry_id)

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, step: int, caption: str) -> None:
        """Keep a picture as one file per step."""
        logger = self.open()
        logger.experiment.log_image(logger.run_id, picture, artifact_file=f"{name}/step-{step:07d}.png")  # type: ignore[attr-defined]
