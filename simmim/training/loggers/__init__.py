"""Where numbers and pictures of a run go besides the screen: TensorBoard and metrics.csv always, services when asked.

A new service is a `Service` and a line in `SERVICES`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from simmim.messages import did_you_mean
from simmim.training.loggers.base import RunLogger, Session, log_picture
from simmim.training.loggers.describe import DescribeRun
from simmim.training.loggers.metrics_csv import MetricsCsv
from simmim.training.loggers.names import LossNames, Names
from simmim.training.loggers.services import MLflow, Service, Wandb
from simmim.training.loggers.tensorboard import TensorBoardPage

ALWAYS = ("tensorboard", "csv")
SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "mlflow": MLflow}

__all__ = [
    "ALWAYS",
    "SERVICES",
    "DescribeRun",
    "LossNames",
    "MetricsCsv",
    "Names",
    "RunLogger",
    "Service",
    "Session",
    "TensorBoardPage",
    "build_loggers",
    "log_picture",
]


def build_loggers(run: Path, names: Sequence[str] = (), loss: LossNames | None = None) -> list[RunLogger]:
    """TensorBoard and metrics.csv in the run folder, and the services that are asked for. Nothing is written yet.

    Args:
        names: of services; tensorboard and csv may be named and come anyway.
        loss: how the module's loss is shown; by default as training.

    Raises:
        ValueError: for an unknown name, naming the nearest, and for a service that is not installed.
    """
    known = (*ALWAYS, *SERVICES)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown logger {name!r}{did_you_mean(name, known)}")
        if name in SERVICES:
            spec = importlib.util.find_spec(SERVICES[name].key)
            # A folder of that name, as wandb leaves one where it ran, looks like a package without an origin.
            if spec is None or spec.origin is None:
                raise ValueError(f"logger {name!r} is not installed: pip install {name}")
    metric_names = Names(loss or LossNames())
    services = [service(run, metric_names) for name, service in SERVICES.items() if name in names]
    return [TensorBoardPage(run, metric_names), MetricsCsv(run / "metrics.csv"), *services]
