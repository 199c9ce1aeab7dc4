"""Fine-tuning with unlabeled images: pseudo-labels, teacher, what is left out, steps, resuming, wrong input."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_files import notices
from PIL import Image
from torch import nn

from simmim import load_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.cli import main
from simmim.data import LabeledImages, find_images, read_labeled_images
from simmim.finetune import ClassificationSettings, LabeledSettings, finetune
from simmim.finetune.augment.affine import AffineSettings
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.averaging import decay_at
from simmim.finetune.classification.model import Classifier
from simmim.finetune.classification.module import ClassificationFinetuning
from simmim.finetune.classification.self_training.module import SelfTraining
from simmim.finetune.classification.self_training.prepare import target_shares
from simmim.finetune.classification.self_training.settings import SelfTrainingSettings
from simmim.finetune.label_study.arms import build_arms
from simmim.finetune.label_study.settings import StudySettings
from simmim.finetune.registry import task_named
from simmim.finetune.run import report_shared_images
from simmim.finetune.self_training.pseudo_labels import PseudoLabeler
from simmim.finetune.self_training.teacher import Teacher
from simmim.finetune.self_training.unlabeled import open_unlabeled
from simmim.finetune.settings import OptimSettings
from simmim.training.same_images import SameImages

LABELED, UNLABELED, CLASSES = 4, 6, 3


def unchanged(value, reduce_op=None):
    """A reduction over one process."""
    return value


# --- pseudo-labels -------------------------------------------------------------------------------------------------------


def test_labels_alignment_and_thresholds_by_numpy():
    """Five batches; in float64, by the formulas of the docstring."""
    generator, target, decay = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), 0.6
    labeler = PseudoLabeler(3, torch.tensor(target, dtype=torch.float32), decay)
    prediction, aligned, confidence, skipped = np.zeros(3), np.zeros(3), 0.0, 0
    for number in range(5):
        p, labeled = generator.dirichlet((0.6, 0.9, 0.2), 40), generator.dirichlet((0.5, 0.5, 0.5), 7)
        found = labeler(*([torch.tensor(one, dtype=torch.float32)] for one in (p, labeled)), unchanged)
        keep = min(1 - 1 / (number + 1), decay)
        prediction = keep * prediction + (1 - keep) * p.mean(0)
        q = p * target / prediction
        q /= q.sum(1, keepdims=True)
        confidence = keep * confidence + (1 - keep) * labeled.max(1).mean()
        aligned = keep * aligned + (1 - keep) * q.mean(0)
        ratio = aligned / target
        thresholds = 0.95 * confidence * ratio / ratio.max()
        assert (found.labels.numpy() == q.argmax(1)).all()
        np.testing.assert_allclose(found.confidence.numpy(), q.max(1), rtol=1e-5)
        np.testing.assert_allclose(labeler.thresholds().numpy(), thresholds, rtol=1e-5)
        assert (found.confident.numpy() == (q.max(1) >= thresholds[q.argmax(1)])).all()
        skipped += int((~found.confident).sum())
    assert 0 < skipped < 200, "some images are left out and some are not"


def test_images_of_no_class_are_left_out():
    """Half of the predictions are sure, half know nothing."""
    sure, unsure = torch.eye(4).mul(0.95).add(0.0125).repeat(10, 1), torch.full((40, 4), 0.25)
    labeler = PseudoLabeler(4, None, 0.9)
    found = labeler([torch.cat([sure, unsure])], [sure], unchanged)
    assert found.confident[:40].all() and not found.confident[40:].any()


def test_alignment_follows_the_labels():
    labels = LabeledImages({"label": [0, 0, 0, 1]}, {"label": [0, 1]}, ("a", "b"))
    assert target_shares("labels", labels).tolist() == [0.75, 0.25]
    assert target_shares("uniform", labels).tolist() == [0.5, 0.5]
    assert target_shares("none", labels) is None


# --- teacher and steps ---------------------------------------------------------------------------------------------------


@pytest.fixture
def build(encoder_folder):
    """build(…): a module of `SelfTraining` whose metrics are in `logged`; the teacher has other weights."""

    def build(kind=SelfTraining, degrees=20, **changes):
        torch.manual_seed(1)
        preprocessing, optim = Preprocessing((32, 32), (0.13,), (0.31,)), OptimSettings(layer_decay=0.75)
        model = Classifier(load_encoder(encoder_folder), CLASSES).train()
        weak = BatchChanges(AffineSettings(shift=0.1))
        own = {}
        if kind is SelfTraining:
            own = {"labeler": PseudoLabeler(CLASSES, None, 0.9), "teacher": Teacher(0.9), "start": 2, "weight": 1.0}
            own |= {"strong": BatchChanges(AffineSettings(degrees=degrees)), **changes}
        module = kind(model, preprocessing, weak, lambda step: 0.1, optim, **own)
        module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=unchanged), global_step=3)
        module.logged = {}
        module.log = lambda name, value, **_: module.logged.update({name: float(torch.as_tensor(value).detach())})
        if kind is SelfTraining:
            module.teacher.on_fit_start(None, module)
            for value in module.teacher.average.values():
                value.add_(torch.randn_like(value) * 0.05)
        return module

    return build


@pytest.fixture(scope="module")
def batch():
    """Labeled images, then unlabeled ones with a second, weak view."""
    generator = torch.Generator().manual_seed(0)
    images, weak = (torch.randint(0, 256, (n, 1, 32, 32), generator=generator, dtype=torch.uint8) for n in (10, UNLABELED))
    labels = torch.tensor([0, 1, 2, 0] + [-1] * UNLABELED)
    return {"image": images, "weak": weak, "label": labels, "seed": list(range(10)), "skipped": []}


def gradients(module, batch):
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), {name: value.grad.clone() for name, value in module.model.named_parameters()}


def test_the_teacher_is_the_average_in_float64():
    model, decay = nn.Linear(3, 2), 0.7
    module, teacher = SimpleNamespace(model=model), Teacher(decay)
    teacher.on_fit_start(None, module)
    teacher.on_train_start(SimpleNamespace(global_step=0))
    expected = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    for step in range(1, 30):
        for name, value in model.named_parameters():
            value.data.add_(torch.randn_like(value))
            d = decay_at(step - 1, decay)
            expected[name] = d * expected[name] + (1 - d) * value.detach().double()
        teacher.on_train_batch_end(SimpleNamespace(global_step=step), module)
    for name, value in teacher.average.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_teacher_predicts_with_the_average_and_leaves_the_student_as_it_is(build):
    module = build()
    model, average = module.model, {name: value.clone() for name, value in module.teacher.average.items()}
    model.encoder.layers[0].eval()  # as frozen parts are
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    modes = [part.training for part in model.modules()]
    with module.teacher.predicting(model):
        assert all(torch.equal(value, average[name]) for name, value in model.named_parameters())
        assert not any(part.training for part in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, average[name]) for name, value in module.teacher.average.items())


def test_pseudo_labels_come_from_the_weak_view_alone(build, batch):
    changed = {**batch, "image": batch["image"].clone()}
    changed["image"][LABELED:] = 255 - changed["image"][LABELED:]
    states, losses = [], []
    for one, degrees in ((batch, 20), (changed, 90)):
        module = build(degrees=degrees)
        losses.append(module.training_step(one, 0).detach())
        states.append({**module.labeler.state_dict(), "counts": module.counts})
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert losses[0] != losses[1] and states[0]["counts"][1] > 0, "the student has seen the change"
    module = build()
    module.training_step({**batch, "weak": 255 - batch["weak"]}, 0)
    assert not torch.equal(module.labeler.mean_prediction, states[0]["mean_prediction"])


def test_zero_confident_images_are_a_step_on_labels_alone(build, batch, monkeypatch):
    labeled = {name: value[:LABELED] for name, value in batch.items() if name != "weak"}
    plain_loss, plain = gradients(build(kind=ClassificationFinetuning), labeled)
    monkeypatch.setattr(PseudoLabeler, "thresholds", lambda self: torch.full((CLASSES,), 2.0))
    module = build()
    loss, ours = gradients(module, batch)
    assert torch.equal(loss, plain_loss) and module.logged["confident_share"] == module.logged["pseudo_loss"] == 0
    assert all(torch.equal(ours[name], value) for name, value in plain.items())
    # Nor does a batch without unlabeled images differ.
    loss, ours = gradients(build(), labeled)
    assert torch.equal(loss, plain_loss) and all(torch.equal(ours[name], value) for name, value in plain.items())


def test_true_labels_of_unlabeled_images_are_counted_and_change_nothing(build, batch):
    known = {**batch, "label": torch.tensor([0, 1, 2, 0] + [1] * UNLABELED)}
    first, second = build(), build()
    pair = [gradients(module, one) for module, one in ((first, batch), (second, known))]
    torch.testing.assert_close(*pair, rtol=0, atol=0)
    assert first.counts[2] == 0 and "pseudo_label_accuracy" not in first.logged
    assert second.counts[2] == second.counts[1] == second.counts[4:].sum() > 0
    assert second.counts[3] == second.counts[4 + 1]


def test_the_weight_of_pseudo_labels_grows(build):
    module = build(start=10, weight=2.0)
    assert [module.weight_at(step) for step in (10, 14, 19, 50)] == pytest.approx([0.2, 1.0, 2.0, 2.0])


# --- what is left out ----------------------------------------------------------------------------------------------------


def test_labeled_and_judging_images_are_never_unlabeled(digits, tmp_path):
    """By content, under any name; other images keep the class that the labeled source knows."""
    labels, everything = (read_labeled_images(digits.labeled, count, seed=3) for count in (2, None))
    for number, path in enumerate(find_images(digits.labeled)):
        shutil.copy(path, tmp_path / f"copy-{number}.png")
    Image.new("L", (28, 28), 7).save(tmp_path / "other.png")
    found = open_unlabeled(str(tmp_path), labels, everything)
    assert (found.num_labeled, found.num_judging, len(found.images)) == (20, 60, 300 - 80 + 1)
    assert found.lines() == [
        "221 unlabeled images; 20 of the unlabeled images are labeled ones and left out; 60 of the unlabeled images are "
        "validation ones and left out"
    ]
    contents = {Path(row["image"]["path"]).read_bytes(): row["label"] for row in found.images}
    used = {Path(row["image"]["path"]).read_bytes() for part in (labels.train, labels.validation) for row in part}
    assert not used & contents.keys()
    assert contents.pop((tmp_path / "other.png").read_bytes()) == -1
    assert contents == {
        content: row["label"] for row in everything.train if (content := Path(row["image"]["path"]).read_bytes()) not in used
    }


def test_in_cross_validation_neither_judge_is_unlabeled(digits, encoder_folder, tmp_path):
    run = settings(digits, encoder_folder, tmp_path / "run")
    run = replace(run, data=replace(run.data, unlabeled=str(digits.labeled), fold=(0, 2)))
    prepared = task_named("classification").prepare(run, "cpu")
    files = {row["image"]["path"] for row in prepared.train.unlabeled.source}
    labels = read_labeled_images(digits.labeled, run.labels_per_class, run.seed)
    assert len(files) == 300 - 40 - 60
    assert not files & {row["image"]["path"] for part in (labels.train, labels.validation) for row in part}


def test_a_judging_image_that_is_labeled_too_and_other_unlabeled_images_are_told(digits, encoder_folder, tmp_path):
    """As without unlabeled images: before the run, and when it goes on."""
    shutil.copytree(digits.labeled, labeled := tmp_path / "labeled")
    (unlabeled := tmp_path / "unlabeled").mkdir()
    for level in range(3):
        Image.new("L", (28, 28), level).save(unlabeled / f"{level}.png")
    judging = next(iter(sorted((labeled / "test" / "3").glob("*.png"))))
    shutil.copy(judging, labeled / "train" / "3" / "copy.png")
    data = LabeledSettings(str(labeled), unlabeled=str(unlabeled))
    run = settings(digits, encoder_folder, tmp_path / "run", data=data, labels_per_class=None)
    prepared = task_named("classification").prepare(run, "cpu")
    [line] = notices(report_shared_images, prepared)[1]
    assert line.startswith("1 of 60 validation images is also among the training images")
    state = SameImages(prepared.train.num_images, prepared.train).state_dict()
    assert notices(SameImages(prepared.train.num_images, prepared.train).load_state_dict, state)[1] == []
    (unlabeled / "0.png").rename(unlabeled / "another-name.png")
    again = task_named("classification").prepare(run, "cpu").train
    [line] = notices(SameImages(again.num_images, again).load_state_dict, state)[1]
    assert f"{state['count']} then and now, with other names" in line


# --- runs ----------------------------------------------------------------------------------------------------------------


def settings(digits, encoder_folder, out, **changes):
    data = LabeledSettings(str(digits.labeled), unlabeled=str(digits.unlabeled))
    own = {"labels_per_class": 4, "steps": 12, "batch_size": 10, "validations": 3, "optim": OptimSettings(lr=0.05, ema=0.9)}
    return ClassificationSettings(**{"data": data, "out": str(out), "init": str(encoder_folder), **own, **changes})


def read_rows(run):
    with (run / "pseudo-labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_resumed_equals_uninterrupted(digits, encoder_folder, tmp_path, power_cut, monkeypatch):
    monkeypatch.setattr("simmim.finetune.run.MIN_STEPS_PER_CHECKPOINT", 1)
    optim = OptimSettings(lr=0.05, ema=0.9, accumulate=2)
    longer = {"steps": 20, "batch_size": 4, "optim": optim, "self_training": SelfTrainingSettings(ratio=2), "validations": 2}
    whole = finetune(settings(digits, encoder_folder, tmp_path / "whole", **longer), quiet=True)
    with power_cut(after_step=17):
        finetune(settings(digits, encoder_folder, tmp_path / "cut", **longer), quiet=True)
    cut = finetune(settings(digits, encoder_folder, tmp_path / "cut", **longer, resume=True), quiet=True)
    first, second = (torch.load(r.run / "checkpoints/last.ckpt", weights_only=True) for r in (whole, cut))
    torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    assert first["state_dict"]["labeler.num_batches"] == 2 * 19, "a twentieth of the steps is on labels alone"
    torch.testing.assert_close(first["callbacks"]["AverageWeights"], second["callbacks"]["AverageWeights"], rtol=0, atol=0)
    assert cut == replace(whole, run=cut.run)
    for name in ("encoder/encoder.safetensors", "encoder/head.safetensors", "pseudo-labels.csv"):
        assert (cut.run / name).read_bytes() == (whole.run / name).read_bytes(), name
    rows = read_rows(cut.run)
    assert int(rows[-1]["step"]) == 20 and sum(int(row["unlabeled"]) for row in rows) == 19 * 8
    assert sum(float(rows[-1][name]) for name in "0123456789") == pytest.approx(1, abs=1e-3)
    provenance = json.loads((cut.run / "encoder/config.json").read_text())["provenance"]
    assert (provenance["unlabeled"], provenance["unlabeled_images"]) == ("unlabeled", 200)


def test_what_is_left_out_and_chosen_is_said(digits, encoder_folder, tmp_path, capsys):
    words = [
        "finetune",
        "classification",
        "--init",
        encoder_folder,
        "--data",
        digits.labeled,
        "--unlabeled",
        digits.unlabeled,
    ]
    words += ["--out", tmp_path / "run", "--labels-per-class", 1, "--steps", 3, "--batch-size", 10, "--workers", 0]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "chosen   230 unlabeled images; 10 of the unlabeled images are labeled ones and left out" in printed
    assert "chosen   5 unlabeled images per labeled one" in printed and "chosen   teacher" in printed
    assert "strong views of unlabeled images" in printed


def other_channels(folder):
    folder.mkdir()
    np.save(folder / "bands.npy", np.zeros((5, 28, 28), np.uint8))
    return folder


def copies(digits, folder):
    """All labeled images under other names."""
    folder.mkdir()
    for number, path in enumerate(find_images(digits.labeled)):
        shutil.copy(path, folder / f"{number}.png")
    return folder


def write_columns(digits, folder):
    """The unlabeled images as bytes in Parquet, in a column whose name tells nothing."""
    import pyarrow
    import pyarrow.parquet

    images = [Path(path).read_bytes() for path in find_images(digits.unlabeled)]
    folder.mkdir()
    table = pyarrow.table({"scan": images, "site": ["a"] * len(images)})
    pyarrow.parquet.write_table(table, folder / "images.parquet")
    return folder


def test_a_column_of_unlabeled_images_is_named(digits, encoder_folder, tmp_path):
    """They are the same as in a folder. The labeled ones' column is a setting of its own."""
    chosen = settings(digits, encoder_folder, tmp_path / "run")
    data = replace(chosen.data, unlabeled=str(write_columns(digits, tmp_path / "columns")), unlabeled_column="scan")
    prepared = task_named("classification").prepare(replace(chosen, data=data), "cpu")
    source = prepared.train.unlabeled.source
    assert len(source) == 200 and source[0]["image"]["bytes"] == Path(find_images(digits.unlabeled)[0]).read_bytes()
    with pytest.raises(ValueError, match=r"data\.unlabeled_column is about unlabeled images: give them"):
        replace(data, unlabeled=None)


