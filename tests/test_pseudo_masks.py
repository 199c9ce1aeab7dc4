"""Segmentation with unlabeled images: pseudo-masks, pasted boxes, steps, what is left out, resuming, wrong input."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import load_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.cli import main
from simmim.data import find_images
from simmim.data.label_maps import ClassScheme
from simmim.finetune import SegmentationSettings, finetune
from simmim.finetune.augment.color import ColorSettings
from simmim.finetune.registry import task_named
from simmim.finetune.segmentation.model import HeadShape, Segmenter
from simmim.finetune.segmentation.module import SegmentationFinetuning
from simmim.finetune.segmentation.preparation import read_labels
from simmim.finetune.segmentation.self_training.module import PseudoMaskTraining
from simmim.finetune.segmentation.self_training.prepare import read_unlabeled
from simmim.finetune.segmentation.self_training.pseudo_masks import PixelLabeler, PixelProbabilities, paste_boxes
from simmim.finetune.segmentation.self_training.settings import PseudoMaskSettings
from simmim.finetune.segmentation.settings import HeadSettings, SceneSettings
from simmim.finetune.self_training.pseudo_labels import PseudoLabeler
from simmim.finetune.self_training.teacher import Teacher
from simmim.finetune.settings import EncoderSettings, OptimSettings
from simmim.reading import AUTO

LABELED, UNLABELED, CLASSES, IGNORED = 3, 4, 3, 255


@pytest.fixture(scope="module")
def photos(scene_folder, tmp_path_factory):
    """Unlabeled images: twelve digits on photographs like the labeled scenes, one smaller than a crop."""
    folder = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(sorted((scene_folder / "train/images").iterdir())[:12]):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(folder / f"{number}.png")
    Image.new("L", (9, 12), 90).save(folder / "small.png")
    return folder


# --- pseudo-masks ------------------------------------------------------------------------------------------------------


def test_probabilities_of_pixels_in_parts_are_those_of_all():
    """Against float64, image by image and all at once; only those inside of images."""
    logits, inside = torch.randn(5, CLASSES, 4, 4) * 3, torch.rand(5, 9, 8) < 0.7
    resized = torch.nn.functional.interpolate(logits.double(), (9, 8), mode="bilinear", align_corners=False)
    expected = torch.cat([one[:, place].T for one, place in zip(resized.softmax(1), inside)])
    for most in (1, 2 * CLASSES * 72, 2**20):
        parts = PixelProbabilities(logits, inside, max_scores=most)
        assert len([*parts]) == {1: 5, 2 * CLASSES * 72: 3, 2**20: 1}[most]
        torch.testing.assert_close(torch.cat([*parts]).double(), expected, rtol=1e-5, atol=1e-6)


def test_labels_of_parts_are_those_of_the_whole():
    """Means, thresholds and labels do not depend on how pixels are divided; nothing labeled leaves the mean as it is."""
    target, whole = torch.tensor([0.7, 0.2, 0.1]), torch.softmax(2 * torch.randn(60, 3), 1)
    labeled, one, other = whole[:7], PseudoLabeler(3, target, 0.9), PseudoLabeler(3, target, 0.9)
    for _ in range(3):
        found = one([whole], [labeled], lambda value: value)
        in_parts = other(whole.split(13), labeled.split(2), lambda value: value)
        assert torch.equal(found.labels, in_parts.labels) and torch.equal(found.confident, in_parts.confident)
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)
    before = one.labeled_confidence.clone()
    one([whole], [labeled[:0]], lambda value: value)
    assert torch.equal(one.labeled_confidence, before) and before > 0


def test_without_alignment_thresholds_still_follow_the_labels():
    """A rare class that is predicted as often as it is labeled is no easier than a frequent one."""
    predictions = torch.tensor([[0.9, 0.1]]).repeat(90, 1)
    predictions = torch.cat([predictions, torch.tensor([[0.1, 0.9]]).repeat(10, 1)])
    labeler = PseudoLabeler(2, predictions.mean(0), 0.9, aligned=False)
    labeler([predictions], [predictions], lambda value: value)
    torch.testing.assert_close(labeler.thresholds(), torch.full((2,), 0.95 * 0.9))
    assert torch.equal(labeler.align(predictions), predictions)


def test_thresholds_of_pixels_by_numpy():
    """Four batches; in float64, by the docstrings' formulas. The last class is never predicted for a labeled pixel."""
    generator, target, decay = np.random.default_rng(0), np.array([0.7, 0.2, 0.1]), 0.6
    labeler = PixelLabeler(3, torch.tensor(target, dtype=torch.float32), decay)
    prediction, aligned, confidence, own, shares = np.zeros(3), np.zeros(3), 0.0, np.zeros(3), np.zeros(3)
    for number in range(4):
        p, labeled = generator.dirichlet((0.9, 0.6, 0.4), 50), generator.dirichlet((3, 2, 0.1), 30)
        labeled[:, 2] = 0
        labeled /= labeled.sum(1, keepdims=True)
        found = labeler([torch.tensor(p).float()], torch.tensor(labeled).float().split(11), lambda value: value)
        keep = min(1 - 1 / (number + 1), decay)
        prediction = keep * prediction + (1 - keep) * p.mean(0)
        q = p * target / prediction
        q /= q.sum(1, keepdims=True)
        aligned = keep * aligned + (1 - keep) * q.mean(0)
        confidence = keep * confidence + (1 - keep) * labeled.max(1).mean()
        one_hot = np.eye(3)[labeled.argmax(1)]
        own = keep * own + (1 - keep) * (one_hot * labeled).mean(0)
        shares = keep * shares + (1 - keep) * one_hot.mean(0)
        assert (shares[:2] > 0.1).all() and shares[2] == 0
        by_class = np.array([own[0] / shares[0], own[1] / shares[1], confidence])
        ratio = aligned / target
        np.testing.assert_allclose(labeler.thresholds().numpy(), 0.95 * by_class * ratio / ratio.max(), rtol=1e-5)
        assert (found.labels.numpy() == q.argmax(1)).all()
        assert (found.confident.numpy() == (q.max(1) >= labeler.thresholds().numpy()[q.argmax(1)])).all()


