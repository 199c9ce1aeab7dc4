"""A task is its folder and one line in the table of tasks."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simmim.cli import main
from simmim.finetune import registry
from simmim.finetune.registry import TaskEntry, settings_class, task_named
from simmim.finetune.run import finetune


@pytest.fixture
def toy_settings(monkeypatch):
    """The settings class of the registered toy task."""
    monkeypatch.setitem(registry.TASKS, "toy", TaskEntry("toy_task", "ToySettings", "ToyTask"))
    return settings_class("toy")


def test_a_toy_task_decides_monitor_loss_and_validation_batch(toy_settings, digits, encoder_folder, tmp_path, capsys):
    values = {"data": str(digits.labeled), "init": str(encoder_folder), "labels_per_class": 2, "batch_size": 10}
    result = finetune(toy_settings(**values, out=str(tmp_path / "run"), steps=4, validations=2, greeting="that was all"))
    assert result.score == result.metrics["top5_accuracy"] <= result.best
    output = capsys.readouterr().out
    assert f"top5_accuracy {result.score:.1%} at the end" in output and "\nthat was all\n" in output
    events = EventAccumulator(str(result.run / "tensorboard"))
    events.Reload()
    assert {"loss/toy_loss", "validation/toy_loss"} <= set(events.Tags()["scalars"])


def test_the_command_offers_registered_tasks(toy_settings, digits, encoder_folder, tmp_path, capsys):
    assert main(["finetune", "--help"]) == 0
    assert "toy" in capsys.readouterr().out
    words = f"finetune toy --data {digits.labeled} --init {encoder_folder} --out {tmp_path / 'run'} --labels-per-class 2 "
    assert main([*(words + "--steps 1 --batch-size 5 --greeting").split(), "thank you"]) == 0
    assert "thank you" in capsys.readouterr().out


def test_preparing_one_task_twice_leaves_both_apart(digits, encoder_folder, tmp_path):
    """A task has no state: what one `prepare` returns does not depend on another."""
    task = task_named("classification")
    runs = []
    for count in (2, 3):
        settings = settings_class("classification")(
            data=str(digits.labeled), init=str(encoder_folder), out=str(tmp_path / "run"), labels_per_class=count
        )
        runs.append(task.prepare(settings, "cpu"))
    assert [len(run.train) for run in runs] == [20, 30]
    assert [run.provenance for run in runs] == [{"labels_per_class": 2}, {"labels_per_class": 3}]
    assert not vars(task)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'clasification'; did you mean 'classification'"):
        task_named("clasification")
