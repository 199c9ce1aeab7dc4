"""Pre-training with several images on a canvas, as a whole: by the command, resumed, on two devices, and what comes out."""

import json
import shutil

import pytest
import torch
from fork_server import finish
from PIL import Image
from safetensors.torch import load_file

from simmim import load_encoder
from simmim.cli import main
from simmim.pretrain import load_pretrained
from simmim.training.saving import saved_steps

SMALL = (
    "--method=canvas",
    "--model.share=3",
    "--preset=nano",
    "--image-size=32",
    "--batch-size=24",
    "--epochs=1",
    "--seed=3",
    "--workers=0",
    "--precision=32-true",
    "--save_every_steps=5",
    "--log_every_steps=1",
    "--model.encoder.embed_dim=16",
    "--model.encoder.depths=[1,2]",
    "--model.encoder.num_heads=[1,2]",
)
WORDS = (*SMALL, "--model.encoder.drop_path_rate=0.2", "--model.checkpoint_activations=true")


def simmim(*words):
    """Run the command, which must succeed."""
    assert main([str(word) for word in words]) == 0, words


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run of ten steps, with a probe that watches it."""
    folder = tmp_path_factory.mktemp("canvas") / "run"
    simmim("pretrain", "--data", digits.unlabeled, "--out", folder, *WORDS, "--probe.data", digits.labeled)
    return folder


def test_what_comes_out_is_a_plain_encoder(run, digits, tmp_path):
    """It says how it was trained, and fine-tuning takes it like any other."""
    description = json.loads((run / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert description["method"] == "canvas"
    own = {"share": 3, "mask_unit": 8, "decoder_dim": 32, "decoder_depth": 1, "norm_target_patch": None}
    assert own.items() <= description["provenance"].items()
    encoder, trained = load_encoder(run), load_pretrained(run)[0].encoder
    assert all(map(torch.equal, encoder.state_dict().values(), trained.state_dict().values()))
    assert encoder(torch.zeros(1, 1, 40, 40)).pooled.shape == (1, 32)
    words = ("--data", digits.labeled, "--init", run, "--epochs", "1", "--batch-size", "40", "--workers", "0")
    simmim("finetune", "classification", "--out", tmp_path / "labeled", *words)
    simmim("export", "--run", run, "--format", "timm", "--out", tmp_path / "timm")


def test_metrics_pictures_and_the_probe(run, digits, tmp_path):
    """Eight images in a picture, which three do not divide, and any number by the command."""
    header, *rows = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 10 and "loss" in header.split(",")
    assert list((run / "reconstructions").glob("step-*.png"))
    for count in (1, 4):
        picture = tmp_path / f"{count}.png"
        simmim("reconstruct", "--run", run, "--images", digits.unlabeled, "--out", picture, "--count", count)
        assert Image.open(picture).width > 0


def test_resumed_equals_uninterrupted(run, digits, tmp_path, power_cut):
    """Bit for bit, in the method's own state too."""
    words = ["pretrain", "--data", digits.unlabeled, "--out", tmp_path / "run", *WORDS]
    with power_cut(after_step=7):
        main([str(word) for word in words])
    assert saved_steps(tmp_path / "run").keys() == {5}, "it goes on from there"
    simmim("pretrain", "--out", tmp_path / "run", "--resume")
    ours, theirs = (load_pretrained(folder)[0].state_dict() for folder in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_late_mask_tokens(digits, tmp_path, power_cut, capsys):
    """Of mask units smaller than the last stride: said, resumed bit for bit, exported as a plain encoder, gone on from."""
    words = ["pretrain", "--data", digits.unlabeled, *WORDS, "--model.mask_unit=4"]
    simmim(*words, "--out", tmp_path / "whole")
    assert "64 units of 4 px masked, mask tokens after stage 1 of 2" in capsys.readouterr().out
    with power_cut(after_step=7):
        main([str(word) for word in (*words, "--out", tmp_path / "run")])
    simmim("pretrain", "--out", tmp_path / "run", "--resume")
    ours, theirs = (load_pretrained(tmp_path / name)[0].state_dict() for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    description = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text(encoding="utf-8"))
    own = {"mask_unit": 4, "shared_stages": 1, "decoder_dim": None}
    assert own.items() <= description["provenance"].items()
    assert load_encoder(tmp_path / "run")(torch.zeros(1, 1, 40, 40)).pooled.shape == (1, 32)
    again = (*words, "--epochs=0.2", "--init", tmp_path / "run", "--out", tmp_path / "again")
    simmim(*(word for word in again if not str(word).startswith(("--preset", "--model.encoder"))))
    assert "loaded     mask token and decoder" in capsys.readouterr().out


def test_pretraining_goes_on_from_it(run, digits, tmp_path, capsys):
    """With its mask token and decoder; with fresh ones under another method or another decoder."""
    words = ("pretrain", "--data", digits.unlabeled, "--init", run, "--epochs=0.1", "--batch-size=24", "--workers=0")
    for name, more, expected in (
        ("same", ("--method=canvas", "--model.share=2"), "loaded     mask token and decoder"),
        ("wider", ("--method=canvas", "--model.decoder_dim=64"), "decoder are fresh: those of the source have other shapes"),
        ("simmim", ("--method=simmim",), "mask token and decoder are fresh: the source was trained by canvas"),
    ):
        simmim(*words, "--out", tmp_path / name, *more)
        assert expected in capsys.readouterr().out


def test_a_decoder_that_does_not_fit_is_refused(run, tmp_path, capsys):
    """By the shapes that the provenance states."""
    shutil.copytree(run / "encoder", tmp_path / "encoder")
    path = tmp_path / "encoder" / "config.json"
    for value, expected in ((64, "pretraining.safetensors does not fit"), ("x", "does not fit")):
        description = json.loads(path.read_text(encoding="utf-8"))
        description["provenance"]["decoder_dim"] = value
        path.write_text(json.dumps(description), encoding="utf-8")
        assert main(["inspect", str(tmp_path / "encoder")]) == 2
        assert expected in capsys.readouterr().err


@pytest.fixture(scope="module")
def alone(fork_server, digits, tmp_path_factory):
    """The encoder of a run on one device, for comparison with two."""
    out = tmp_path_factory.mktemp("alone") / "run"
    words = ("pretrain", "--data", digits.unlabeled, *SMALL, "--trainer.accelerator=cpu", "--out", out, "--devices=1")
    finish([fork_server.start(*words)])
    return load_file(out / "encoder" / "encoder.safetensors")


@pytest.mark.two_processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_equal_one(fork_server, alone, digits, tmp_path, strategy):
    """Four canvases a device in place of eight: the same canvases, losses and weights, but for the order of sums."""
    words = ("pretrain", "--data", digits.unlabeled, *SMALL, "--trainer.accelerator=cpu", "--out", tmp_path / "run")
    finish(fork_server.start_pair(*words, "--devices=2", f"--trainer.strategy={strategy}"))
    two = load_file(tmp_path / "run" / "encoder" / "encoder.safetensors")
    torch.testing.assert_close(two, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--model.mask_unit=6",), "model.mask_unit is 6 px and the last stage on canvases has a token for 4 px"),
        (("--model.mask_unit=4", "--model.decoder_dim=32"), "where there is no decoder: leave out model.decoder_dim"),
        (("--model.share=17",), "model.share is 17 and images of 32×32 px have 16 mask units of 8 px"),
        (("--batch-size=25",), "batch_size is 25 on 1 device × 1 accumulated batches, and the encoder takes 3 images"),
        (("--batch-size=24", "--optim.accumulate=3"), "give a multiple of 9"),
        (("--model.mask_ratio=0.6",), "model.mask_ratio is no setting here: model.share decides"),
        (("--model.encoder.window_size=3",), "window_size is 3, which pads the maps"),
    ],
)
def test_wrong_input(words, message, digits, tmp_path, capsys):
    """One line, exit code 2, and nothing is written."""
    out = tmp_path / "run"
    assert main(["pretrain", "--data", str(digits.unlabeled), "--out", str(out), *SMALL, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()


def test_a_plan_by_the_command(capsys):
    simmim("plan", "--preset", "tiny", "--image", "192", "--method", "canvas", "--model.share", "4")
    assert "1.86 GFLOPs per image forward" in capsys.readouterr().out
    assert main(["plan", "--preset", "tiny", "--image", "192", "--method", "canvas", "--model.mask_ratio", "0.6"]) == 2
    assert "model.share decides" in capsys.readouterr().err
    assert main(["plan", "--preset", "tiny", "--image", "192", "--model.share", "3"]) == 2
    assert "model.share is no setting of simmim: images share a canvas with --method canvas" in capsys.readouterr().err