def test_boxes_are_pasted_where_they_teach():
    """By loops. The third image's partner is confident only outside of the box, and so nothing of it is pasted."""
    images, masks = torch.rand(4, 2, 6, 8), torch.randint(0, 3, (4, 6, 8))
    partners, partner_masks = torch.rand(3, 2, 6, 8), torch.randint(0, 3, (3, 6, 8))
    boxes = torch.tensor([[1, 2, 4, 7], [0, 0, 0, 0], [0, 0, 3, 8], [2, 0, 6, 3]])
    partner_masks[1, :3] = IGNORED
    partner_masks[0, 1:4, 2:6] = IGNORED
    found, found_masks = paste_boxes(images, masks, partners, partner_masks, boxes, IGNORED)
    expected, expected_masks = images.clone(), masks.clone()
    for row, partner in ((0, 0), (3, 2)):
        for y in range(boxes[row, 0], boxes[row, 2]):
            for x in range(boxes[row, 1], boxes[row, 3]):
                expected[row, :, y, x] = partners[partner, :, y, x]
                expected_masks[row, y, x] = partner_masks[partner, y, x]
    assert torch.equal(found, expected) and torch.equal(found_masks, expected_masks)


# --- steps -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(encoder_folder):
    """build(…): a module whose metrics are in `logged`; the teacher has other weights."""

    def build(kind=PseudoMaskTraining, norm="image", **changes):
        torch.manual_seed(1)
        preprocessing, optim = Preprocessing((32, 32), (0.13,), (0.31,)), OptimSettings(layer_decay=0.75)
        scheme = ClassScheme(("a", "b", "c"), (0, 1, 2), 255)
        model = Segmenter(load_encoder(encoder_folder), CLASSES, HeadShape(16, norm, 0.0)).train()
        own = {}
        if kind is PseudoMaskTraining:
            own = {"labeler": PixelLabeler(CLASSES, torch.full((3,), 1 / 3), 0.9), "teacher": Teacher(0.9)}
            own |= {"strong": ColorSettings(jitter=0.5), "start": 2, "weight": 1.0, **changes}
        module = kind(model, preprocessing, scheme, "whole", lambda step: 0.1, optim, **own)
        strategy = SimpleNamespace(reduce=lambda value, reduce_op=None: value)
        module._trainer = SimpleNamespace(strategy=strategy, global_step=3, world_size=1)
        module.logged = {}
        module.log = lambda name, value, **_: module.logged.update({name: float(torch.as_tensor(value).detach())})
        if kind is PseudoMaskTraining:
            module.teacher.on_fit_start(None, module)
            for value in module.teacher.average.values():
                value.add_(torch.randn_like(value) * 0.3)
        return module

    return build


