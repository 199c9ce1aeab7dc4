"""Training goes on from a checkpoint of any format."""

from dataclasses import replace

import pytest
import torch
from conversion import CLASSES, RELEASED, SMALL, random_checkpoint, refused, same_tensors

from simmim.checkpoints import read
from simmim.checkpoints.export import export
from simmim.checkpoints.own_files import save_checkpoint
from simmim.cli import main


def first_weights(monkeypatch, module_class):
    """The state of the model before the first step of the next run, in a dict that fills when it starts."""
    seen, setup = {}, module_class.configure_optimizers

    def spy(self):
        seen.update({name: value.clone() for name, value in self.model.state_dict().items()})
        return setup(self)

    monkeypatch.setattr(module_class, "configure_optimizers", spy)
    return seen


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
def test_pretraining_goes_on_from(format, form, gray_checkpoint, digits, tmp_path, monkeypatch, capsys):
    """Two steps more. Before the first the weights are the source's: encoder, and where the file has them mask token and
    decoder; the report says which."""
    from simmim.pretrain.module import PretrainingModule

    folder = export(gray_checkpoint, format, tmp_path / "source", form).folder
    seen = first_weights(monkeypatch, PretrainingModule)
    assert main(pretrain_words(digits, tmp_path / "run", folder)) == 0
    out, encoder = capsys.readouterr().out, {f"encoder.{name}": value for name, value in gray_checkpoint.encoder.items()}
    expected = encoder if format == "timm" else encoder | gray_checkpoint.pretraining
    assert same_tensors({name: seen[name] for name in expected}, expected)
    assert ("loaded     mask token and decoder" in out) == (format != "timm")
    assert ("missing    mask token and decoder: fresh" in out) == (format == "timm")
    assert seen.keys() == encoder.keys() | gray_checkpoint.pretraining.keys()
    after = read(tmp_path / "run")
    assert after.config == replace(gray_checkpoint.config, shift_before_padding=after.config.shift_before_padding)
    assert after.provenance["init"] == "source" and not same_tensors(after.encoder, gray_checkpoint.encoder)
    assert after.preprocessing.mean == (0.3,)


def test_pretraining_goes_on_from_the_authors_file(digits, tmp_path, monkeypatch, capsys):
    """Gray digits are read as the three channels that the encoder takes."""
    from simmim.pretrain.module import PretrainingModule

    seen = first_weights(monkeypatch, PretrainingModule)
    assert main(pretrain_words(digits, tmp_path / "run", RELEASED, "--image-size", "64")) == 0
    assert "loaded     mask token and decoder" in capsys.readouterr().out
    checkpoint = read(RELEASED)
    expected = {f"encoder.{name}": value for name, value in checkpoint.encoder.items()} | checkpoint.pretraining
    assert same_tensors(seen, expected)
    assert read(tmp_path / "run").config == replace(checkpoint.config, window_size=4)


def test_pretraining_adapts_another_channel_count(gray_checkpoint, digits, tmp_path, monkeypatch, capsys):
    """Three channels of an encoder of one: the projection is a third for each, the decoder fresh, and the report says so."""
    from simmim.pretrain.module import PretrainingModule

    folder = save_checkpoint(tmp_path / "source", gray_checkpoint)
    seen = first_weights(monkeypatch, PretrainingModule)
    assert main(pretrain_words(digits, tmp_path / "run", folder, "--data.channels", "3")) == 0
    out = capsys.readouterr().out
    assert "adapted    1 input channels to 3" in out and "adapted    mask token and decoder are fresh" in out
    weight = gray_checkpoint.encoder["patch_embed.proj.weight"]
    torch.testing.assert_close(seen["encoder.patch_embed.proj.weight"], weight.repeat(1, 3, 1, 1) / 3)
    assert seen["decoder.weight"].shape == (8 * 8 * 3, 16)


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
    "classes, said",
    [
        (tuple("0123456789"), "adapted    head of the same 10 classes loaded"),
        (tuple("9876543210"), "adapted    head of 10 classes replaced by a fresh one of 10"),
        (CLASSES, "adapted    head of 3 classes replaced by a fresh one of 10"),
        ((), ""),
    ],
)
def test_finetuning_keeps_the_head_of_the_same_classes(classes, said, digits, tmp_path, monkeypatch, capsys):
    from simmim.finetune.classification.module import ClassificationFinetuning

    checkpoint = random_checkpoint(replace(SMALL, in_channels=1), (32, 32), classes)
    folder = export(checkpoint, "timm", tmp_path / "source").folder
    seen = first_weights(monkeypatch, ClassificationFinetuning)
    assert main(finetune_words(digits, tmp_path / "run", folder)) == 0
    out = capsys.readouterr().out
    assert said in out and ("head of" in out) == bool(said)
    assert same_tensors({name: seen[f"encoder.{name}"] for name in checkpoint.encoder}, checkpoint.encoder)
    kept = bool(classes) and same_tensors({name: seen[f"head.{name}"] for name in checkpoint.head}, checkpoint.head)
    assert kept == (classes == tuple("0123456789"))


def test_the_encoder_trains_in_training_mode(gray_checkpoint, digits, tmp_path, monkeypatch):
    """Stochastic depth acts on an encoder that was read, as on a fresh one."""
    from simmim.finetune.classification.module import ClassificationFinetuning

    modes, step = set(), ClassificationFinetuning.training_step

    def spy(self, *batch):
        modes.update(module.training for module in self.model.modules())
        return step(self, *batch)

    monkeypatch.setattr(ClassificationFinetuning, "training_step", spy)
    folder = save_checkpoint(tmp_path / "source", gray_checkpoint)
    assert main(finetune_words(digits, tmp_path / "run", folder)) == 0
    assert modes == {True}


def test_finetuning_reports_a_moved_window(gray_checkpoint, digits, tmp_path, capsys):
    folder = export(gray_checkpoint, "official", tmp_path / "source", "simmim").folder
    assert main(finetune_words(digits, tmp_path / "run", folder, "--image-size", "64")) == 0
    assert "adapted    window 4 to 8, position bias scaled by the pre-trained windows 4, 4" in capsys.readouterr().out
    assert read(tmp_path / "run").config.pretrained_window_sizes == (4, 4)
