"""The probe on labeled images during pre-training: its accuracies, its steps, and that it does not change training."""

import csv
import random
import re
import shutil
import time

import numpy as np
import pytest
import torch
from fork_server import finish
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simmim.checkpoints import read_encoder
from simmim.evaluate import Comparison, EncoderPass, compare
from simmim.pretrain import (
    DataSettings,
    PretrainSettings,
    ProbeSettings,
    SimMIMSettings,
    labeled_probe,
    load_pretrained,
    pretrain,
)
from simmim.pretrain.labeled_probe import LabeledProbe

HERE = EncoderPass(workers=0)
# With stochastic depth, an extra random draw would change the losses.
SMALL = SimMIMSettings(mask_unit=8, encoder={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "drop_path_rate": 0.3})
EVERY_5 = 5 * 32 / 240  # epochs
FEATURES = ("stage0", "stage0.2x2", "stage1", "stage1.2x2", "final", "final.2x2")


def settings(digits, out, probe=True, **more):
    given = {"data": str(digits.labeled), "every_epochs": EVERY_5, "labels_per_class": 8, "k": 5}
    given |= probe if isinstance(probe, dict) else {}
    return PretrainSettings(
        **{
            "data": DataSettings(str(digits.unlabeled)),
            "out": str(out),
            "preset": "nano",
            "epochs": 17 * 32 / 240,
            "batch_size": 32,
            "model": SMALL,
            "save_every_steps": 6,
            "log_every_steps": 2,
            "workers": 0,
            "precision": "32-true",
            "probe": ProbeSettings(**given) if probe else ProbeSettings(),
            **more,
        }
    )


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measures(run):
    """Accuracies by step."""
    found = {}
    for row in rows(run):
        if row.get("probe_s"):
            figures = {name: value for name, value in row.items() if name.startswith(("knn/", "probe/")) and value}
            found[int(row["step"])] = {name: float(value) for name, value in figures.items()}
    return found


def trained(run):
    """Losses, learning rates and gradient norms by step, and all weights."""
    log = [[row["step"], row["loss"], row["lr"], row["grad_norm"]] for row in rows(run) if row["loss"]]
    return log, load_pretrained(run)[0].state_dict()


def assert_same_training(run, other):
    (log, weights), (other_log, other_weights) = trained(run), trained(other)
    assert log == other_log and len(log) == 8 and weights.keys() == other_weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    return pretrain(settings(digits, tmp_path_factory.mktemp("plain") / "run", probe=False))


@pytest.fixture(scope="module")
def watched(digits, tmp_path_factory):
    return pretrain(settings(digits, tmp_path_factory.mktemp("watched") / "run"))


# --- what is logged --------------------------------------------------------------------------------------------------


def test_steps_and_figures(watched):
    """After step 1, every 5th and the last step, which is no multiple: every feature, the chosen one and plain pixels."""
    found = measures(watched)
    assert list(found) == [0, 4, 9, 14, 16]
    for values in found.values():
        assert values.keys() == {f"knn/{name}" for name in (*FEATURES, "chosen", "pixels", "untrained")}
        assert all(0 <= value <= 1 for value in values.values())
        assert values["knn/chosen"] in [values[f"knn/{name}"] for name in FEATURES]
        assert values["knn/pixels"] == found[0]["knn/pixels"] > 0.5
        assert values["knn/untrained"] == found[0]["knn/untrained"] > 0.3
    assert found[0] != found[16]
    assert all(float(row["probe_s"]) > 0 for row in rows(watched) if row["probe_s"])


def test_figures_are_those_of_the_exported_encoder(watched, digits):
    """The command, which reads images and weights from the disk, computes the same accuracies."""
    report = compare(read_encoder(watched), Comparison(str(digits.labeled), "knn", 8, k=5), HERE, quiet=True)
    last = measures(watched)[16]
    for row in report.draws[0].rows:
        name = "pixels" if row.name.startswith("pixels") else row.name.replace(", ", ".").replace(" ", "")
        assert last[f"knn/{name}"] == pytest.approx(row.knn, abs=1.1 / 60), name
    agree = [last[f"knn/{row.name.replace(', ', '.').replace(' ', '')}"] == row.knn for row in report.draws[0].rows[:-1]]
    assert sum(agree) >= 5, "exactly, except for an image between two classes in one feature"
    assert last["knn/chosen"] == pytest.approx(report.draws[0].best.knn, abs=0.02)
    assert last["knn/untrained"] == pytest.approx(report.draws[0].untrained.knn, abs=1.1 / 60)