@pytest.fixture(scope="module")
def batch():
    """Labeled images, then unlabeled ones, the first and the last of which have partners."""
    generator = torch.Generator().manual_seed(0)
    images, partners = (torch.randint(0, 256, (n, 1, 32, 32), generator=generator, dtype=torch.uint8) for n in (7, 2))
    label_map = torch.zeros(7, 32, 32, dtype=torch.uint8)
    label_map[:LABELED] = torch.randint(0, 3, (LABELED, 32, 32), generator=generator)
    label_map[4, 20:] = IGNORED  # outside of the second unlabeled image
    boxes = torch.tensor([[4, 4, 20, 30], [0, 0, 0, 0], [0, 0, 0, 0], [10, 0, 32, 12]])
    partner_map = torch.zeros(2, 32, 32, dtype=torch.uint8)
    more = {"box": boxes, "partner": partners, "partner_map": partner_map}
    return {"image": images, "label_map": label_map, "seed": list(range(7)), "skipped": [], **more}


def labels_alone(batch):
    return {name: batch[name][:LABELED] for name in ("image", "label_map", "seed")} | {"skipped": []}


def gradients(module, batch):
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), {name: value.grad.clone() for name, value in module.model.named_parameters()}


def make_confident(monkeypatch, thresholds):
    monkeypatch.setattr(PseudoLabeler, "thresholds", lambda self: torch.tensor(thresholds))


def test_the_loss_is_that_of_confident_pixels_over_all(build, batch, monkeypatch):
    """In float64 from the student's logits and the masks that a copy of the module gives."""
    make_confident(monkeypatch, [0.4, 0.4, 0.4])
    module = build()
    views = build().unlabeled_views(batch)
    assert views.num_pixels == 4 * 32 * 32 - 12 * 32
    assert 0 < (views.masks != IGNORED).sum() < views.masks.numel() - 12 * 32
    assert (views.masks[1, 20:] == IGNORED).all()
    loss = module.training_step(batch, 0)
    student = build()
    output = student.model(
        torch.cat([student.changed(batch["image"][:LABELED], batch["seed"][:LABELED], student.color), views.images]),
        with_auxiliary=True,
    )
    labeled = pseudo = 0.0
    for logits, weight in ((output.logits, 1.0), (output.auxiliary, 0.4)):
        logits = torch.nn.functional.interpolate(logits.double(), (32, 32), mode="bilinear").log_softmax(1)
        targets = torch.cat([batch["label_map"][:LABELED].long(), views.masks])
        taken = -logits.gather(1, targets.clamp(max=2)[:, None])[:, 0] * (targets != IGNORED)
        labeled += weight * taken[:LABELED].mean()
        pseudo += weight * taken[LABELED:].sum() / views.num_pixels
    assert module.logged["pseudo_loss"] == pytest.approx(float(pseudo), rel=1e-4)
    assert module.logged["labeled_loss"] == pytest.approx(float(labeled), rel=1e-4)
    assert float(loss) == pytest.approx(float(labeled + module.weight_at(3) * pseudo), rel=1e-4)


