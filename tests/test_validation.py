"""Images that are held out of pre-training: which they are, that none is trained on, and what their loss decides."""

import contextlib
import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import load_encoder
from simmim.cli import main
from simmim.data import EvaluationView, ImageSamples, hold_out, normalize, open_source
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.methods.canvas import Canvas, CanvasSettings
from simmim.methods.registry import METHODS
from simmim.pretrain import DataSettings, PretrainSettings, SimMIMSettings, load_pretrained, pretrain
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.validation import HeldOutLoss, default_steps_between, trend
from simmim.training.saving import CheckpointWriter

# With stochastic depth, an extra random draw would change the losses.
SMALL = SimMIMSettings(mask_unit=8, encoder={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "drop_path_rate": 0.3})
HELD_OUT, STEPS = 48, 12  # of 240 digits
WORDS = (
    "--preset=nano",
    "--image-size=32",
    "--batch-size=24",
    "--data.validation=40",
    "--validate_every_epochs=0.48",
    "--epochs=1",
    "--workers=0",
    "--precision=32-true",
    "--optim.lr=2e-3",
    "--model.encoder.embed_dim=16",
    "--model.encoder.depths=[1,1]",
    "--model.encoder.num_heads=[1,2]",
)


def settings(images, out, validation=0.2, **more):
    return PretrainSettings(
        **{
            "data": DataSettings(str(images), validation=validation),
            "out": str(out),
            "preset": "nano",
            "epochs": STEPS * 32 / 192,
            "batch_size": 32,
            "model": SMALL,
            "save_every_steps": 5,
            "log_every_steps": 2,
            "validate_every_epochs": 4 * 32 / 192 if validation else None,
            "workers": 0,
            "precision": "32-true",
            **more,
        }
    )


def rows(run, *names):
    with (run / "metrics.csv").open(newline="") as file:
        return [[row[name] for name in names] for row in csv.DictReader(file) if all(row[name] for name in names)]


def weights(run):
    return load_pretrained(run)[0].state_dict()