def test_tensorboard_groups_and_describes_them(watched):
    events = EventAccumulator(str(watched / "tensorboard"))
    events.Reload()
    for name in ("final", "chosen", "pixels", "stage0.2x2"):
        points = events.Scalars(f"knn/{name}")
        assert {point.step: point.value for point in points} == pytest.approx(
            {step: values[f"knn/{name}"] for step, values in measures(watched).items()}
        )
        assert "nearest labeled neighbors" in events.SummaryMetadata(f"knn/{name}").summary_description
    assert "seconds" in events.SummaryMetadata("speed/probe_s").summary_description


def test_logistic_regression(digits, tmp_path, capsys):
    """The other method with a limit on images, which the summary names; the latest accuracy is beside the progress bar."""
    probe = {"method": "probe", "labels_per_class": None, "max_images": 40, "every_epochs": None}
    run = pretrain(settings(digits, tmp_path / "run", probe, epochs=2 * 32 / 240))
    out, err = capsys.readouterr()
    assert "probe    logistic regression on 40 of 240 labeled images, tested on 40 of 60, every step" in out
    assert "probe=0." in err
    closing = (
        r"logistic regression on the labeled images: .*% by chosen features, plain pixels .*%, the same encoder untrained"
    )
    assert re.search(closing, out) and "Pre-training has not helped yet" in out and "240 images are few" in out
    found = measures(run)
    assert list(found) == [0, 1] and {"probe/chosen", "probe/pixels", "probe/final.2x2"} <= found[1].keys()
    assert not any(name.startswith("knn") for name in found[1])
    counts = {round(value * 40, 6) for value in found[1].values()}
    assert all(count == round(count) for count in counts), "shares of 40 images"


# --- training is left alone ------------------------------------------------------------------------------------------


def test_weights_and_losses_are_the_same_without_it(watched, plain):
    assert_same_training(watched, plain)
    assert not any(name.startswith("knn") for name in rows(plain)[0]) and "probe_s" not in rows(plain)[0]


def test_global_state_is_left_alone(digits, plain, tmp_path, monkeypatch):
    """Random generators and modes are the same after each measure, with images that a process reads each time."""
    measure, steps = LabeledProbe.measure, []

    def state(module):
        modes = {name: part.training for name, part in module.named_modules()}
        drawn = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return modes, drawn, torch.is_grad_enabled()

    def compared(self, trainer, module):
        before = state(module)
        measure(self, trainer, module)
        assert state(module) == before
        assert all(not isinstance(views, list) for views in self.views)
        steps.append(trainer.global_step)

    monkeypatch.setattr(labeled_probe, "KEEP_VIEWS_MIB", 0)
    monkeypatch.setattr(LabeledProbe, "measure", compared)
    run = pretrain(settings(digits, tmp_path / "run", workers=1))
    assert steps == [1, 5, 10, 15, 17]
    assert_same_training(run, plain)


def test_a_resumed_run_has_the_measures_of_an_uninterrupted_one(digits, watched, tmp_path, power_cut):
    with power_cut(after_step=11):
        pretrain(settings(digits, tmp_path / "run"))
    run = pretrain(settings(digits, tmp_path / "run", resume=True))
    assert_same_training(run, watched)
    assert measures(run) == measures(watched)
    before = (run / "metrics.csv").read_text()
    pretrain(settings(digits, tmp_path / "run", resume=True))
    assert (run / "metrics.csv").read_text() == before, "a finished run adds nothing"