def test_pseudo_masks_come_from_the_teacher_and_the_colors_as_they_are(build, batch):
    """With the teacher's weights in a model in evaluation mode, on views that are not recolored."""
    module = build()
    other = build(strong=ColorSettings(jitter=0.9))
    first, second = module.unlabeled_views(batch), other.unlabeled_views(batch)
    assert torch.equal(first.masks, second.masks) and not torch.equal(first.images, second.images)
    alone = {name: value for name, value in batch.items() if not name.startswith("partner")}
    alone["box"] = torch.zeros_like(batch["box"])
    module, teacher = build(), build()
    teacher.teacher.swap(teacher.model, True)
    views = (batch["image"].float() / 255 - 0.13) / 0.31
    probabilities = torch.nn.functional.interpolate(teacher.model.eval()(views), (32, 32), mode="bilinear").softmax(1)
    inside = torch.ones(UNLABELED, 32, 32, dtype=torch.bool)
    inside[1, 20:] = False
    part = [probabilities[LABELED:].permute(0, 2, 3, 1)[inside]]
    of_labeled = [probabilities[:LABELED].permute(0, 2, 3, 1).reshape(-1, 3)]
    expected = PixelLabeler(3, torch.full((3,), 1 / 3), 0.9)(part, of_labeled, lambda value: value)
    found = module.unlabeled_views(alone).masks
    rows = [row for row in range(UNLABELED) if expected.confident.split(inside.sum((1, 2)).tolist())[row].any()]
    wanted = torch.full((UNLABELED, 32, 32), IGNORED)
    wanted[inside] = torch.where(expected.confident, expected.labels, IGNORED)
    assert torch.equal(found, wanted[rows]) and module.counts.tolist()[:2] == [len(part[0]), int(expected.confident.sum())]
    assert module.counts[2:].tolist() == torch.bincount(expected.labels[expected.confident], minlength=3).tolist()


def test_strong_views_move_no_pixel(build, batch):
    """RandAugment's rotations and shifts are left out: a pixel's new value depends on its image's values alone."""
    module = build()
    flat = torch.full((64, 1, 32, 32), 60, dtype=torch.uint8)
    flat[:, :, :, 16:] = 200
    color = ColorSettings(9.0, jitter=0.3)
    changed = module.changed(flat, list(range(64)), color)
    sides = changed[..., :15], changed[..., 17:]  # but for the edge, which sharpening widens
    assert all((side == side[..., :1, :1]).all() for side in sides)
    assert len({round(float(value), 4) for value in changed[:, 0, 0, 0]}) > 20


@pytest.mark.parametrize("norm", ["image", "batch"])
def test_zero_confident_pixels_are_a_step_on_labels_alone(build, batch, monkeypatch, norm):
    plain_module = build(kind=SegmentationFinetuning, norm=norm)
    plain_loss, plain = gradients(plain_module, labels_alone(batch))
    make_confident(monkeypatch, [2.0, 2.0, 2.0])
    module = build(norm=norm)
    loss, ours = gradients(module, batch)
    assert torch.equal(loss, plain_loss) and module.logged["confident_share"] == module.logged["pseudo_loss"] == 0
    assert all(torch.equal(ours[name], value) for name, value in plain.items())
    buffers = [dict(one.model.named_buffers()) for one in (module, plain_module)]
    torch.testing.assert_close(*buffers, rtol=0, atol=0)
    loss, ours = gradients(build(norm=norm), labels_alone(batch))  # nor does a batch without unlabeled images differ
    assert torch.equal(loss, plain_loss) and all(torch.equal(ours[name], value) for name, value in plain.items())


def test_an_image_of_no_class_leaves_no_trace(build, batch, monkeypatch):
    """Its pixels are not confident: whatever they are, the step is the same; also where a box of it would be pasted."""
    kept = PseudoMaskTraining.pseudo_masks

    def pseudo_masks(self, images, *rest):
        masks = kept(self, images, *rest)
        masks[:] = masks % 2  # two classes, all confident
        masks[[2, UNLABELED + 1]] = IGNORED  # the third image, and the last one's partner
        return masks

    monkeypatch.setattr(PseudoMaskTraining, "pseudo_masks", pseudo_masks)
    monkeypatch.setattr(PseudoLabeler, "align", lambda self, p: p.new_tensor([0.0, 1.0, 0.0]).expand_as(p))
    other = {**batch, "image": batch["image"].clone(), "partner": batch["partner"].clone()}
    other["image"][LABELED + 2] = 255 - other["image"][LABELED + 2]
    other["partner"][1] = 7
    pair = [gradients(build(norm="batch"), one) for one in (batch, other)]
    torch.testing.assert_close(*pair, rtol=0, atol=0)
    changed = {**batch, "image": batch["image"].clone()}
    changed["image"][LABELED + 1] = 255 - changed["image"][LABELED + 1]
    assert not torch.equal(gradients(build(norm="batch"), changed)[0], pair[0][0]), "another one does"


# --- samples and what is left out --------------------------------------------------------------------------------------


