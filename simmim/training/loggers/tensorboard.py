"""The TensorBoard page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from simmim.training.loggers.base import RunLogger, Session
from simmim.training.loggers.names import IGNORED_METRICS, Names
from simmim.training.run_folder import CONFIG

if TYPE_CHECKING:
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

# Settings that HParams shows at first, where it has room for five. The others can be ticked.
FIRST_COLUMNS = ("batch_size", "epochs", "optim.lr", "model.mask_ratio", "preset", "labels_per_class", "freeze")


class TensorBoardPage(RunLogger, TensorBoardLogger):
    """RUN/tensorboard: scalars in groups with descriptions, pictures, the configuration and the environment as texts, and
    the settings beside the final metrics under HParams.

    A session starts by hiding what the session before logged beyond the checkpoint. So a run that was killed and resumed
    shows one curve.
    """

    def __init__(self, run: Path, names: Names) -> None:
        # Without Lightning's own scalar for HParams, hp_metric, which says nothing.
        super().__init__(run, name="tensorboard", version="", default_hp_metric=False)
        self.names = names
        self.described: set[str] = set()  # names of scalars
        self.started, self.ended, self.last_step = False, False, 0

    @rank_zero_only
    def start(self, step: int) -> None:
        """Mark, once, that events of `step` and later steps that were there before do not count."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if not self.started:
            self.started = True
            # TensorBoard observes the second mark and later ones, so that the first session needs one too. SummaryWriter
            # would write it, but Lightning opens that before it has read the step from the checkpoint.
            mark = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            self.experiment._get_file_writer().add_event(mark, step)

    @rank_zero_only
    def describe(self, session: Session) -> None:
        """Texts, settings and layout. A resumed run has them already and adds its environment alone."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.start(session.step)
        first, *rest = (f"| {name} | {value} |" for name, value in session.environment.items())
        self.add(text_pb("run/environment", "\n".join([first, "| --- | --- |", *rest])), session.step)
        if session.step:
            return
        self.add(text_pb(f"run/{CONFIG}", f"```yaml\n{session.config.rstrip()}\n```"), 0)
        shown = (session.monitor, "validation_loss", "loss") if session.monitor else ("loss", "images_per_s")
        for summary in settings_and_metrics(session.settings(), [self.names(name) for name in dict.fromkeys(shown)]):
            self.add(summary, 0)
        if session.monitor:
            tags = [self.names("loss"), self.names("validation_loss")]
            self.experiment.add_custom_scalars({"loss": {"training and validation": ["Multiline", tags]}})
        self.save()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars by their grouped names, each with its description the first time."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata

        self.start(step or 0)
        for name, value in metrics.items():
            if name in IGNORED_METRICS:
                continue
            scalar = Summary.Value(tag=self.names(name), simple_value=float(value))
            if name not in self.described:
                self.described.add(name)
                # Without the class, TensorBoard's fast reader ignores the description.
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
        """A card of the group images, which is open when the page is loaded."""
        import numpy as np

        self.start(step)
        self.experiment.add_image(f"images/{name}: {caption}", np.array(picture.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def log_per_block(self, scalars: Mapping[str, float], step: int) -> None:
        """As other scalars: each is in the group of its measure."""
        self.log_metrics(scalars, step)

    @rank_zero_only
    def save(self) -> None:
        """Write all events to the disk. Lightning's own `save` would also leave an empty hparams.yaml."""
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file. Under HParams a run counts as running until its end is recorded."""
        if self._experiment is None:
            return
        if status == "success" and not self.ended:
            self.ended = True
            self.add(success(), self.last_step)
        self._experiment.flush()
        self._experiment.close()

    def add(self, summary, step: int | None) -> None:
        """Write one record."""
        self.last_step = max(self.last_step, step or 0)
        self.experiment._get_file_writer().add_summary(summary, step)


def settings_and_metrics(settings: Mapping[str, bool | int | float | str], tags: Sequence[str]) -> list[Summary]:
    """Summaries for HParams: the columns and the settings; the metrics are the last values of the scalars in `tags`.

    TensorBoard can find columns by itself, but then misses the scalars of a run that lies at the top of --logdir.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    data_types = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    columns = api_pb2.Experiment(
        hparam_infos=[
            # Columns that are marked as differing come first.
            api_pb2.HParamInfo(
                name=name, type=data_types.get(type(value), api_pb2.DATA_TYPE_FLOAT64), differs=name in FIRST_COLUMNS
            )
            for name, value in settings.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in tags],
    )
    # The name of the row; by default it is a hash.
    name = str(settings["out"]) if "out" in settings else None
    return [hparams_summary(metadata.EXPERIMENT_TAG, experiment=columns), hparams_pb(dict(settings), trial_id=name)]


def success() -> Summary:
    """Summary for HParams: the run has ended."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    return hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def hparams_summary(tag: str, **content) -> Summary:
    """A summary as TensorBoard keeps it for HParams: the content is in the metadata, the tensor is empty."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])
