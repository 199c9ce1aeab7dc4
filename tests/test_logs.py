"""Names, loggers that are asked for, services, and that nothing leaves the machine unasked."""

import csv
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pytorch_lightning.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simmim.finetune import ClassificationSettings, EncoderSettings, LabeledSettings, finetune
from simmim.pretrain import DataSettings, PretrainSettings, SimMIMSettings, pretrain
from simmim.training.loggers import (
    SERVICES,
    LossNames,
    MetricsCsv,
    Names,
    Session,
    TensorBoardPage,
    build_loggers,
    log_picture,
)
from simmim.training.loggers.base import flatten
from simmim.training.loggers.names import GROUPED

SMALL = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
CONFIG = "data:\n  path: images\nout: runs/a\nepochs: 2.0\nbatch_size: 32\noptim:\n  lr: 0.002\n"


def settings(data, out, **more):
    model = SimMIMSettings(mask_unit=8, encoder=SMALL)
    common = {"preset": "nano", "epochs": 1.0, "batch_size": 32, "model": model, "log_every_steps": 2}
    return PretrainSettings(data=DataSettings(str(data)), out=str(out), **{**common, **more})


def session(step=0):
    return Session(step, CONFIG, {"torch": "2", "devices": "1 × cpu"}, monitor=None)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_grouped():
    names = Names(LossNames("masked_l1", "mean absolute error"))
    plain = ("loss", "lr", "grad_norm", "images_per_s", "data_wait_share", "accuracy", "validation_loss", "skipped_steps")
    assert [names(name) for name in plain] == [
        "loss/masked_l1",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "speed/images_per_s",
        "speed/data_wait_share",
        "validation/accuracy",
        "validation/masked_l1",
        "stability/skipped_steps",
    ]
    assert names("per_block/rms/stage0.block1") == "per_block/rms/stage0.block1", "has a group already"
    assert names("temperature") == "other/temperature"
    assert names.grouped({"loss": 1.0, "epoch": 0}) == {"loss/masked_l1": 1.0}
    assert len({names(name) for name in [*GROUPED, "loss", "validation_loss"]}) == len(GROUPED) + 2
    assert all(names.description(name) for name in [*GROUPED, "loss", "validation_loss"])
    assert names.description("temperature") == ""


def test_settings_are_flattened():
    values = {"a": {"b": {"c": 1.5}, "d": [1, 2]}, "e": None, "f": True, "g": {}, "h": "no"}
    assert flatten(values) == {"a.b.c": 1.5, "a.d": "[1, 2]", "e": "none", "f": True, "g": "{}", "h": "no"}


# --- what is asked for -------------------------------------------------------------------------------------------------


def test_tensorboard_and_csv_always_and_nothing_is_written_yet(tmp_path):
    for wanted in ((), ("tensorboard",), ("csv", "tensorboard")):
        assert [type(logger) for logger in build_loggers(tmp_path / "run", wanted)] == [TensorBoardPage, MetricsCsv]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, near", [("wanb", "wandb"), ("ml-flow", "mlflow"), ("WANDB", "wandb"), ("neptune", "known")])