def identical(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def held_out_paths(images, amount=0.2, seed=0):
    return [record["path"] for record in hold_out(open_source(str(images)), amount, seed).images["image"]]


@pytest.fixture(scope="module")
def validated(digits, tmp_path_factory):
    return pretrain(settings(digits.unlabeled, tmp_path_factory.mktemp("validated") / "run"))


def test_the_draw_follows_from_seed_and_number(digits):
    source = open_source(str(digits.unlabeled))
    kept, held_out = hold_out(source, 0.2, 0)
    paths = [record["path"] for record in source.head["image"]]
    parts = [[record["path"] for record in part["image"]] for part in (kept.images, held_out)]
    assert sorted(parts[0] + parts[1]) == sorted(paths) and (len(parts[0]), len(parts[1])) == (192, 48)
    assert all(part == sorted(part, key=paths.index) for part in parts)
    assert held_out_paths(digits.unlabeled, 48) == parts[1] != held_out_paths(digits.unlabeled, 48, seed=1)
    assert len(held_out_paths(digits.unlabeled, 0.001)) == 1


def test_training_is_that_on_a_folder_without_them(digits, validated, tmp_path):
    """Bit for bit: no held-out image reaches a batch, and no measure changes training."""
    images = shutil.copytree(digits.unlabeled, tmp_path / "images")
    for path in held_out_paths(digits.unlabeled):
        (images / Path(path).relative_to(digits.unlabeled)).unlink()
    without = pretrain(settings(images, tmp_path / "run", validation=None))
    assert rows(validated, "step", "loss", "grad_norm") == rows(without, "step", "loss", "grad_norm")
    assert identical(weights(validated), weights(without))


def test_two_workers_never_load_them(tmp_path, monkeypatch):
    """Every image has a gray value of its own, by which it is known in any crop."""
    (tmp_path / "images").mkdir()
    for value in range(100, 140):
        Image.fromarray(np.full((32, 32), value, np.uint8)).save(tmp_path / "images" / f"{value}.png")
    seen, step = set(), PretrainingModule.training_step
    monkeypatch.setattr(
        PretrainingModule,
        "training_step",
        lambda self, batch, index: seen.update(batch["image"].unique().tolist()) or step(self, batch, index),
    )
    pretrain(settings(tmp_path / "images", tmp_path / "run", 0.25, workers=2, batch_size=10, epochs=3.0))
    held_out = {int(Path(path).stem) for path in held_out_paths(tmp_path / "images", 0.25)}
    assert len(held_out) == 10 and seen == set(range(100, 140)) - held_out


def test_the_loss_is_that_of_the_model_on_all_of_them(digits, validated):
    """Measured every four steps; the last one computed again in one batch."""
    measured = rows(validated, "step", "validation_loss")
    assert [int(step) for step, _ in measured] == [3, 7, 11]
    model, resolved = load_pretrained(validated)
    held_out = hold_out(open_source(str(digits.unlabeled)), 0.2, 0).images
    samples = [ImageSamples(held_out, EvaluationView(resolved.size), 1, 0)[0, row] for row in range(HELD_OUT)]
    images = normalize(torch.stack([sample["image"] for sample in samples]), resolved.data.mean, resolved.data.std)
    drawn = model.draw(resolved.size, [sample["seed"] for sample in samples], torch.device("cpu"))
    with torch.no_grad():
        assert float(model(images, drawn).loss) == pytest.approx(float(measured[-1][1]), rel=1e-5)


def test_a_resumed_run_has_the_measures_of_an_uninterrupted_one(digits, validated, tmp_path, power_cut):
    with power_cut(after_step=7):
        pretrain(settings(digits.unlabeled, tmp_path / "cut"))
    cut = pretrain(settings(digits.unlabeled, tmp_path / "cut", resume=True))
    assert rows(cut, "step", "validation_loss") == rows(validated, "step", "validation_loss")
    assert identical(weights(cut), weights(validated))
    pretrain(settings(digits.unlabeled, tmp_path / "cut", resume=True))
    assert rows(cut, "step", "validation_loss") == rows(validated, "step", "validation_loss")


def test_the_best_checkpoint_and_the_encoder_are_those_of_the_lowest_loss(digits, tmp_path, monkeypatch, capsys):
    """Losses 3, 1, 2 after steps 4, 8, 12; checkpoints by steps after 5 and 10."""
    losses = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(HeldOutLoss, "loss", lambda self, trainer, module: next(losses))
    run = pretrain(settings(digits.unlabeled, tmp_path / "run"))
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 8
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS
    origin = json.loads((run / "encoder" / "config.json").read_text())["provenance"]
    assert (origin["steps"], origin["validation_loss"]) == (8, 1.0)
    exported = load_encoder(run).state_dict()
    assert all(torch.equal(value, best["state_dict"][f"model.encoder.{name}"]) for name, value in exported.items())
    lines = capsys.readouterr().out
    assert "validate 48 images that are held out, every 4 steps and at the end" in lines
    assert "validation loss 2 at the end and 1 at step 8: rising." in lines
    assert f"{run / 'encoder'} is of the lowest validation loss, 1 at step 8" in lines


def test_a_kill_before_the_best_is_named_loses_nothing(digits, tmp_path, monkeypatch, power_cut):
    """The checkpoint of step 8 is on the disk, and the process ends before it is best.ckpt and the encoder."""
    losses, write = iter((3.0, 1.0, 2.0)), CheckpointWriter.write
    monkeypatch.setattr(HeldOutLoss, "loss", lambda self, trainer, module: next(losses))
    with monkeypatch.context() as patch, power_cut(after_step=9):
        patch.setattr(
            CheckpointWriter, "write", lambda self, *given: write(self, *given[:3], given[3] and given[2].step < 8)
        )
        pretrain(settings(digits.unlabeled, tmp_path / "run"))
    run = pretrain(settings(digits.unlabeled, tmp_path / "run", resume=True))
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    origin = json.loads((run / "encoder" / "config.json").read_text())["provenance"]
    assert (best["global_step"], origin["steps"], origin["validation_loss"]) == (8, 8, 1.0)
    exported = load_encoder(run).state_dict()
    assert all(torch.equal(value, best["state_dict"][f"model.encoder.{name}"]) for name, value in exported.items())


@pytest.mark.parametrize(
    "measures, says",
    [
        ([(10, 2.0)], "too few measures"),
        ([(50, 2.0), (80, 1.2), (100, 1.0)], "16.7% below that at four fifths of the run: still falling"),
        ([(50, 2.0), (80, 1.0), (90, 0.99), (100, 0.995)], "no longer falling"),
        ([(50, 2.0), (80, 1.0), (100, 1.005)], "0.5% above that at four fifths of the run: no longer falling"),
        ([(50, 1.0), (80, 1.05), (100, 1.02)], "and 1 at step 50: rising"),
        ([(50, 1.0), (100, float("nan"))], "validation loss nan at the end"),
        ([(50, -1.0), (80, -1.0), (100, -1.5)], "50.0% below that at four fifths of the run: still falling"),
    ],
)
def test_what_the_course_says(measures, says):
    assert says in trend(measures)


def test_measures_take_little_time():
    """A fiftieth of a run, each image being a third of its step; fifty measures at most, one at least."""
    for steps, images, batch in ((10_000, 100, 128), (10_000, 20_000, 128), (300, 2_000, 64), (5, 1, 128)):
        every = default_steps_between(steps, images, batch)
        assert steps / every <= 50 and images / 3 <= 0.02 * every * batch + 1e-9
        assert every == 1 or steps / (every - 1) > 50 or images / 3 > 0.02 * (every - 1) * batch


def test_every_method_is_validated(digits, tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parent))
    monkeypatch.setitem(METHODS, "toy", ("toy_method", "ToyMethod"))
    words = ("pretrain", "--data", str(digits.unlabeled), *WORDS, "--out", str(tmp_path / "run"), "--method=toy")
    assert main(words) == 0
    assert len(rows(tmp_path / "run", "validation_loss")) == 2