def settings(scene_folder, photos, encoder_folder, out, **changes):
    data = SceneSettings(str(scene_folder), unlabeled=str(photos))
    own = {"labels": 8, "steps": 12, "batch_size": 4, "validations": 3, "head": HeadSettings(width=16)}
    own["optim"] = OptimSettings(lr=0.05, ema=0.9, label_smoothing=0.0)
    return SegmentationSettings(**{"data": data, "out": str(out), "init": str(encoder_folder), **own, **changes})


def test_batches_of_two_processes_are_those_of_one(scene_folder, photos, encoder_folder, tmp_path):
    run = settings(scene_folder, photos, encoder_folder, tmp_path / "run", self_training=PseudoMaskSettings(ratio=2))
    samples = task_named("segmentation").prepare(run, "cpu").train

    def taken(batch_size, rank=0, world_size=1, start=0, count=6):
        return [keys for _, keys in zip(range(count), samples.batches(batch_size, rank, world_size, start))]

    alone, first, second = taken(4), taken(2, 0, 2), taken(2, 1, 2)
    assert [len(keys) for keys in alone] == [4] + [4 + 8] * 5, "the first step is on labels alone"
    assert [set(keys) for keys in alone] == [{*one, *other} for one, other in zip(first, second)]
    assert taken(4, start=3, count=3) == alone[3:]
    keys = [key for batch in alone for key in batch if key.unlabeled]
    drawn = [samples[key] for key in keys]
    again = [samples[key] for key in keys]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(drawn, again) for name in one if name in BOXED)
    boxed = [sample for sample in drawn if "partner" in sample]
    assert 0 < len(boxed) < len(drawn) and all(sample["box"].any() == ("partner" in sample) for sample in drawn)
    assert all(
        sample["image"].shape == (1, 32, 32) and set(sample["label_map"].unique().tolist()) <= {0, 255} for sample in drawn
    )


BOXED = ("image", "label_map", "box", "partner", "partner_map")


def test_labeled_and_judging_images_are_never_unlabeled(scene_folder, photos, encoder_folder, tmp_path):
    """By content, under any name; in cross-validation neither judge is."""
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    for number, path in enumerate(find_images(scene_folder / "train/images") + find_images(scene_folder / "val/images")):
        shutil.copy(path, mixed / f"copy-{number}.png")
    run = settings(scene_folder, mixed, encoder_folder, tmp_path / "run")
    for fold, judging in ((None, 10), ((0, 2), 14)):
        run = replace(run, data=replace(run.data, fold=fold))
        labels = read_labels(run)
        found = read_unlabeled(run, labels, read_labels, AUTO)
        assert (found.num_labeled, found.num_judging) == (8 if fold is None else 4, judging)
        assert len(found.images) == 13 + 40 - found.num_labeled - judging
        contents = {Path(row["image"]["path"]).read_bytes() for row in found.images}
        used = [row["image"]["path"] for part in (labels.train, labels.validation) for row in part]
        assert not contents & {Path(path).read_bytes() for path in (*used, *find_images(scene_folder / "val/images"))}


# --- runs --------------------------------------------------------------------------------------------------------------


