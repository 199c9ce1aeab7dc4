"""Where numbers and pictures go besides the screen: TensorBoard and metrics.csv always, Weights & Biases and MLflow when
asked.

Names are plain in metrics.csv (`loss`, `lr`) and grouped elsewhere (`loss/masked_l1`, `optimizer/learning_rate`): `Names`
holds the table. Nothing leaves the machine unless a service is asked for by name, and then what goes there is the run and
not statistics about the user: see `WITHOUT_TELEMETRY`.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from simmim.files import atomic_write
from simmim.messages import did_you_mean
from simmim.training.run_folder import CONFIG

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

ALWAYS, SERVICES = ("tensorboard", "csv"), ("wandb", "mlflow")
# Both libraries report on their users by default, to their makers and whatever store the run goes to. A user's own setting
# goes before.
WITHOUT_TELEMETRY = {"wandb": {"WANDB_ERROR_REPORTING": "false"}, "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"}}

# As the modules log it: as the page shows it, and what its description says.
GROUPED = {
    "lr": ("optimizer/learning_rate", "of the group that learns fastest, at the step's batch size"),
    "grad_norm": ("optimizer/gradient_norm", "L2 norm over all parameters, before clipping"),
    "images_per_s": ("speed/images_per_s", "over all devices, mean since the point before"),
    "data_wait_share": ("speed/data_wait_share", "share of the time that training waited for images, 0 to 1"),
    "accuracy": ("validation/accuracy", "share of the validation images, 0 to 1"),
    "top5_accuracy": ("validation/top5_accuracy", "share whose class is among the five most likely, 0 to 1"),
    "macro_f1": ("validation/macro_f1", "mean of the classes' F1, all classes alike, 0 to 1"),
    "mean_iou": ("validation/mean_iou", "intersection over union of given and predicted masks, mean of the classes, 0 to 1"),
    "pixel_accuracy": ("validation/pixel_accuracy", "share of the validation masks' pixels that count, 0 to 1"),
    "skipped_steps": ("stability/skipped_steps", "steps so far whose loss or gradient was not finite"),
    "loss_spikes": ("stability/loss_spikes", "steps so far whose loss jumped out of its past"),
    "probe_s": ("speed/probe_s", "seconds that the last look at labeled images took, which images_per_s leaves out"),
}
# Scalars that have their group already, one of many in it: what the group's are.
FAMILIES = {
    "iou": "intersection over union of the class's given and predicted pixels in the validation masks, 0 to 1",
    "knn": "share of labeled test images that their nearest labeled neighbors get right by these features, 0 to 1; chosen: "
    "the features that training labels alone would choose, pixels: the plain images",
    "probe": "share of labeled test images that logistic regression over these frozen features gets right, 0 to 1; chosen: "
    "the features that training labels alone would choose, pixels: the plain images",
}
# Added by Lightning to whatever is logged. Batches come from one endless stream, so it is always 0.
IGNORED_METRICS = ("epoch",)
# Settings that HParams shows at first, where it has room for five; others are a tick away.
FIRST_COLUMNS = ("batch_size", "epochs", "optim.lr", "model.mask_ratio", "preset", "labels_per_class", "freeze")
OWN_ENTRIES: set[str] = set()  # ids of what this process has opened in W&B


class LossNames(NamedTuple):
    """How loggers show the module's `loss`.

    Attributes:
        name: of the scalar inside its group, for example masked_l1.
        description: text beside the plot; empty for none.
    """

    name: str = "training"
    description: str = ""


def loggers_for(run: Path, wanted: Sequence[str] = (), loss: LossNames | None = None) -> list[RunLogger]:
    """TensorBoard and metrics.csv in `run`, and the services that are wanted. Nothing is written yet.

    Args:
        wanted: of wandb and mlflow; tensorboard and csv may be named and come anyway.
        loss: how the module's loss is shown; by default as training.

    Raises:
        ValueError: for a name that is not known, naming the nearest, and for a service that is not installed.
    """
    for name in wanted:
        if name not in ALWAYS + SERVICES:
            raise ValueError(f"unknown logger {name!r}{did_you_mean(name, ALWAYS + SERVICES)}")
        if name in SERVICES:
            spec = importlib.util.find_spec(name)
            # A folder of that name, as wandb leaves one where it ran, looks like a package without an origin.
            if spec is None or spec.origin is None:
                raise ValueError(f"logger {name!r} is not installed: pip install {name}")
    names = Names(loss or LossNames())
    services = [Service(name, run, names) for name in SERVICES if name in wanted]
    return [TensorBoardPage(run, names), MetricsCsv(run / "metrics.csv"), *services]


@dataclass(frozen=True)
class Names:
    """Plain names of scalars to grouped ones.

    Args:
        loss: what training minimizes.
    """

    loss: LossNames

    def __call__(self, name: str) -> str:
        """The grouped name; one that has a group already stays."""
        if name in GROUPED:
            return GROUPED[name][0]
        if name == "loss":
            return f"loss/{self.loss.name}"
        if name == "validation_loss":
            return f"validation/{self.loss.name}"
        return name if "/" in name else f"other/{name}"

    def description(self, name: str) -> str:
        """What stands beside the plot; empty for a scalar that is not in the tables."""
        if name in ("loss", "validation_loss"):
            return self.loss.description
        return GROUPED[name][1] if name in GROUPED else FAMILIES.get(name.partition("/")[0], "")

    def of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics by grouped names, without noise."""
        return {self(name): value for name, value in metrics.items() if name not in IGNORED_METRICS}


