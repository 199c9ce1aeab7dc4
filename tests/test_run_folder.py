"""The run folder is locked and never overwritten by accident; metrics.csv survives interruption."""

import contextlib
import csv
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from simmim.training.loggers import MetricsCsv
from simmim.training.run_folder import as_yaml, check_run_folder, checkpoints_folder, differences, locked_run_folder, plain
from simmim.training.saving import CheckpointWriter, SavePolicy, step_file


@dataclass(frozen=True)
class Inner:
    rate: float = 5e-7
    milestones: tuple[int, ...] = (3, 4)
    name: str = "no"


@dataclass(frozen=True)
class Settings:
    """What a stage's settings have in common, and a value of every kind."""

    out: str
    resume: bool = False
    overwrite: bool = False
    workers: int | None = 2
    devices: str | int = "auto"
    path: Path = Path("some/images")
    epochs: float = 10.0
    inner: Inner = Inner()
    extra: dict = field(default_factory=lambda: {"a": {"b": (1, 2)}, "ä": None})


def test_an_export_that_fails_without_a_text_is_named(tmp_path):
    """A MemoryError has no text. The checkpoint is written before the export."""

    def fail(model):
        raise MemoryError

    run = open_run_folder(Settings(str(tmp_path / "run")))
    writer = CheckpointWriter(run, SavePolicy(every_steps=1, export=fail))
    writer.save_checkpoint({"state_dict": {}, "global_step": 1}, step_file(run, 1))
    with pytest.raises(OSError, match=r"could not be written \(MemoryError\): .*step-00000001\.ckpt stands"):
        writer.wait()


def test_halves_of_files_go_when_a_run_is_resumed(tmp_path):
    """Of a process that was killed while it wrote a checkpoint or the encoder, and nothing else."""
    run = open_run_folder(Settings(str(tmp_path / "run")))
    (run / "encoder").mkdir()
    kept = [checkpoints_folder(run) / "step-00000004.ckpt", run / "encoder" / ".notes", run / ".mine.abcdefgh"]
    halves = [checkpoints_folder(run) / ".step-00000008.ckpt.k3_0zz1a", run / "encoder" / ".encoder.safetensors.x1y2z3_4"]
    for path in (*kept, *halves):
        path.write_bytes(b"half")
    open_run_folder(Settings(str(run), resume=True))
    assert [path.is_file() for path in (*kept, *halves)] == [True] * 3 + [False] * 2


def open_run_folder(settings):
    with locked_run_folder(settings) as run:
        return run