def test_the_rate_counts_labeled_and_unlabeled_images(digits, encoder_folder, tmp_path):
    """Four unlabeled images to a labeled one, after the first steps on labels alone; the shares are of the same seconds."""
    chosen = settings(digits, encoder_folder, tmp_path / "run", self_training=SelfTrainingSettings(ratio=4, start=0.25))
    finetune(replace(chosen, log_every_steps=1), quiet=True)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["images_per_s"]]
    assert len(rows) == 12
    for number, row in enumerate(rows):
        if number < 3:
            assert not row["unlabeled_images_per_s"] and not row["labeled_images_per_s"]
            continue
        total, labeled, unlabeled = (float(row[f"{kind}images_per_s"]) for kind in ("", "labeled_", "unlabeled_"))
        assert unlabeled == pytest.approx(4 * labeled, rel=1e-6) and total == pytest.approx(5 * labeled, rel=1e-6)


@pytest.mark.parametrize(
    ("unlabeled", "words", "message"),
    [
        ("bands", "", "data.unlabeled has images of 5 channels, the encoder reads 1: give"),
        ("copies", "--labels-per-class 24", "all 300 images of 'copies' are labeled or validation images: give others"),
        ("nothing", "", "image folder 'nothing' is empty: give"),
        ("columns", "", "'columns' has no column of images: its columns are scan, site; give data.unlabeled_column"),
        ("columns", "--data.unlabeled_column sight", "has no column 'sight': its columns are scan, site; give data.unlab"),
        ("missing", "", "'missing'"),
        ("digits", "--steps 0", "steps is 0: give a positive number"),
        ("digits", "--steps 5 --self-training.start 1", "of 5 steps none is left for the unlabeled images; give"),
        ("digits", "--labels-per-class 0", "0 labels per class asked for"),
        ("digits", "--optim.ema 0", "optim.ema is 0: with data.unlabeled the average of the weights is the teacher, give"),
        ("digits", "--self-training.ratio 0", "self_training.ratio is 0: give 1"),
        ("digits", "--self-training.alignment uniforn", "unknown self_training.alignment 'uniforn'; did you mean 'uniform'"),
    ],
)
def test_wrong_input_is_one_line(digits, encoder_folder, tmp_path, monkeypatch, capsys, unlabeled, words, message):
    monkeypatch.chdir(tmp_path)
    if unlabeled == "bands":
        other_channels(tmp_path / "bands")
    elif unlabeled == "copies":
        copies(digits, tmp_path / "copies")
    elif unlabeled == "nothing":
        (tmp_path / "nothing").mkdir()
    elif unlabeled == "columns":
        write_columns(digits, tmp_path / "columns")
    elif unlabeled == "digits":
        unlabeled = str(digits.unlabeled)
    command = ["finetune", "classification", "--init", str(encoder_folder), "--data", str(digits.labeled), "--out", "run"]
    assert main([*command, "--unlabeled", unlabeled, "--labels-per-class", "1", *words.split()]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line and "Generating train split" not in line]  # of reading Parquet
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("simmim: ")
    assert not Path("run").exists()