# --- What a run says of itself -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sitting:
    """What the loggers are told when training starts or goes on.

    Args:
        step: optimizer steps taken before, 0 in a new run.
        config: text of the run's config.yaml.
        environment: what the sitting runs on, by name.
        validates: whether there are validation images.
    """

    step: int
    config: str
    environment: Mapping[str, str]
    validates: bool

    def settings(self) -> dict[str, bool | int | float | str]:
        """The configuration flat, by dotted keys."""
        return flat(yaml.safe_load(self.config) or {})


class RunLogger(Logger):
    """A logger that may take more than metrics. What it cannot show it passes over, which is the default of each method."""

    def describe(self, sitting: Sitting) -> None:
        """What is to be logged from now on is the run's from `sitting.step` on."""

    def log_picture(self, name: str, picture: Image.Image, step: int, caption: str) -> None:
        """Show a picture. It replaces none of other steps."""

    def log_per_block(self, scalars: Mapping[str, float], step: int) -> None:
        """Show several scalars for each block of the encoder, by grouped names: too many for a table or a service."""


class DescribeRun(pl.Callback):
    """Tells the loggers, as soon as it is known at which step training starts, what the run is."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before anything is logged, as this is the first of the callbacks."""
        if not trainer.is_global_zero:
            return
        config = (self.run / CONFIG).read_text(encoding="utf-8") if (self.run / CONFIG).is_file() else ""
        sitting = Sitting(trainer.global_step, config, environment_of(trainer), bool(trainer.enable_validation))
        for logger in trainer.loggers:
            logger.describe(sitting)


def log_picture(loggers: Iterable[RunLogger], name: str, picture: Image.Image, step: int, caption: str) -> None:
    """Show a picture wherever pictures can be shown.

    Args:
        step: as of scalars, counted from 0.
        caption: what the picture holds, its columns for instance.
    """
    for logger in loggers:
        logger.log_picture(name, picture, step, caption)


def environment_of(trainer: pl.Trainer) -> dict[str, str]:
    """Versions and devices; no name of user or machine."""
    from importlib.metadata import version

    from simmim import __version__

    device = trainer.strategy.root_device
    if device.type == "cuda":
        kind = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        kind = f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
    libraries = ("torch", "pytorch-lightning", "torchmetrics", "datasets", "numpy", "pillow")
    return {
        "simmim": __version__,
        "Python": sys.version.split()[0],
        **{library: version(library) for library in libraries},
        "platform": platform.platform(terse=True),
        "devices": f"{trainer.world_size} × {kind}",
        "precision": str(trainer.precision),
        "begins at step": f"{trainer.global_step:,} of {trainer.max_steps:,}",
    }