def test_unknown_loggers_are_refused(digits, tmp_path, name, near):
    with pytest.raises(ValueError, match=rf"unknown logger '{name}'.*{near}"):
        pretrain(settings(digits.unlabeled, tmp_path / "run", loggers=(name,)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_that_are_not_installed_are_refused(tmp_path, monkeypatch, name):
    """Nor does a folder of that name pass for the package, as wandb leaves one where it ran."""
    found = importlib.util.find_spec
    (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    folder = importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])
    for spec in (None, folder):
        monkeypatch.setattr(importlib.util, "find_spec", lambda asked, spec=spec: spec if asked == name else found(asked))
        with pytest.raises(ValueError, match=f"logger '{name}' is not installed: pip install {name}"):
            build_loggers(tmp_path / "run", (name,))


def test_loggers_as_they_are_typed():
    for given in ("wandb,mlflow", "wandb, mlflow", ["wandb", "mlflow"], ("wandb", "mlflow")):
        assert settings("images", "run", loggers=given).loggers == ("wandb", "mlflow")
        assert ClassificationSettings(data=LabeledSettings("images"), out="run", loggers=given).loggers == (
            "wandb",
            "mlflow",
        )
    assert settings("images", "run").loggers == ()


# --- services ----------------------------------------------------------------------------------------------------------


class Recorder(Logger):
    """Stands for Lightning's logger of a service."""

    run_id = version = "id-1"
    name = "recorder"

    def __init__(self):
        super().__init__()
        self.calls = []
        self.experiment = self

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", metrics, step))

    def log_hyperparams(self, params):
        self.calls.append(("settings", params))

    def log_image(self, *args, **kwargs):
        self.calls.append(("image", *args, kwargs))

    def finalize(self, status):
        self.calls.append(("finalize", status))


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_services_get_grouped_names_settings_and_pictures(tmp_path, monkeypatch, kind):
    for variable in SERVICES[kind].environment:
        monkeypatch.delenv(variable, raising=False)
    recorder, asked = Recorder(), []

    def open_recorder(self, entry_id):
        assert {name: os.environ.get(name) for name in SERVICES[kind].environment} == SERVICES[kind].environment
        asked.append(entry_id)
        return recorder

    monkeypatch.setattr(SERVICES[kind], "open_logger", open_recorder)
    service = SERVICES[kind](tmp_path, Names(LossNames("masked_l1")))
    service.finalize("success")
    assert asked == [] and recorder.calls == [], "a service is opened by a run that trains"
    service.describe(session())
    service.log_metrics({"loss": 0.5, "epoch": 0}, 3)
    picture = Image.new("RGB", (4, 4))
    log_picture([MetricsCsv(tmp_path / "metrics.csv"), service], "reconstructions", picture, 3, "original, masked")
    service.finalize("success")
    image = recorder.calls[2]
    assert recorder.calls[:2] == [
        ("settings", flatten(yaml.safe_load(CONFIG))),
        ("metrics", {"loss/masked_l1": 0.5}, 3),
    ]
    if kind == "wandb":
        assert image == ("image", "reconstructions", [picture], {"step": 3, "caption": ["original, masked"]})
    else:
        assert image == ("image", "id-1", picture, {"artifact_file": "reconstructions/step-0000003.png"})
    assert recorder.calls[3:] == [("finalize", "success")]
    assert (tmp_path / f"{kind}.id").read_text() == "id-1\n" and asked == [None]
    SERVICES[kind](tmp_path, Names(LossNames("masked_l1"))).log_metrics({"loss": 0.25}, 4)
    assert asked == [None, "id-1"], "a resumed run goes on in its entry"


def test_the_users_telemetry_setting_goes_before(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    monkeypatch.setattr(SERVICES["mlflow"], "open_logger", lambda self, entry_id: Recorder())
    SERVICES["mlflow"](tmp_path, Names(LossNames("x"))).log_metrics({"loss": 1.0}, 0)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_a_service_that_cannot_be_opened_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    monkeypatch.setattr(SERVICES["wandb"], "open_logger", lambda self, entry_id: {}["no API key\nlong story"])
    with pytest.raises(ValueError, match=r"^logger 'wandb' cannot be opened: .*no API key.*; WANDB_MODE=offline keeps"):
        SERVICES["wandb"](tmp_path, Names(LossNames("x"))).log_metrics({"loss": 1.0}, 0)
    assert not (tmp_path / "wandb.id").exists()


def test_mlflow_keeps_a_run_in_its_folder(digits, tmp_path, monkeypatch, power_cut):
    """For real where it is installed: numbers, settings and pictures, and the same entry when the run is resumed."""
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    wanted = settings(digits.unlabeled, tmp_path / "run", loggers=("mlflow",), save_every_steps=3)
    with power_cut(after_step=5):
        pretrain(wanted)
    run = pretrain(replace(wanted, resume=True))
    client = MlflowClient(f"sqlite:///{run}/mlflow/mlflow.db")
    (entry,) = client.search_runs([client.get_experiment_by_name("simmim").experiment_id])
    assert (entry.info.run_name, entry.info.status) == ("run", "FINISHED")
    assert entry.info.run_id == (run / "mlflow.id").read_text().strip()
    assert entry.data.params["model.mask_ratio"] == "0.6"
    logged = {metric.step: metric.value for metric in client.get_metric_history(entry.info.run_id, "loss/masked_l1")}
    assert logged == {int(row["step"]): pytest.approx(float(row["loss"])) for row in rows(run) if row["loss"]}
    assert client.list_artifacts(entry.info.run_id, "reconstructions")
    assert sorted(os.listdir(tmp_path)) == ["run"], "nothing beside the run"


def test_wandb_offline_keeps_a_run_in_its_folder(digits, tmp_path, monkeypatch):
    """For real where it is installed; two runs in one process are two entries."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    idents = []
    for name in ("first", "second"):
        run = pretrain(settings(digits.unlabeled, tmp_path / name, loggers=("wandb",)))
        idents.append((run / "wandb.id").read_text().strip())
        (kept,) = (run / "wandb").glob("offline-run-*")
        assert kept.name.endswith(idents[-1]) and list(kept.glob("files/media/images/reconstructions*.png"))
    assert len(set(idents)) == 2
    assert sorted(os.listdir(tmp_path)) == ["first", "second"], "nothing beside the runs"


# --- the page ----------------------------------------------------------------------------------------------------------


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def steps_of(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_a_session_takes_back_what_lay_beyond_its_checkpoint(tmp_path):
    """Scalars, sparse ones and those never logged again, and pictures; twice over."""
    names = Names(LossNames("masked_l1"))
    for begins, ends, value in ((0, 8, 1.0), (5, 9, 2.0), (7, 10, 3.0)):
        page = TensorBoardPage(tmp_path, names)
        page.describe(session(begins))
        for step in range(begins, ends):
            page.log_metrics({"loss": value}, step)
            if step == 7:
                page.log_metrics({"rare": value}, step)
            if step % 4 == 0:
                page.log_picture("reconstructions", Image.new("RGB", (4, 4)), step, "original")
        page.finalize("failed")
    assert steps_of(tmp_path / "tensorboard", "loss/masked_l1") == [
        *((step, 1.0) for step in range(5)),
        *((step, 2.0) for step in (5, 6)),
        *((step, 3.0) for step in (7, 8, 9)),
    ]
    assert steps_of(tmp_path / "tensorboard", "other/rare") == [(7, 3.0)]
    assert [event.step for event in read(tmp_path / "tensorboard").Images("images/reconstructions: original")] == [0, 4, 8]
    assert [event.step for event in read(tmp_path / "tensorboard").Tensors("run/environment")] == [0, 5, 7]
    assert [event.step for event in read(tmp_path / "tensorboard").Tensors("run/config.yaml")] == [0]


def test_a_page_that_is_not_described_begins_with_its_first_number(tmp_path):
    """A finished run that is resumed trains no more and only validates."""
    for value in (0.5, 0.75):
        page = TensorBoardPage(tmp_path, Names(LossNames("cross_entropy")))
        page.log_metrics({"accuracy": value}, 9)
        page.finalize("success")
    assert steps_of(tmp_path / "tensorboard", "validation/accuracy") == [(9, 0.75)]


def test_the_folder_holds_nothing_but_events(tmp_path):
    page = TensorBoardPage(tmp_path, Names(LossNames("masked_l1")))
    page.save()
    assert not (tmp_path / "tensorboard").exists(), "nothing logged, nothing written"
    page.describe(session())
    page.save()
    page.finalize("success")
    assert [name.split(".")[0] for name in os.listdir(tmp_path / "tensorboard")] == ["events"]


# --- whole runs --------------------------------------------------------------------------------------------------------


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_finetuning_logs_validation_and_training_in_one_chart(digits, tmp_path):
    """Every number of metrics.csv is on the page, under a group that the table knows, and nothing else is."""
    run = finetune(
        ClassificationSettings(
            data=LabeledSettings(str(digits.labeled)),
            out=str(tmp_path / "run"),
            encoder=EncoderSettings(preset="nano"),
            labels_per_class=2,
            steps=4,
            batch_size=20,
            validations=2,
            log_every_steps=1,
        )
    ).run
    events, names = read(run / "tensorboard"), Names(LossNames("cross_entropy"))
    tags = set(events.Tags()["scalars"])
    assert {"loss/cross_entropy", "validation/cross_entropy", "validation/accuracy", "optimizer/learning_rate"} <= tags
    assert tags == {names(column) for column in rows(run)[0] if column not in ("step", "epoch")}
    assert not [tag for tag in tags if tag.startswith("other/") or tag in ("epoch", "hp_metric")]
    for column in ("loss", "accuracy", "validation_loss"):
        logged = {int(row["step"]): pytest.approx(float(row[column])) for row in rows(run) if row[column]}
        assert {event.step: event.value for event in events.Scalars(names(column))} == logged
    chart = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"loss/cross_entropy" in chart and b"validation/cross_entropy" in chart


LOOKED_FOR: list = []
AUDIT = {"on": False, "installed": False}


def listen(event, arguments):
    """Notes names that are looked up and addresses that are connected to; an audit hook cannot be taken off again."""
    if AUDIT["on"] and event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        LOOKED_FOR.append((event, arguments[1 if event.startswith(("socket.connect", "socket.sendto")) else 0]))


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_run_looks_for_nobody(digits, tmp_path, monkeypatch, kind):
    """With every library as it is by default, and not offline as tests are otherwise."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    source = digits.unlabeled
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pictures = [{"bytes": path.read_bytes(), "path": None} for path in sorted(Path(source).rglob("*.png"))[:64]]
        source = tmp_path / "images.parquet"
        pq.write_table(pa.table({"image": pictures}), source)
    if not AUDIT["installed"]:
        AUDIT["installed"] = True
        sys.addaudithook(listen)
    LOOKED_FOR.clear()
    AUDIT["on"] = True
    try:
        pretrain(settings(source, tmp_path / "run"))
    finally:
        AUDIT["on"] = False
    assert LOOKED_FOR == []
