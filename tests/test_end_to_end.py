"""The command on 300 real digits: pre-train, reconstruct, export, fine-tune, predict."""

import csv

import torch
from fork_server import finish
from PIL import Image

from simmim import load_encoder
from simmim.pretrain import load_pretrained


def test_from_images_to_predictions(digits, tmp_path, fork_server):
    run, exported, labeled = tmp_path / "run", tmp_path / "exported", tmp_path / "labeled"

    def simmim(*words, code=0, prelude=""):
        return finish([fork_server.start(*words, prelude=prelude)], code)

    output = simmim("pretrain", "--data", digits.unlabeled, "--out", run, "--epochs", 1, "--batch-size", 48)
    assert "preset: nano" in output  # the resolved configuration is on the screen
    assert "images/s" in output
    assert "tensorboard --logdir" in output

    refused = simmim("pretrain", "--data", digits.unlabeled, "--out", run, code=2)
    assert refused.count("\n") == 1 and "--resume" in refused
    simmim("pretrain", "--out", run, "--resume")

    simmim("reconstruct", "--run", run, "--images", digits.labeled / "test", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50

    output = simmim("export", "--run", run, "--out", exported)
    model, _ = load_pretrained(run)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encoder(images).features, load_encoder(exported)(images).features)
    pasted = output.split("load it with\n\n")[1] + "\nprint(tuple(features.shape))"
    assert simmim("--version", prelude=pasted).startswith("(1, 96)\n")

    words = ("--init", exported, "--data", digits.labeled, "--out", labeled, "--epochs", 1)
    output = simmim("finetune", "classification", *words, "--labels-per-class", 10, "--batch-size", 50)
    assert "60 validation images" in output

    simmim("predict", "--run", labeled, "--images", digits.labeled / "test", "--out", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 60
    assert all(abs(sum(float(row[f"probability {digit}"]) for digit in range(10)) - 1) < 1e-4 for row in table)