def files_of(folder):
    """Relative paths and contents of all files, to see that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def run_with_checkpoint(out):
    run = open_run_folder(Settings(str(out)))
    (checkpoints_folder(run) / "last.ckpt").write_bytes(b"weights")
    return run


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_run_folder, lambda *given: open_run_folder(Settings(*given))])
@pytest.mark.parametrize(
    "state, resume, overwrite, message",
    [
        ("run", False, False, "is not empty; resume: true goes on with the run, overwrite: true starts it again"),
        ("other", False, False, "is not empty and holds no run: give a new folder"),
        ("hidden", False, False, "is not empty"),
        ("other", False, True, r"holds no run \(config.yaml is missing\) and is left alone: give a new folder"),
        ("other", True, False, "holds no run to resume: give a run's folder, or a new one"),
        ("file", False, False, "is a file: give a new folder"),
        ("file", True, False, "is a file"),
        ("file", False, True, "is a file"),
        ("run", True, True, "resume and overwrite exclude each other"),
        ("absent", True, True, "resume and overwrite exclude each other"),
    ],
)
def test_refusals(tmp_path, check, state, resume, overwrite, message):
    """Refused, the message in one line, and not a byte changed."""
    out = tmp_path / "place"
    if state == "run":
        run_with_checkpoint(out)
    elif state == "file":
        out.write_text("mine")
    elif state != "absent":
        out.mkdir()
        (out / {"other": "thesis.txt", "hidden": ".git"}[state]).write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        check(str(out), resume, overwrite)
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == before and out.exists() == (state != "absent")


@pytest.mark.parametrize("resume, overwrite", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("there", [False, True])
def test_free_folders_are_taken(tmp_path, resume, overwrite, there):
    """New or empty, whatever is asked: a run that is to be resumed may not have begun."""
    out = tmp_path / "a" / "b"
    if there:
        out.mkdir(parents=True)
    check_run_folder(out, resume, overwrite)
    assert out.exists() == there, "checking writes nothing"
    assert open_run_folder(Settings(str(out), resume, overwrite)) == out
    assert sorted(os.listdir(out)) == ["checkpoints", "config.yaml"] and os.listdir(out / "checkpoints") == []


def test_config_holds_the_settings(tmp_path):
    """Complete, in their order, as plain values of the right types; resume and overwrite are no part of it."""
    run = open_run_folder(Settings(str(tmp_path / "run"), devices=2, inner=Inner(milestones=(7,))))
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert values == {
        "out": str(tmp_path / "run"),
        "workers": 2,
        "devices": 2,
        "path": "some/images",
        "epochs": 10.0,
        "inner": {"rate": 5e-7, "milestones": [7], "name": "no"},
        "extra": {"a": {"b": [1, 2]}, "ä": None},
    }
    assert list(values) == ["out", "workers", "devices", "path", "epochs", "inner", "extra"]
    assert isinstance(values["inner"]["rate"], float) and values["inner"]["name"] == "no"


def test_plain_values():
    assert plain({1: (Path("a/b"), [Inner()])}) == {"1": ["a/b", [{"rate": 5e-7, "milestones": [3, 4], "name": "no"}]]}


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_run_folder(Settings("~/run")) == tmp_path / "run"
    with pytest.raises(ValueError, match="is not empty"):
        check_run_folder("~/run", False, False)


def test_overwriting_starts_anew(tmp_path):
    run = run_with_checkpoint(tmp_path / "run")
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events").touch()
    assert open_run_folder(Settings(str(run), overwrite=True, epochs=20.0)) == run
    assert sorted(files_of(run)) == ["config.yaml"]
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 20.0


def test_resuming_keeps_the_folder_as_it_is(tmp_path):
    """Workers and devices may be others; config.yaml still says what the run was started with."""
    run = run_with_checkpoint(tmp_path / "run")
    before = files_of(run)
    for changes in ({}, {"workers": 7}, {"workers": None}, {"devices": 4}, {"devices": "1", "workers": 0}):
        assert open_run_folder(Settings(str(run), resume=True, **changes)) == run
        assert files_of(run) == before
    run.rename(tmp_path / "moved")
    open_run_folder(Settings(str(tmp_path / "moved"), resume=True))
    assert files_of(tmp_path / "moved") == before, "a moved run is still the same run"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 20.0}, "started with other settings: epochs was 10.0, is 20.0. Resume it with its own, or give"),
        ({"inner": Inner(rate=1e-3)}, "settings: inner.rate was 5e-07, is 0.001. Resume"),
        ({"inner": Inner(milestones=(3,))}, r"settings: inner.milestones was \[3, 4\], is \[3\]. Resume"),
        ({"extra": {"a": {"b": (1, 3)}}}, r"settings: extra.a.b was \[1, 2\], is \[1, 3\]. Resume"),
        ({"extra": {"a": {"b": (1, 2)}, "new": 1}}, "settings: extra.new was None, is 1. Resume"),
        ({"epochs": 5.0, "inner": Inner(name="x"), "workers": 9}, "epochs was 10.0, is 5.0; inner.name was no, is x"),
    ],
)
def test_resuming_with_other_settings(tmp_path, changes, message):
    run = run_with_checkpoint(tmp_path / "run")
    before = files_of(run)
    with pytest.raises(ValueError, match=message) as caught:
        open_run_folder(Settings(str(run), resume=True, **changes))
    assert "workers" not in str(caught.value) and files_of(run) == before


def test_differences():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"b": 1, "a": {"d": 1, "c": [1]}}, {"b": 2, "a": {"d": 1, "c": [2]}}) == [
        "a.c was [1], is [2]",
        "b was 1, is 2",
    ]
    assert differences({"a": None}, {"a": {"b": 1}}) == ["a was None, is {'b': 1}"]


def test_yaml_reads_back_to_the_same_yaml():
    settings = Settings("run", inner=Inner(name="no: {x} # ä\n'"))
    assert yaml.safe_load(as_yaml(settings))["inner"]["name"] == settings.inner.name
    assert as_yaml(replace(settings, resume=True, overwrite=True)) == as_yaml(settings)
    assert "ä" in as_yaml(settings)


# --- metrics.csv -----------------------------------------------------------------------------------------------------


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_metrics_round_trip(tmp_path):
    """Values keep every digit; metrics of one step share a row, and a row lacks what was not logged."""
    log, path = MetricsCsv(tmp_path / "metrics.csv"), tmp_path / "metrics.csv"
    values = [0.1 + 0.2, 1 / 3, 1e-30, float("inf"), 7]
    for step, value in enumerate(values):
        log.log_metrics({"loss": value}, step)
        log.log_metrics({"lr": value / 2}, step)
    log.log_metrics({"lr": 0.5}, 9)
    assert not path.exists(), "rows are written by the hundred or when asked"
    log.save()
    rows = rows_of(path)
    assert list(rows[0]) == ["step", "loss", "lr"]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 9]
    assert [float(row["loss"]) for row in rows[:-1]] == values and rows[-1]["loss"] == ""
    assert [float(row["lr"]) for row in rows] == [value / 2 for value in values] + [0.5]


def test_metrics_are_appended_and_columns_grow(tmp_path):
    log, path = MetricsCsv(tmp_path / "metrics.csv"), tmp_path / "metrics.csv"
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    first = path.read_bytes()
    log.log_metrics({"loss": 0.5}, 1)
    log.save()
    assert path.read_bytes().startswith(first) and len(rows_of(path)) == 2
    log.log_metrics({"loss": 0.25, "accuracy": 0.75}, 2)
    log.finalize("success")
    log.log_metrics({"other": 3.0}, 3)
    log.save()
    log.save()
    assert rows_of(path) == [
        {"step": "0", "loss": "1.0", "accuracy": "", "other": ""},
        {"step": "1", "loss": "0.5", "accuracy": "", "other": ""},
        {"step": "2", "loss": "0.25", "accuracy": "0.75", "other": ""},
        {"step": "3", "loss": "", "accuracy": "", "other": "3.0"},
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_metrics_of_one_step_share_a_row_across_saves(tmp_path):
    """A step's metrics come from several places, with a save between them; the row is one, old columns or new."""
    log, path = MetricsCsv(tmp_path / "metrics.csv"), tmp_path / "metrics.csv"
    for step in range(3):
        for metrics in ({"loss": float(step)}, {"lr": 0.5}, {"loss": step + 10.0}):
            log.log_metrics(metrics, step)
            log.save()
            assert [int(row["step"]) for row in rows_of(path)] == list(range(step + 1))
    assert [(row["loss"], row["lr"]) for row in rows_of(path)] == [("10.0", "0.5"), ("11.0", "0.5"), ("12.0", "0.5")]