def read_rows(run):
    with (run / "pseudo-labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_resumed_equals_uninterrupted(scene_folder, photos, encoder_folder, tmp_path, power_cut, monkeypatch):
    """Bit by bit, with dropout, stochastic depth, boxes and jitter."""
    monkeypatch.setattr("simmim.finetune.run.MIN_STEPS_PER_CHECKPOINT", 1)
    optim = OptimSettings(lr=0.05, ema=0.9, accumulate=2, label_smoothing=0.0)
    longer = {"steps": 10, "optim": optim, "encoder": EncoderSettings(drop_path_rate=0.3), "validations": 2}
    longer |= {"self_training": PseudoMaskSettings(start=0.1, color_jitter=0.5, cutmix=0.8)}
    given = (scene_folder, photos, encoder_folder)
    whole = finetune(settings(*given, tmp_path / "whole", **longer), quiet=True)
    with power_cut(after_step=7):
        finetune(settings(*given, tmp_path / "cut", **longer), quiet=True)
    cut = finetune(settings(*given, tmp_path / "cut", **longer, resume=True), quiet=True)
    first, second = (torch.load(r.run / "checkpoints/last.ckpt", weights_only=True) for r in (whole, cut))
    torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    assert first["state_dict"]["labeler.num_batches"] == 2 * 9, "a tenth of the steps is on labels alone"
    torch.testing.assert_close(first["callbacks"]["AverageWeights"], second["callbacks"]["AverageWeights"], rtol=0, atol=0)
    assert cut == replace(whole, run=cut.run)
    for name in ("encoder/encoder.safetensors", "pseudo-labels.csv", "iou.csv"):
        assert (cut.run / name).read_bytes() == (whole.run / name).read_bytes(), name
    rows = read_rows(cut.run)
    assert [*rows[0]] == ["step", "pixels", "confident", "background", "zero", "one"] and int(rows[-1]["step"]) == 10
    with (cut.run / "metrics.csv").open(newline="") as file:
        rates = [row for row in csv.DictReader(file) if row["unlabeled_images_per_s"]]
    assert rates and all(row["unlabeled_images_per_s"] == row["labeled_images_per_s"] for row in rates)
    assert all(0 <= int(row["confident"]) <= int(row["pixels"]) <= 4 * 32 * 32 for row in rows)
    assert sum(float(rows[-1][name]) for name in ("background", "zero", "one")) == pytest.approx(1, abs=1e-3)
    provenance = json.loads((cut.run / "encoder/config.json").read_text())["provenance"]
    assert (provenance["unlabeled"], provenance["unlabeled_images"]) == (photos.name, 13)


def test_what_is_left_out_and_chosen_is_said(scene_folder, photos, encoder_folder, tmp_path, capsys):
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    shutil.copy(find_images(scene_folder / "val/images")[0], mixed)
    words = ["finetune", "segmentation", "--init", encoder_folder, "--data", scene_folder, "--unlabeled", mixed]
    words += ["--out", tmp_path / "run", "--labels", 6, "--steps", 2, "--batch-size", 4, "--workers", 0, "--head.width", 16]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "chosen   13 unlabeled images; 1 of the unlabeled images are validation ones and left out" in printed
    assert "unlabeled images per labeled one" in printed and "chosen   teacher" in printed
    assert "strong views of unlabeled images" in printed


@pytest.mark.parametrize(
    ("unlabeled", "words", "message"),
    [
        ("bands", "", "data.unlabeled has images of 5 channels, the encoder reads 1: give"),
        ("copies", "", "all 40 images of 'copies' are labeled or validation images: give others"),
        ("nothing", "", "image folder 'nothing' is empty: give"),
        ("missing", "", "'missing'"),
        ("photos", "--steps 0", "steps is 0: give a positive number"),
        ("photos", "--steps 5 --self-training.start 1", "of 5 steps none is left for the unlabeled images; give"),
        ("photos", "--optim.ema 0", "optim.ema is 0: with data.unlabeled the average of the weights is the teacher, give"),
        ("photos", "--self-training.cutmix 2", "self_training.cutmix is 2.0: give a probability"),
        ("photos", "--self-training.color_jitter 1", "self_training.color_jitter is 1.0: give a share in [0, 1)"),
        ("", "--self-training.ratio 2", "self_training is about unlabeled images: give them by data.unlabeled"),
    ],
)
def test_wrong_input_is_one_line(
    scene_folder, photos, encoder_folder, tmp_path, monkeypatch, capsys, unlabeled, words, message
):
    monkeypatch.chdir(tmp_path)
    if unlabeled == "bands":
        (tmp_path / "bands").mkdir()
        np.save(tmp_path / "bands/bands.npy", np.zeros((5, 28, 28), np.uint8))
    elif unlabeled == "copies":
        (tmp_path / "copies").mkdir()
        for number, path in enumerate(find_images(scene_folder / "train/images") + find_images(scene_folder / "val/images")):
            shutil.copy(path, tmp_path / f"copies/{number}.png")
    elif unlabeled == "nothing":
        (tmp_path / "nothing").mkdir()
    given = ["--unlabeled", str(photos) if unlabeled == "photos" else unlabeled] if unlabeled else []
    command = ["finetune", "segmentation", "--init", str(encoder_folder), "--data", str(scene_folder), "--out", "run"]
    assert main([*command, *given, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("simmim: ")
    assert not Path("run").exists()
