"""Training goes on from a checkpoint of any format."""

import csv
import shutil
from dataclasses import replace

import pytest
import torch
from conversion import CLASSES, RELEASED, SMALL, random_checkpoint, refused, same_tensors

from simmim.checkpoints import read
from simmim.checkpoints.export import export
from simmim.checkpoints.own_files import save_checkpoint
from simmim.cli import main
from simmim.pretrain import DataSettings, PretrainSettings, preparation
from simmim.pretrain.preparation import resolve_length
from simmim.training.run_folder import CONFIG, LAST, as_yaml, checkpoints_folder

# Steps that are too small to change a float32 value: a run exports the weights that it began with.
STANDING_STILL = ("--optim.lr", "1e-30")


def assert_begun_with(actual, expected):
    """The same names and values; zeros have moved by less than 1e-20."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() < 1e-20, name


def pretrain_words(digits, out, init, *more):
    return [
        "pretrain",
        "--data",
        str(digits.unlabeled),
        "--out",
        str(out),
        "--init",
        str(init),
        "--epochs",
        "0.03",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--model.mask-unit",
        "8",
        *more,
    ]


@pytest.fixture(scope="module")
def gray_checkpoint():
    return random_checkpoint(replace(SMALL, in_channels=1), (32, 32), ())


@pytest.mark.parametrize(
    "format, form", [("safetensors", "encoder"), ("official", "simmim"), ("hf", "simmim"), ("timm", "encoder")]
)
def test_pretraining_goes_on_from(format, form, gray_checkpoint, digits, tmp_path, capsys):
    """It begins with the source's weights: the encoder, and mask token and decoder if the file has them; the report says
    which."""
    folder = export(gray_checkpoint, format, tmp_path / "source", form).folder
    assert main(pretrain_words(digits, tmp_path / "run", folder, *STANDING_STILL)) == 0
    out, after = capsys.readouterr().out, read(tmp_path / "run")
    assert_begun_with(after.encoder, gray_checkpoint.encoder)
    assert after.pretraining.keys() == gray_checkpoint.pretraining.keys()
    if format == "timm":
        assert "missing    mask token and decoder: fresh" in out and "loaded     mask token" not in out
    else:
        assert "loaded     mask token and decoder" in out and "missing" not in out
        assert_begun_with(after.pretraining, gray_checkpoint.pretraining)
    assert after.config == replace(gray_checkpoint.config, shift_before_padding=after.config.shift_before_padding)
    assert after.provenance["init"] == "source" and after.preprocessing.mean == (0.3,)


def test_pretraining_goes_on_from_the_authors_file(digits, tmp_path, capsys):
    """Gray digits are read as the three channels that the encoder takes."""
    words = pretrain_words(digits, tmp_path / "run", RELEASED, "--image-size", "64", *STANDING_STILL)
    assert main(words) == 0
    assert "loaded     mask token and decoder" in capsys.readouterr().out
    before, after = read(RELEASED), read(tmp_path / "run")
    assert_begun_with(after.encoder | after.pretraining, before.encoder | before.pretraining)
    assert after.config == replace(before.config, window_size=4)


def test_pretraining_adapts_another_channel_count(gray_checkpoint, digits, tmp_path, capsys):
    """Three channels of an encoder of one: the projection is a third for each, the decoder fresh, and the report says so."""
    folder = save_checkpoint(tmp_path / "source", gray_checkpoint)
    assert main(pretrain_words(digits, tmp_path / "run", folder, "--data.channels", "3", *STANDING_STILL)) == 0
    out, after = capsys.readouterr().out, read(tmp_path / "run")
    assert "adapted    1 input channels to 3" in out and "adapted    mask token and decoder are fresh" in out
    weight = gray_checkpoint.encoder["patch_embed.proj.weight"]
    torch.testing.assert_close(after.encoder["patch_embed.proj.weight"], weight.repeat(1, 3, 1, 1) / 3)
    assert after.pretraining["decoder.weight"].shape == (8 * 8 * 3, 16)


@pytest.mark.parametrize("growing", [{}, {"image_sizes": (16, 32)}])
def test_resumed_settings_are_complete_without_the_encoder(growing, gray_checkpoint, digits, tmp_path, monkeypatch):
    """In Python, where a script gives the same settings again: architecture, and room on the disk, are those of the run."""
    begun = export(gray_checkpoint, "safetensors", tmp_path / "source", "encoder").folder
    data, out = DataSettings(str(digits.unlabeled)), tmp_path / "run"
    given = PretrainSettings(data=data, out=str(out), init=str(begun), epochs=1.0, **growing)
    first = resolve_length(given)[0].settings
    first = replace(first, data=replace(first.data, cache="3GB"))
    checkpoints_folder(out).mkdir(parents=True)
    (out / CONFIG).write_text(as_yaml(first), encoding="utf-8")
    (checkpoints_folder(out) / LAST).touch()
    shutil.rmtree(begun)
    monkeypatch.setattr(preparation, "resolve_cache", lambda settings, *others: (settings, None))  # digits are not kept
    resumed = resolve_length(replace(given, resume=True))[0].settings
    assert as_yaml(resumed) == as_yaml(first)


def test_a_preset_and_an_encoder_exclude_each_other(digits, tmp_path, capsys):
    words = pretrain_words(digits, tmp_path / "run", RELEASED, "--preset", "nano")
    refused(words, ["preset describes a fresh encoder", "init brings its own: give one of them"], tmp_path, capsys)


def finetune_words(digits, out, init, *more):
    return [
        "finetune",
        "classification",
        "--data",
        str(digits.labeled),
        "--out",
        str(out),
        "--init",
        str(init),
        "--labels-per-class",
        "1",
        "--steps",
        "1",
        "--batch-size",
        "5",
        "--workers",
        "0",
        *more,
    ]


@pytest.mark.parametrize(
    "classes, message",
    [
        (tuple("0123456789"), "adapted    head of the same 10 classes loaded"),
        (tuple("9876543210"), "adapted    head of 10 classes replaced by a fresh one of 10"),
        (CLASSES, "adapted    head of 3 classes replaced by a fresh one of 10"),
        ((), ""),
    ],
)
def test_finetuning_keeps_the_head_of_the_same_classes(classes, message, digits, tmp_path, capsys):
    checkpoint = random_checkpoint(replace(SMALL, in_channels=1), (32, 32), classes)
    folder = export(checkpoint, "timm", tmp_path / "source").folder
    assert main(finetune_words(digits, tmp_path / "run", folder, *STANDING_STILL)) == 0
    out, after = capsys.readouterr().out, read(tmp_path / "run")
    assert message in out and ("head of" in out) == bool(message)
    assert_begun_with(after.encoder, checkpoint.encoder)
    assert after.classes == tuple("0123456789")
    if classes == after.classes:
        assert_begun_with(after.head, checkpoint.head)
    elif classes:
        assert not same_tensors(after.head, checkpoint.head)


def test_stochastic_depth_acts_on_an_encoder_that_was_read(gray_checkpoint, digits, tmp_path):
    """It is read in evaluation mode and trained in training mode: the first loss depends on the rate."""
    folder, losses = save_checkpoint(tmp_path / "source", gray_checkpoint), []
    for rate in ("0", "0.99"):
        words = finetune_words(digits, tmp_path / rate, folder, "--encoder.drop-path-rate", rate)
        assert main(words) == 0
        with (tmp_path / rate / "metrics.csv").open(newline="") as file:
            losses.append(next(float(row["loss"]) for row in csv.DictReader(file) if row["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_finetuning_reports_a_moved_window(gray_checkpoint, digits, tmp_path, capsys):
    folder = export(gray_checkpoint, "official", tmp_path / "source", "simmim").folder
    assert main(finetune_words(digits, tmp_path / "run", folder, "--image-size", "64")) == 0
    assert "adapted    window 4 to 8, position bias scaled by the pre-trained windows 4, 4" in capsys.readouterr().out
    assert read(tmp_path / "run").config.pretrained_window_sizes == (4, 4)