class Killed(Exception):
    """The end of a process."""


class KilledFile:
    """A file without a buffer whose process ends with the call of a method."""

    def __init__(self, file, call):
        self.file, self.call = file, call

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        if name == self.call:
            raise Killed
        self.file.flush()
        return getattr(self.file, name)


@pytest.mark.parametrize("metrics", [{"loss": 3.0}, {"loss": 3.0, "accuracy": 0.5}], ids=["same columns", "a new column"])
@pytest.mark.parametrize("call", ["seek", "write", "truncate"])
def test_rows_that_were_written_survive_a_kill_at_any_moment(tmp_path, monkeypatch, call, metrics):
    """The last row is still open for values of its step, and yet a checkpoint may hold the step already."""
    log, path = MetricsCsv(tmp_path / "metrics.csv"), tmp_path / "metrics.csv"
    for step in range(3):
        log.log_metrics({"loss": float(step)}, step)
        log.save()
    log.log_metrics(metrics, 3)
    opened = Path.open

    def open_until_the_kill(path, mode="r", *rest, **options):
        file = opened(path, mode, *rest, **options)
        return KilledFile(file, call) if "+" in mode else file

    monkeypatch.setattr(Path, "open", open_until_the_kill)
    with contextlib.suppress(Killed):
        log.save()
    monkeypatch.undo()
    assert [int(row["step"]) for row in rows_of(path)][:3] == [0, 1, 2]
    resumed = MetricsCsv(path)
    resumed.log_metrics({"loss": 9.0}, 3)
    resumed.save()
    assert [(row["step"], row["loss"]) for row in rows_of(path)] == [("0", "0.0"), ("1", "1.0"), ("2", "2.0"), ("3", "9.0")]


def test_a_row_that_shrinks_leaves_nothing_behind(tmp_path):
    log, path = MetricsCsv(tmp_path / "metrics.csv"), tmp_path / "metrics.csv"
    for value in (0.123456789, 1.0):
        log.log_metrics({"loss": value}, 5)
        log.save()
    assert rows_of(path) == [{"step": "5", "loss": "1.0"}]


def test_many_metrics_reach_the_file_unasked(tmp_path):
    log, path = MetricsCsv(tmp_path / "metrics.csv"), tmp_path / "metrics.csv"
    for step in range(250):
        log.log_metrics({"loss": float(step)}, step)
    assert len(rows_of(path)) >= 200
    log.save()
    assert [int(row["step"]) for row in rows_of(path)] == list(range(250))


def test_resumed_metrics_drop_rows_from_beyond_the_checkpoint(tmp_path):
    """A run saved at step 30, logged to 49 and resumed at 30: each step once, from 30 on the new values, old columns
    kept where the new run has not logged them yet."""
    path = tmp_path / "metrics.csv"
    log = MetricsCsv(path)
    for step in range(0, 50, 10):
        log.log_metrics({"loss": 1.0, "accuracy": 0.5}, step)
    log.save()
    resumed = MetricsCsv(path)
    resumed.save()
    assert len(rows_of(path)) == 5, "nothing logged, nothing dropped"
    for step in range(30, 70, 10):
        resumed.log_metrics({"loss": 2.0, "lr": 0.1}, step)
        resumed.save()
    rows = rows_of(path)
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 30, 40, 50, 60]
    assert [float(row["loss"]) for row in rows] == [1.0] * 3 + [2.0] * 4
    assert rows[0].keys() == {"step", "loss", "accuracy", "lr"}
    assert [row["accuracy"] for row in rows] == ["0.5"] * 3 + [""] * 4
