"""What version 0.1.0 wrote loads, resumes and predicts as it did there. tests/data/legacy-0.1/make.py made the files.

Numbers of 0.1.0 are compared within tolerances: another processor sums in another order.
"""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from simmim import load_encoder
from simmim.cli import main
from simmim.finetune import load_classifier, load_segmenter

LEGACY = Path(__file__).resolve().parent / "data" / "legacy-0.1"
ENCODERS = ("encoder", "pretrain", "classifier", "classifier-interrupted", "segmenter")


@pytest.fixture(autouse=True)
def _legacy(tmp_path, monkeypatch):
    """The current directory is a copy of the folder, as the paths in the runs' settings are relative to it."""
    shutil.copytree(LEGACY, tmp_path / "legacy")
    monkeypatch.chdir(tmp_path / "legacy")


@pytest.fixture
def _kornia():
    """Skip where the library that jitters colors is missing."""
    pytest.importorskip("kornia")


def rows_of(*path):
    """A CSV file as dicts."""
    with Path(*path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics(run):
    return rows_of(run, "metrics.csv")


def last_checkpoint(run):
    return torch.load(Path(run, "checkpoints", "last.ckpt"), map_location="cpu", weights_only=True)


def state_with(name, checkpoint):
    """That entry of the callback that has one."""
    return next(state[name] for state in checkpoint["callbacks"].values() if name in state)


def exported(run):
    """Encoder, and mask token and decoder or the head, as a run exported them."""
    folder = Path(run, "encoder")
    state = {f"encoder.{name}": value for name, value in load_file(folder / "encoder.safetensors").items()}
    for file, prefix in (("pretraining", ""), ("head", "head.")):
        if (folder / f"{file}.safetensors").is_file():
            state |= {prefix + name: value for name, value in load_file(folder / f"{file}.safetensors").items()}
    return state


def assert_same_weights(found, expected, atol=1e-5, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


# --- Pre-training ------------------------------------------------------------------------------------------------------


def test_pretraining_resumes():
    """Twelve steps, seven of them by 0.1.0. The end is that of 0.1.0 without an interruption."""
    before, begun = metrics("pretrain"), exported("pretrain")
    assert main(["pretrain", "--out", "pretrain", "--resume"]) == 0
    finished = load_file("pretrain-finished.safetensors")
    assert_same_weights(exported("pretrain"), finished)
    # Far beyond the tolerance, every tensor has changed since the interruption.
    assert all((begun[name] - value).abs().max() > 1e-4 for name, value in finished.items())
    end = last_checkpoint("pretrain")
    assert end["global_step"] == 12
    assert_same_weights({name.removeprefix("model."): value for name, value in end["state_dict"].items()}, finished)
    # The first measure of activations, with which later ones are compared.
    assert state_with("first", end)["step"] == 0
    rows = metrics("pretrain")
    assert [int(row["step"]) for row in rows] == list(range(12))
    assert rows[: len(before)] == before


def test_the_count_of_skipped_steps_goes_on():
    """0.1.0 skipped one step whose loss was not finite."""
    listed = Path("pretrain/non-finite-steps.txt").read_text(encoding="utf-8")
    assert main(["pretrain", "--out", "pretrain", "--resume"]) == 0
    assert Path("pretrain/non-finite-steps.txt").read_text(encoding="utf-8") == listed
    assert {int(row["skipped_steps"]) for row in metrics("pretrain")[-5:]} == {1}


def test_an_unfinished_run_reconstructs():
    """Mask token and decoder come from the checkpoint."""
    assert main(["reconstruct", "--run", "pretrain", "--images", "images", "--out", "grid.png", "--count", "2"]) == 0
    assert Path("grid.png").is_file()


# --- Encoders ----------------------------------------------------------------------------------------------------------


def test_features_of_an_exported_encoder():
    expected = load_file("features.safetensors")
    encoder = load_encoder("encoder")
    with torch.no_grad():
        pooled = encoder.features(expected["images"])
        stages = encoder.features(expected["images"], per_stage=True)
    torch.testing.assert_close(pooled, expected["pooled"], atol=1e-4, rtol=0)
    assert len(stages) == 2
    for number, stage in enumerate(stages):
        torch.testing.assert_close(stage, expected[f"stages.{number}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", ENCODERS)
def test_every_encoder_loads(path):
    """An exported folder, and runs of every kind, finished or not."""
    folder = Path(path, "encoder") if path != "encoder" else Path(path)
    state = load_encoder(path).state_dict()
    assert_same_weights(state, load_file(folder / "encoder.safetensors"), atol=0, rtol=0)


@pytest.mark.parametrize("path", ENCODERS)
def test_every_encoder_is_inspected(path, capsys):
    assert main(["inspect", path]) == 0
    assert "SimMIM" in capsys.readouterr().out  # of the provenance


# --- Classification ----------------------------------------------------------------------------------------------------


def test_a_classifier_loads():
    saved = load_classifier("classifier")
    assert saved.classes == ("cross", "disk")
    assert saved.preprocessing.image_size == (32, 32)
    assert_same_weights(saved.model.state_dict(), exported("classifier"), atol=0, rtol=0)


def test_a_classifier_predicts():
    assert main(["predict", "--run", "classifier", "--images", "images", "--out", "found.csv", "--workers", "0"]) == 0
    found, expected = rows_of("found.csv"), rows_of("classifier-predictions.csv")
    assert len(found) == len(expected) == 12
    for row, old in zip(found, expected):
        assert Path(row["path"]).name == Path(old["path"]).name and row["class"] == old["class"]
        for name in ("probability cross", "probability disk"):
            assert abs(float(row[name]) - float(old[name])) < 1e-4


@pytest.mark.usefixtures("_kornia")
def test_classification_resumes():
    """The weights' average, the best value and the count of patience go on: the run stops at the step where it stopped in
    0.1.0, and the best model stays the one from before the interruption."""
    best, before = exported("classifier-interrupted"), metrics("classifier-interrupted")
    assert main(["finetune", "classification", "--out", "classifier-interrupted", "--resume"]) == 0
    expected = load_file("classifier-finished.safetensors")
    end = last_checkpoint("classifier-interrupted")
    assert end["global_step"] == expected.pop("step").item() == 10
    assert_same_weights(state_with("average", end), expected)
    assert_same_weights(exported("classifier-interrupted"), best, atol=0, rtol=0)
    assert metrics("classifier-interrupted")[: len(before)] == before


# --- Segmentation ------------------------------------------------------------------------------------------------------


def test_a_segmenter_loads():
    saved, expected = load_segmenter("segmenter"), load_file("segmenter-logits.safetensors")
    assert saved.scheme.classes == ("background", "cross", "disk")
    torch.testing.assert_close(saved.logits(expected["image"]), expected["logits"], atol=1e-4, rtol=1e-4)


def test_a_segmenter_predicts():
    assert main(["predict", "--run", "segmenter", "--images", "scenes/val/images", "--out", "found"]) == 0
    masks = [np.asarray(Image.open(f"found/masks/{number}.png")) for number in range(2)]
    assert all(mask.shape == (32, 32) for mask in masks)
    # The disk is found and the cross, of a few pixels, is not.
    assert set(np.unique(masks[1])) == {0, 2}


# --- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_kornia")
@pytest.mark.parametrize("task, run, jitter", [("classification", "classifier", 0.3), ("segmentation", "segmenter", 0.2)])
def test_settings_start_a_new_run(task, run, jitter):
    """Their colour_jitter is written as color_jitter from now on."""
    written = yaml.safe_load(Path(run, "config.yaml").read_text(encoding="utf-8"))
    assert written["data"]["colour_jitter"] == jitter
    assert main(["finetune", task, "--config", f"{run}/config.yaml", "--out", "again"]) == 0
    settings = yaml.safe_load(Path("again/config.yaml").read_text(encoding="utf-8"))
    assert settings["data"]["color_jitter"] == jitter
    assert "colour_jitter" not in settings["data"]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_old_spelling_on_the_command_line(task, capsys):
    words = ["finetune", task, "--data", "labeled", "--out", "again", "--data.colour_jitter", "0.25", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    assert "color_jitter: 0.25" in capsys.readouterr().out