def flat(values: Mapping, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings by dotted keys; lists as text, None as none."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[f"{prefix}{key}"] = value
        else:
            found[f"{prefix}{key}"] = "none" if value is None else str(value)
    return found


# --- TensorBoard -------------------------------------------------------------------------------------------------------


class TensorBoardPage(RunLogger, TensorBoardLogger):
    """RUN/tensorboard: scalars in groups with descriptions, pictures, the configuration and the environment as texts, and
    the settings beside the final metrics under HParams.

    A sitting begins by taking back what its predecessor logged beyond the checkpoint, so that a run that was killed and
    resumed shows one curve.
    """

    def __init__(self, run: Path, names: Names) -> None:
        # Lightning's own scalar for HParams, hp_metric, says nothing.
        super().__init__(run, name="tensorboard", version="", default_hp_metric=False)
        self.names = names
        self.told: set[str] = set()  # scalars that have been described
        self.begun, self.ended, self.last_step = False, False, 0

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Mark, once, that nothing of `step` and later counts that was there before."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if not self.begun:
            self.begun = True
            # TensorBoard heeds the second mark and later ones, so that the first sitting needs one too. SummaryWriter would
            # write it, but Lightning opens that before it has read the step from the checkpoint.
            mark = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            self.experiment._get_file_writer().add_event(mark, step)

    @rank_zero_only
    def describe(self, sitting: Sitting) -> None:
        """Texts, settings and layout. A resumed run has them, and adds its environment alone."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.begin(sitting.step)
        first, *rest = (f"| {name} | {value} |" for name, value in sitting.environment.items())
        self.add(text_pb("run/environment", "\n".join([first, "| --- | --- |", *rest])), sitting.step)
        if sitting.step:
            return
        self.add(text_pb(f"run/{CONFIG}", f"```yaml\n{sitting.config.rstrip()}\n```"), 0)
        shown = ("accuracy", "validation_loss", "loss") if sitting.validates else ("loss", "images_per_s")
        for summary in settings_and_metrics(sitting.settings(), [self.names(name) for name in shown]):
            self.add(summary, 0)
        if sitting.validates:
            tags = [self.names("loss"), self.names("validation_loss")]
            self.experiment.add_custom_scalars({"loss": {"training and validation": ["Multiline", tags]}})
        self.save()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars by their grouped names, each described at its first appearance."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata

        self.begin(step or 0)
        for name, value in metrics.items():
            if name in IGNORED_METRICS:
                continue
            scalar = Summary.Value(tag=self.names(name), simple_value=float(value))
            if name not in self.told:
                self.told.add(name)
                # Without the class, TensorBoard's fast reader takes no notice of the description.
                scalar.metadata.CopyFrom(
                    SummaryMetadata(
                        plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
                        data_class=DATA_CLASS_SCALAR,
                        summary_description=self.names.description(name),
                    )
                )
            self.add(Summary(value=[scalar]), step)

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, step: int, caption: str) -> None:
        """A card of the group images, which is open when the page comes up."""
        import numpy as np

        self.begin(step)
        self.experiment.add_image(f"images/{name}: {caption}", np.array(picture.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def log_per_block(self, scalars: Mapping[str, float], step: int) -> None:
        """As other scalars: each is in the group of its measure."""
        self.log_metrics(scalars, step)

    @rank_zero_only
    def save(self) -> None:
        """Write to the disk what there is. Lightning's own way would also leave an empty hparams.yaml."""
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a run that is through says so under HParams, where it counts as running until then."""
        if self._experiment is None:
            return
        if status == "success" and not self.ended:
            self.ended = True
            self.add(success(), self.last_step)
        self._experiment.flush()
        self._experiment.close()

    def add(self, summary, step: int | None) -> None:
        """One record."""
        self.last_step = max(self.last_step, step or 0)
        self.experiment._get_file_writer().add_summary(summary, step)


def settings_and_metrics(settings: Mapping[str, bool | int | float | str], tags: Sequence[str]) -> list[Summary]:
    """Summaries for HParams: the columns and the settings; the metrics are the last values of the scalars in `tags`.

    TensorBoard finds out columns by itself too, but then misses the scalars of a run that lies at the top of --logdir.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    columns = api_pb2.Experiment(
        hparam_infos=[
            # What is said to differ comes first.
            api_pb2.HParamInfo(
                name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64), differs=name in FIRST_COLUMNS
            )
            for name, value in settings.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in tags],
    )
    # The name of the row; TensorBoard would make it a hash.
    name = str(settings["out"]) if "out" in settings else None
    return [hparams_summary(metadata.EXPERIMENT_TAG, experiment=columns), hparams_pb(dict(settings), trial_id=name)]


def success() -> Summary:
    """Summary for HParams: the run is through."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    return hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def hparams_summary(tag: str, **content) -> Summary:
    """What TensorBoard keeps for HParams: the content is in the metadata, the tensor is empty."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


# --- metrics.csv -------------------------------------------------------------------------------------------------------