def test_a_resumed_run_may_add_the_probe(digits, plain, tmp_path):
    """The settings of the probe may change on resume."""
    shutil.copytree(plain, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        if "12" not in checkpoint.name:
            checkpoint.unlink()
    run = pretrain(settings(digits, tmp_path / "run", resume=True))
    assert_same_training(run, plain)
    assert list(measures(run)) == [14, 16]


def test_half_precision(digits, tmp_path):
    """The probe computes in the precision of training, and does not change training in bfloat16."""
    common = {"precision": "bf16-mixed", "epochs": 6 * 32 / 240}
    runs = [pretrain(settings(digits, tmp_path / str(probe), probe, **common)) for probe in (True, False)]
    (log, weights), (other_log, other) = map(trained, runs)
    assert log == other_log and all(torch.equal(value, other[name]) for name, value in weights.items())
    assert measures(runs[0])[5]["knn/final.2x2"] > 0.2


def test_its_time_is_not_counted_as_training_or_waiting(digits, tmp_path, monkeypatch):
    """Measures take a second, steps take milliseconds."""
    values = LabeledProbe.accuracies
    monkeypatch.setattr(LabeledProbe, "accuracies", lambda self, embedded: time.sleep(1.0) or values(self, embedded))
    run = pretrain(settings(digits, tmp_path / "run", epochs=8 * 32 / 240, log_every_steps=1))
    table = rows(run)
    assert [int(row["step"]) for row in table if row["probe_s"]] == [0, 4, 7]
    assert all(1.0 <= float(row["probe_s"]) < 30 for row in table if row["probe_s"])
    after = {int(row["step"]): row for row in table}
    for step in (1, 5):
        assert float(after[step]["images_per_s"]) > 32 / 0.9 and float(after[step]["data_wait_share"]) < 0.95


def test_training_goes_on_after_a_failed_measure(digits, plain, tmp_path, monkeypatch, capsys):
    values = LabeledProbe.accuracies

    def fails(self, embedded):
        if self.step == 5:
            raise ValueError("train vector 3 is not finite")
        return values(self, embedded)

    monkeypatch.setattr(LabeledProbe, "accuracies", fails)
    run = pretrain(settings(digits, tmp_path / "run"))
    assert "no measure on labeled images at step 5: train vector 3 is not finite" in capsys.readouterr().out
    assert list(measures(run)) == [0, 9, 14, 16]
    assert_same_training(run, plain)


# --- labeled data ----------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_left_out(digits, tmp_path, capsys):
    shutil.copytree(digits.labeled, tmp_path / "labeled")
    torn = next((tmp_path / "labeled" / "test" / "7").iterdir())
    torn.write_bytes(b"")
    probe = {"data": str(tmp_path / "labeled"), "labels_per_class": None}
    run = pretrain(settings(digits, tmp_path / "run", probe, epochs=32 / 240))
    assert f"1 cannot be read, the first, {torn}: empty file" in capsys.readouterr().out
    found = measures(run)[0]
    assert all(round(59 * value, 6) == round(59 * value) for value in found.values()), "shares of 59 images"


def test_labeled_data_that_cannot_be_used(digits, tmp_path):
    """The run stops before anything is written."""
    for path in (tmp_path / "torn" / part / name for part in ("train", "test") for name in "ab"):
        path.mkdir(parents=True)
        (path / "1.png").write_bytes(b"no image")
    shutil.copytree(digits.labeled / "train", tmp_path / "half" / "train")
    shutil.copytree(tmp_path / "torn" / "test" / "a", tmp_path / "half" / "test" / "0")
    for probe, said in (
        ({"data": str(tmp_path / "absent")}, "does not exist"),
        ({"data": str(tmp_path / "torn"), "labels_per_class": 1}, "none of 2 images can be read; the first, .*1.png: not"),
        ({"data": str(tmp_path / "half")}, "give at least two, each with the images of one class"),
    ):
        with pytest.raises(ValueError, match=said):
            pretrain(settings(digits, tmp_path / "run", probe))
        assert not (tmp_path / "run").exists()
    for wrong, said in (
        ({"method": "svm"}, "unknown probe.method 'svm'"),
        ({"every_epochs": 0}, "probe.every_epochs is 0: give a positive number"),
        ({"max_images": -1}, "probe.max_images is -1"),
    ):
        with pytest.raises(ValueError, match=said):
            ProbeSettings(**wrong)


# --- several devices -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """One process without a probe, and without stochastic depth, whose draws depend on the process."""
    model = SimMIMSettings(mask_unit=8, encoder={**SMALL.encoder, "drop_path_rate": 0.0})
    return pretrain(settings(digits, tmp_path_factory.mktemp("alone") / "run", probe=False, model=model))


@pytest.mark.two_processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(fork_server, digits, alone, tmp_path, strategy):
    """Training is that of one process without a probe, and accuracies are those of the exported encoder."""
    run = tmp_path / "run"
    words = [
        "pretrain",
        "--data",
        digits.unlabeled,
        "--out",
        run,
        "--preset=nano",
        f"--epochs={17 * 32 / 240}",
        "--batch-size=32",
        "--save_every_steps=6",
        "--log_every_steps=2",
        "--workers=0",
        "--precision=32-true",
        "--model.mask_unit=8",
        "--model.encoder.embed_dim=16",
        "--model.encoder.depths=[1,1]",
        "--model.encoder.num_heads=[1,2]",
        "--trainer.accelerator=cpu",
        "--devices=2",
        f"--trainer.strategy={strategy}",
        "--probe.data",
        digits.labeled,
        f"--probe.every-epochs={EVERY_5}",
        "--probe.labels-per-class=8",
    ]
    finish(fork_server.start_pair(*words))
    (log, weights), (other_log, other_weights) = trained(run), trained(alone)
    assert np.allclose(np.array(log, float)[:, :3], np.array(other_log, float)[:, :3], rtol=1e-5, atol=1e-9)
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=0, atol=1e-4)
    found = measures(run)
    assert list(found) == [0, 4, 9, 14, 16]
    report = compare(read_encoder(run), Comparison(str(digits.labeled), "knn", 8), HERE, quiet=True)
    for row in report.draws[0].rows[:-1]:
        name = row.name.replace(", ", ".").replace(" ", "")
        assert found[16][f"knn/{name}"] == pytest.approx(row.knn, abs=1.1 / 60), name