def test_processes_divide_whole_canvases(digits):
    """70 images, three on a canvas: batches of 33, 33 and 4 on any number of processes, and the same mean over all."""
    source = open_source(str(digits.unlabeled)).head
    samples = ImageSamples(source.select(range(70)), EvaluationView((32, 32)), 1, 0)
    torch.manual_seed(0)
    encoder = SwinV2(SwinV2Config(16, (1, 1), (1, 2), window_size=4, in_channels=1))
    module = PretrainingModule(Canvas(encoder, CanvasSettings(mask_unit=8)), (0.13,), (0.31,), lambda step: 0.0, 0.0, 1.0)

    def parts(world):
        for rank in range(world):
            given = []
            strategy = SimpleNamespace(reduce=lambda losses, reduce_op, given=given: given.append(losses) or losses)
            precision = SimpleNamespace(forward_context=contextlib.nullcontext)
            trainer = SimpleNamespace(
                world_size=world, global_rank=rank, is_global_zero=not rank, strategy=strategy, precision_plugin=precision
            )
            validation = HeldOutLoss(samples, 1, images_per_input=3, workers=0)
            validation.on_fit_start(trainer, module)
            yield validation.loss(trainer, module), given[0], len(validation.batches)

    ((mean, losses, _),) = parts(1)
    assert mean == pytest.approx(float(losses @ torch.tensor([33.0, 33.0, 4.0])) / 70, rel=1e-6)
    for world in (2, 4):
        divided = list(parts(world))
        assert len({number for _, _, number in divided}) == 1, "a sharded model computes on all processes at once"
        assert torch.equal(sum(losses for _, losses, _ in divided), losses)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--data.validation=0"], "data.validation is 0: give a share below 1"),
        (["--data.validation=2.5"], "data.validation is 2.5: give a share below 1"),
        (["--data.validation=240"], "data.validation is 240, of 240 images: nothing is left"),
        (["--data.validation=0.1", "--data.streaming=true"], "leave out data.validation or data.streaming"),
        (["--validate_every_epochs=1"], "validate_every_epochs needs images to validate with"),
    ],
)
def test_wrong_input(digits, tmp_path, capsys, words, says):
    assert main(["pretrain", "--data", str(digits.unlabeled), "--out", str(tmp_path / "run"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
