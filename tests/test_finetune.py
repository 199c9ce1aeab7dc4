"""Classification runs: where they start, what is trained, the best classifier, predictions."""

import csv
import math
import threading
from dataclasses import replace

import pytest
import torch
from image_files import notices

from simmim import load_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import normalize, open_picture, read_labeled_images
from simmim.finetune import ClassificationSettings, EncoderSettings, LabeledSettings, finetune, load_classifier, predict
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.classification.model import Classifier
from simmim.finetune.classification.module import ClassificationFinetuning
from simmim.finetune.registry import task_named
from simmim.finetune.run import report_test_choice, trained_text, validations_of
from simmim.finetune.settings import OptimSettings


def settings(digits, encoder_folder, out, **changes):
    return ClassificationSettings(
        **{
            "data": LabeledSettings(str(digits.labeled), flip=0.0),
            "out": str(out),
            "init": str(encoder_folder),
            "labels_per_class": 4,
            "epochs": 5.0,
            "batch_size": 20,
            "validations": 3,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(digits, encoder_folder, tmp_path_factory):
    return finetune(settings(digits, encoder_folder, tmp_path_factory.mktemp("finetune") / "run"))


def test_the_best_classifier_is_kept(digits, finished):
    saved = load_classifier(finished.run)
    assert saved.classes == tuple("0123456789")
    labels = read_labeled_images(digits.labeled, 4, seed=0)
    pixels = torch.stack([open_picture(row["image"], 1).crop((0, 0, 28, 28), (32, 32)) for row in labels.validation])
    with torch.no_grad():
        logits = saved.model(normalize(pixels, saved.preprocessing.mean, saved.preprocessing.std))
    accuracy = (logits.argmax(dim=1) == torch.tensor(labels.validation["label"])).float().mean()
    assert accuracy.item() == pytest.approx(finished.best)
    assert finished.best >= finished.accuracy


@pytest.mark.parametrize("steps, asked, count", [(6, 10, 6), (15, 10, 8), (100, 10, 10), (1, 10, 1), (9, 1, 1)])
def test_the_summary_counts_the_validations_that_there_will_be(steps, asked, count):
    """It told those that were asked for, of a run of fewer steps too."""
    every_steps = math.ceil(steps / asked)
    assert validations_of(steps, asked) == count == len({*range(every_steps, steps + 1, every_steps), steps})


def test_the_part_that_is_trained():
    assert [trained_text(stages) for stages in (None, 1, 2)] == [
        "",
        ", the last stage trained",
        ", the last 2 stages trained",
    ]


@pytest.mark.parametrize("part, validations, count", [("test", 3, 1), ("test", 1, 0), ("val", 3, 0)])
def test_a_test_part_that_chooses_the_model_is_said(digits, tmp_path, part, validations, count):
    for name in ("train", part):
        (tmp_path / name).symlink_to(digits.labeled / "train")
    chosen = settings(digits, "none", tmp_path / "run", data=LabeledSettings(str(tmp_path)), validations=validations)
    _, lines = notices(report_test_choice, task_named("classification").prepare(chosen, "cpu"))
    assert [line.startswith("the test part of") for line in lines] == [True] * count


def test_nothing_writes_to_a_finished_run(digits, encoder_folder, tmp_path):
    """A study deletes its runs: a thread that still wrote TensorBoard's file would make their folders again."""
    before = set(threading.enumerate())
    finetune(settings(digits, encoder_folder, tmp_path / "run"), quiet=True)
    assert not {type(thread).__name__ for thread in set(threading.enumerate()) - before} & {"_AsyncWriterThread"}


def test_fine_tuning_learns_the_labels(digits, encoder_folder, tmp_path):
    data = LabeledSettings(str(digits.labeled), crop_scale=(1.0, 1.0), flip=0.0)
    optim = OptimSettings(lr=0.3, layer_decay=0.75)
    run = settings(digits, encoder_folder, tmp_path / "run", data=data, epochs=120.0, optim=optim)
    assert finetune(run, quiet=True).accuracy > 0.3  # 40 labels, 1 in 10 by chance


def test_one_seed_one_result(digits, encoder_folder, finished, tmp_path):
    again = finetune(settings(digits, encoder_folder, tmp_path / "run"), quiet=True)
    first, second = (torch.load(r.run / "checkpoints/last.ckpt", weights_only=True) for r in (finished, again))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    assert again == replace(finished, run=again.run)


def test_resumed_equals_uninterrupted(digits, encoder_folder, tmp_path, power_cut, monkeypatch):
    monkeypatch.setattr("simmim.finetune.run.MIN_STEPS_PER_CHECKPOINT", 1)
    changes = {"rand_augment": 9.0, "color_jitter": 0.4, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}
    changed = {
        "encoder": EncoderSettings(drop_path_rate=0.3),
        "epochs": 6.0,
        "data": LabeledSettings(str(digits.labeled), balance="sampling", **changes),
        "optim": OptimSettings(ema=0.9),
        "patience": 100,
    }
    whole = finetune(settings(digits, encoder_folder, tmp_path / "whole", **changed), quiet=True)
    with power_cut(after_step=10):
        finetune(settings(digits, encoder_folder, tmp_path / "cut", **changed), quiet=True)
    cut = finetune(settings(digits, encoder_folder, tmp_path / "cut", **changed, resume=True), quiet=True)
    first, second = (torch.load(r.run / "checkpoints/last.ckpt", weights_only=True) for r in (whole, cut))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    torch.testing.assert_close(first["callbacks"]["AverageWeights"], second["callbacks"]["AverageWeights"], rtol=0, atol=0)
    assert cut == replace(whole, run=cut.run)
    for name in ("encoder/encoder.safetensors", "encoder/head.safetensors", "classes.csv", "confusions.png"):
        assert (cut.run / name).read_bytes() == (whole.run / name).read_bytes(), name


def test_a_frozen_encoder_stays_bit_identical_and_its_head_learns(digits, encoder_folder, tmp_path):
    run = finetune(settings(digits, encoder_folder, tmp_path / "run", freeze=True), quiet=True).run
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in load_encoder(encoder_folder).state_dict().items():
        assert torch.equal(state[f"model.encoder.{name}"], value), name
    assert state["model.head.bias"].abs().max() > 0


def test_a_run_starts_from_the_encoder_s_weights_and_its_twin_from_none(digits, encoder_folder, tmp_path):
    pretrained = settings(digits, encoder_folder, tmp_path / "run")
    scratch = replace(pretrained, init="none", encoder=EncoderSettings(like=str(encoder_folder)))
    task, saved = task_named("classification"), load_encoder(encoder_folder).state_dict()
    first, second = (task.prepare(chosen, "cpu").module.model.encoder.state_dict() for chosen in (pretrained, scratch))
    assert first.keys() == second.keys() == saved.keys()
    assert all(torch.equal(first[name], saved[name]) for name in saved)
    assert not second["layers.0.blocks.0.norm1.weight"].any()  # zero in a fresh encoder


def test_a_larger_image_has_a_larger_window(digits, encoder_folder, tmp_path):
    run = finetune(settings(digits, encoder_folder, tmp_path / "run", image_size=64, epochs=1.0), quiet=True).run
    config = load_encoder(run).config
    assert config.window_size == 8
    assert config.pretrained_window_sizes == (4, 4, 2)


def test_from_scratch_by_the_default_preset(digits, tmp_path):
    run = ClassificationSettings(
        data=str(digits.labeled), out=str(tmp_path / "run"), labels_per_class=2, epochs=1, batch_size=20
    )
    finetune(run, quiet=True)
    assert load_encoder(tmp_path / "run").config.depths == (2, 2)  # nano, for thumbnails


def test_head_and_final_norm_learn_fastest(encoder_folder):
    model = Classifier(load_encoder(encoder_folder), 3)
    module = ClassificationFinetuning(
        model,
        Preprocessing((32, 32), (0.5,), (0.5,)),
        BatchChanges(),
        lambda step: 0.1,
        OptimSettings(layer_decay=0.5),
    )
    optimizer = module.configure_optimizers()["optimizer"]
    rate_of = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rate_of["head.weight"] == rate_of["encoder.norm.weight"] == pytest.approx(0.1)
    assert rate_of["encoder.layers.2.blocks.0.attn.qkv.weight"] == pytest.approx(0.05)
    assert rate_of["encoder.layers.1.downsample.reduction.weight"] == pytest.approx(0.025)
    assert rate_of["encoder.patch_embed.proj.weight"] == pytest.approx(0.00625)


def test_predictions_are_the_classifier_s(digits, finished, tmp_path):
    images = digits.labeled / "test"
    (tmp_path / "images").mkdir()
    for number, path in enumerate(sorted(images.rglob("*.png"))[:9]):
        (tmp_path / "images" / f"{number}.png").write_bytes(path.read_bytes())
    (tmp_path / "images" / "torn.png").write_bytes(path.read_bytes()[:60])
    count, unreadable = predict(finished.run, tmp_path / "images", tmp_path / "out.csv", batch_size=4)
    assert count == 9
    assert list(unreadable) == [str(tmp_path / "images" / "torn.png")]
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    saved = load_classifier(finished.run)
    for row in table:
        pixels = open_picture({"path": row["path"], "bytes": None}, 1).crop((0, 0, 28, 28), (32, 32))[None]
        with torch.no_grad():
            logits = saved.model(normalize(pixels, saved.preprocessing.mean, saved.preprocessing.std))
        probabilities = logits.softmax(dim=1)[0]
        assert row["class"] == saved.classes[probabilities.argmax()]
        written = [float(row[f"probability {name}"]) for name in saved.classes]
        assert written == pytest.approx(probabilities.tolist(), abs=2e-6)