def test_a_class_without_labels_is_refused(digits, encoder_folder, tmp_path):
    from simmim.finetune.classification.self_training.prepare import read_unlabeled

    labels = read_labeled_images(digits.labeled, 1, seed=0)
    fewer = replace(labels, train=labels.train.select(range(9)))
    with pytest.raises(ValueError, match="9 labels for 10 classes: class '9' has none to learn from"):
        read_unlabeled(settings(digits, encoder_folder, tmp_path / "run"), fewer)


@pytest.mark.parametrize("changes", [{"ratio": 0}, {"start": 1.5}, {"weight": 0.0}, {"affine": -1.0}, {"erasing": 2.0}])
def test_settings_out_of_range(changes):
    with pytest.raises(ValueError, match="self_training"):
        SelfTrainingSettings(**changes)


def test_a_study_gives_the_unlabeled_images_to_scratch_too(digits, encoder_folder):
    data = LabeledSettings(str(digits.labeled), unlabeled=str(digits.unlabeled))
    chosen = StudySettings(data=data, init=str(encoder_folder), out="study", self_training=SelfTrainingSettings(ratio=2))
    arms = {arm.name: arm.settings for arm in build_arms(chosen, {"pre-trained": 1})}
    assert [*arms] == ["pre-trained", "from scratch", "pre-trained semi", "from scratch semi"]
    plain, semi = [arms["pre-trained"], arms["from scratch"]], [arms["pre-trained semi"], arms["from scratch semi"]]
    assert arms["from scratch semi"].init == "none" and arms["from scratch semi"].encoder.like == str(encoder_folder)
    assert all(arm.data.unlabeled == data.unlabeled and arm.self_training.ratio == 2 for arm in semi)
    assert all(arm.data.unlabeled is None and arm.self_training == SelfTrainingSettings() for arm in plain)


def test_self_training_needs_unlabeled_images(digits):
    with pytest.raises(ValueError, match=r"give them by data\.unlabeled"):
        ClassificationSettings(data=str(digits.labeled), out="run", self_training=SelfTrainingSettings(ratio=2))


def test_batches_of_two_processes_are_those_of_one(digits, encoder_folder, tmp_path):
    prepared = task_named("classification").prepare(settings(digits, encoder_folder, tmp_path / "run"), "cpu")
    samples = prepared.train

    def taken(batch_size, rank=0, world_size=1, start=0, count=6):
        return [keys for _, keys in zip(range(count), samples.batches(batch_size, rank, world_size, start))]

    alone, first, second = taken(4), taken(2, 0, 2), taken(2, 1, 2)
    assert [len(keys) for keys in alone] == [4] + [4 + 20] * 5, "the first step is on labels alone"
    assert [set(keys) for keys in alone] == [{*one, *other} for one, other in zip(first, second)]
    assert taken(4, start=3, count=3) == alone[3:]
    sample = samples[alone[1][-1]]
    assert sample["weak"].shape == sample["image"].shape and samples.path_of(alone[1][-1]).endswith(".png")