class MetricsCsv(RunLogger):
    """metrics.csv: a row a logged step, a column a metric. A resumed run drops rows from beyond its checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.columns = path, ["step"]
        self.rows: list[dict] = []  # not yet final: the last of them may still get columns after it was written
        self.offset: int | None = None  # where in the file the first of them belongs

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: the run folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; metrics of one step share it."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
            if len(self.rows) > 100:
                self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what has come since the last call; rewrites the file only for a new column or after a resume."""
        if not self.rows:
            return
        known = list(dict.fromkeys([*self.columns, *(key for row in self.rows for key in row)]))
        if self.offset is None or known != self.columns:
            old = []
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    old = [row for row in csv.DictReader(file) if int(row["step"]) < self.rows[0]["step"]]
            self.columns = list(dict.fromkeys([*known, *(key for row in old for key in row)]))
            with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(old)
            self.offset = self.path.stat().st_size
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            file.truncate(self.offset)
            file.seek(self.offset)
            writer = csv.DictWriter(file, self.columns)
            writer.writerows(self.rows[:-1])
            self.offset = file.tell()
            writer.writerow(self.rows[-1])
        self.rows = self.rows[-1:]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The last rows."""
        self.save()


# --- Services ----------------------------------------------------------------------------------------------------------


class Service(RunLogger):
    """Weights & Biases or MLflow through Lightning's logger, with grouped names.

    It is opened when training starts, when the run folder is there; a resumed run goes on in the entry whose id it finds in
    RUN/NAME.id. Neither service takes anything back: what a killed run logged beyond its checkpoint stays there.

    Args:
        kind: wandb or mlflow.
    """

    def __init__(self, kind: str, run: Path, names: Names) -> None:
        super().__init__()
        self.kind, self.run, self.names = kind, run, names
        self.logger: Logger | None = None

    @property
    def name(self) -> str:
        return self.kind

    @property
    def version(self) -> str:
        return ""

    def open(self) -> Logger:
        """Lightning's logger, made at the first call."""
        if self.logger is None:
            # At last: a folder is taken and the library imported only by a run that trains.
            for variable, value in WITHOUT_TELEMETRY[self.kind].items():
                os.environ.setdefault(variable, value)
            file = self.run / f"{self.kind}.id"
            known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
            try:
                self.logger = {"wandb": open_wandb, "mlflow": open_mlflow}[self.kind](self.run, known)
                ident = self.logger.version  # of MLflow, this makes the run
            except Exception as error:
                self.logger = None
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                hint = "; WANDB_MODE=offline keeps all in the run folder" if self.kind == "wandb" else ""
                raise ValueError(f"logger {self.kind!r} cannot be opened: {said}{hint}") from error
            file.write_text(f"{ident}\n", encoding="utf-8")
        return self.logger

    @rank_zero_only
    def describe(self, sitting: Sitting) -> None:
        """The settings, by dotted keys."""
        self.open().log_hyperparams(sitting.settings())

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: `describe` has them all."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """By grouped names."""
        self.open().log_metrics(self.names.of(metrics), step)

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, step: int, caption: str) -> None:
        """In W&B a panel, in MLflow a file a step."""
        logger = self.open()
        if self.kind == "wandb":
            logger.log_image(name, [picture], step=step, caption=[caption])
        else:
            logger.experiment.log_image(logger.run_id, picture, artifact_file=f"{name}/step-{step:07d}.png")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Tell the service that the run is through, or not."""
        if self.logger is not None:
            self.logger.finalize(status)


def open_wandb(run: Path, known: str | None) -> Logger:
    """An entry in project simmim or $WANDB_PROJECT; WANDB_MODE=offline keeps it in RUN/wandb for `wandb sync`.

    Args:
        known: the entry's id, of a run that is resumed.
    """
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    # A process has one entry open at a time, and Lightning writes on into it: right for one that the user opened, but not
    # for that of the run before.
    if wandb.run is not None and wandb.run.id in OWN_ENTRIES:
        wandb.finish()
    ident = known or uuid.uuid4().hex[:8]
    OWN_ENTRIES.add(ident)
    project = os.environ.get("WANDB_PROJECT", "simmim")
    logger = WandbLogger(name=run.name, save_dir=str(run), version=ident, project=project, log_model=False)
    _ = logger.experiment  # so that what is wrong comes up here
    return logger


def open_mlflow(run: Path, known: str | None) -> Logger:
    """A run of experiment simmim or $MLFLOW_EXPERIMENT_NAME, at $MLFLOW_TRACKING_URI or else in a database in RUN/mlflow.

    Args:
        known: the run's id there, of one that is resumed.
    """
    from pytorch_lightning.loggers import MLFlowLogger

    uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
    if not uri:
        # Of the two kinds of local store this is the one that MLflow still opens without being told to.
        folder = run.absolute() / "mlflow"
        folder.mkdir(exist_ok=True)
        uri, artifacts = f"sqlite:///{folder.as_posix()}/mlflow.db", (folder / "artifacts").as_uri()
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "simmim")
    return MLFlowLogger(experiment, run.name, uri, artifact_location=artifacts, run_id=known)
