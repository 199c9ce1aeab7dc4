"""Pre-training with contrast as a whole: by the command, resumed, on two devices, and what comes out."""

import csv
import json

import pytest
import torch
from fork_server import finish
from PIL import Image
from safetensors.torch import load_file

from simmim import load_encoder
from simmim.cli import main
from simmim.methods.contrast import Contrast
from simmim.pretrain import PretrainSettings, calibration, load_pretrained
from simmim.pretrain.preparation import measure_step, resolve_run
from simmim.training.saving import saved_steps

SMALL = (
    "--method=contrast",
    "--model.projector_dim=16",
    "--model.projection_dim=8",
    "--model.mask_unit=8",
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
WORDS = (*SMALL, "--model.encoder.drop_path_rate=0.2", "--model.view_scale=0.75", "--data.validation=20")


def simmim(*words):
    """Run the command, which must succeed."""
    assert main([str(word) for word in words]) == 0, words


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run of nine steps."""
    folder = tmp_path_factory.mktemp("contrast") / "run"
    simmim("pretrain", "--data", digits.unlabeled, "--out", folder, *WORDS)
    return folder


def test_what_comes_out_is_a_plain_encoder(run, digits, tmp_path):
    """Without the momentum encoder. It says how it was trained, and fine-tuning takes it like any other."""
    description = json.loads((run / "encoder" / "config.json").read_text(encoding="utf-8"))
    own = {"contrast_weight": 0.5, "temperature": 0.2, "momentum": 0.99, "projector_dim": 16, "view_scale": 0.75}
    assert description["method"] == "contrast" and own.items() <= description["provenance"].items()
    assert "projector.0.weight" in load_file(run / "encoder" / "pretraining.safetensors")
    stored = [name for path in (run / "encoder").glob("*.safetensors") for name in load_file(path)]
    assert not any("momentum" in name for name in stored)
    encoder, trained = load_encoder(run), load_pretrained(run)[0].encoder
    assert encoder.state_dict().keys() == trained.state_dict().keys()
    words = ("--data", digits.labeled, "--init", run, "--epochs", "1", "--batch-size", "40", "--workers", "0")
    simmim("finetune", "classification", "--out", tmp_path / "labeled", *words)
    simmim("export", "--run", run, "--format", "timm", "--out", tmp_path / "timm")


def test_metrics_and_pictures(run, digits, tmp_path):
    """The loss and its parts at every step; held-out images have no other view, and their loss is of the pixels."""
    rows = metrics(run)
    for row in rows:
        loss, pixels, contrast, agreement = (float(row[name]) for name in ("loss", "masked_l1", "contrast", "agreement"))
        assert loss == pytest.approx(pixels + 0.5 * contrast, rel=1e-5) and 0 <= agreement <= 1
    last = rows[-1]
    assert abs(float(last["validation_loss"]) - float(last["masked_l1"])) < 0.3 < float(last["contrast"])
    assert list((run / "reconstructions").glob("step-*.png"))
    picture = tmp_path / "picture.png"
    simmim("reconstruct", "--run", run, "--images", digits.unlabeled, "--out", picture, "--count", 2)
    assert Image.open(picture).width > 0


def test_resumed_equals_uninterrupted(run, digits, tmp_path, power_cut):
    """Bit for bit, the momentum encoder too, which has moved away from the encoder."""
    with power_cut(after_step=7):
        main([str(word) for word in ("pretrain", "--data", digits.unlabeled, "--out", tmp_path / "run", *WORDS)])
    assert saved_steps(tmp_path / "run").keys() == {5}, "it goes on from there"
    simmim("pretrain", "--out", tmp_path / "run", "--resume")
    ours, theirs = (load_pretrained(folder)[0].state_dict() for folder in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(run)]
    followers = [name for name in ours if name.startswith("momentum_")]
    assert followers and not all(torch.equal(ours[name], ours[name.removeprefix("momentum_")]) for name in followers)


def test_the_average_moves_once_a_step(digits, tmp_path, monkeypatch):
    """Not with each accumulated batch, and at the end of the run its momentum is 1."""
    seen, after_step = [], Contrast.after_step
    monkeypatch.setattr(Contrast, "after_step", lambda self, progress: seen.append(progress) or after_step(self, progress))
    words = ("--epochs=0.4", "--optim.accumulate=2", "--data", digits.unlabeled, "--out", tmp_path / "run")
    simmim("pretrain", *SMALL, *words)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_pretraining_goes_on_from_it(run, digits, tmp_path, capsys):
    """With its projector, and a momentum encoder that begins as a copy; from another method's encoder too."""
    words = ("pretrain", "--data", digits.unlabeled, "--epochs=0.1", "--batch-size=24", "--workers=0", "--optim.lr=1e-9")
    words += ("--optim.warmup_lr=1e-9",)
    for name, init, method, expected in (
        ("same", run, "contrast", "loaded     mask token, decoder and projector"),
        ("simmim", run, "simmim", "mask token and decoder are fresh: the source was trained by contrast"),
        (
            "back",
            tmp_path / "simmim",
            "contrast",
            "mask token, decoder and projector are fresh: the source was trained by simmim",
        ),
    ):
        own = SMALL[1:3] if method == "contrast" else ()
        simmim(*words, "--init", init, f"--method={method}", *own, "--out", tmp_path / name)
        assert expected in capsys.readouterr().out
    for name in ("same", "back"):
        state = load_pretrained(tmp_path / name)[0].state_dict()
        for key in state:
            if key.startswith("momentum_encoder"):
                torch.testing.assert_close(state[key], state[key.removeprefix("momentum_")], rtol=0, atol=1e-6)


@pytest.mark.two_processes
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_devices_equal_one(fork_server, digits, tmp_path, accumulate):
    """The negatives are those of both, of one pass: the same losses and weights, but for the order of sums."""
    words = ("pretrain", "--data", digits.unlabeled, *SMALL, "--trainer.accelerator=cpu", f"--optim.accumulate={accumulate}")
    words += ("--optim.lr=2e-3",)
    finish([fork_server.start(*words, "--out", tmp_path / "one", "--devices=1")])
    finish(fork_server.start_pair(*words, "--out", tmp_path / "two", "--devices=2", "--trainer.strategy=ddp"))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "masked_l1", "contrast", "agreement", "grad_norm"):
            assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-3), name
    one, two = (load_pretrained(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("--batch-size=1",),
            "batch_size is 1 in 1 accumulated batches, and method contrast compares images of one batch: give 2",
        ),
        (("--batch-size=2", "--optim.accumulate=2"), "give 4 images or more"),
        (("--model.contrast_stages=3",), "model.contrast_stages is 3 and the encoder has 2 stages"),
        (("--model.temperature=0",), "model.temperature is 0: give a positive number"),
        (
            ("--trainer.strategy=fsdp", "--trainer.accelerator=cpu", "--devices=1"),
            "method contrast does not support: give ddp",
        ),
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
    simmim("plan", "--preset", "tiny", "--image", "192", "--method", "contrast", "--model.view_scale", "0.5")
    assert "GFLOPs per image forward" in capsys.readouterr().out


def test_a_measured_step_has_both_views(digits, tmp_path, monkeypatch):
    """As those of the run, so that --time counts them."""
    monkeypatch.setattr(calibration, "MEASURED_S", 0.0)
    monkeypatch.setattr(calibration, "NUM_MEASURES", 1)
    seen, forward = [], Contrast.forward
    monkeypatch.setattr(Contrast, "forward", lambda self, *rest, **more: seen.append(more) or forward(self, *rest, **more))
    model = {"projector_dim": 16, "view_scale": 0.5, "encoder": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}}
    settings = PretrainSettings(
        data=str(digits.unlabeled), out=str(tmp_path), method="contrast", preset="nano", epochs=1, batch_size=8, model=model
    )
    assert measure_step(resolve_run(settings), "cpu") > 0
    assert {tuple(view.shape) for more in seen for view in more["views"]} == {(8, 1, 16, 16)}
