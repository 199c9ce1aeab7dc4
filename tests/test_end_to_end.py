"""The command on 300 real digits: pre-train, reconstruct, export, fine-tune, predict."""

import csv
import os
import subprocess
import sys

import torch
from PIL import Image

from simmim import load_encoder
from simmim.pretrain import load_pretrained


def simmim(*words, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "simmim.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=600,
        check=False,
    )


def test_from_images_to_predictions(digits, tmp_path):
    run, exported, labeled = tmp_path / "run", tmp_path / "exported", tmp_path / "labeled"
    done = simmim("pretrain", "--data", digits.unlabeled, "--out", run, "--epochs", 6, "--batch-size", 48)
    assert done.returncode == 0, done.stderr
    assert "preset: nano" in done.stdout  # the resolved configuration is on the screen
    assert "images/s" in done.stderr
    assert "tensorboard --logdir" in done.stdout

    refused = simmim("pretrain", "--data", digits.unlabeled, "--out", run)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "--resume" in refused.stderr
    again = simmim("pretrain", "--out", run, "--resume")
    assert again.returncode == 0, again.stderr

    done = simmim("reconstruct", "--run", run, "--images", digits.labeled / "test", "--out", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50

    done = simmim("export", "--run", run, "--out", exported)
    assert done.returncode == 0, done.stderr
    model, _ = load_pretrained(run)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encoder(images).features, load_encoder(exported)(images).features)
    code = done.stdout.split("load it with\n\n")[1]
    pasted = subprocess.run(
        [sys.executable, "-c", code + "\nprint(tuple(features.shape))"], capture_output=True, text=True, check=False
    )
    assert (pasted.returncode, pasted.stdout.strip()) == (0, "(1, 96)"), pasted.stderr

    words = ("--init", exported, "--data", digits.labeled, "--out", labeled, "--epochs", 4)
    done = simmim("finetune", "classification", *words, "--labels-per-class", 10, "--batch-size", 50)
    assert done.returncode == 0, done.stderr
    assert "60 validation images" in done.stdout

    done = simmim("predict", "--run", labeled, "--images", digits.labeled / "test", "--out", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 60
    assert all(abs(sum(float(row[f"probability {digit}"]) for digit in range(10)) - 1) < 1e-4 for row in table)
