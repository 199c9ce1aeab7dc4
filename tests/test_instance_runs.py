"""Detection runs that learn masks, by the command, on disks and squares: what they learn and write, and what they refuse."""

import contextlib
import csv
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from mask_files import CLASSES, draw_scenes, write_scenes
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simmim.cli import main
from simmim.data import normalize, open_picture
from simmim.finetune import DetectionSettings, finetune, load_detector
from simmim.finetune.detection.inference import trusted
from simmim.finetune.detection.labels.scenes import read_boxed_scenes
from simmim.finetune.detection.masks import draw
from simmim.finetune.detection.settings import BoxSettings, HeadSettings
from simmim.finetune.settings import EncoderSettings, OptimSettings

SIDE = 40


@pytest.fixture(scope="module")
def mask_folder(tmp_path_factory):
    """COCO's layout: ten scenes to train on, and the same to validate with."""
    folder = tmp_path_factory.mktemp("masks")
    for part in ("train", "val"):
        write_scenes(folder, draw_scenes(10, 1, (SIDE, SIDE)), part)
    return folder


@pytest.fixture(scope="module")
def run(mask_folder, encoder_folder, tmp_path_factory):
    """One run of the command, on ten images."""
    out = tmp_path_factory.mktemp("instances") / "run"
    words = f"finetune detection --init {encoder_folder} --data {mask_folder} --out {out} --steps 400 --batch-size 5 "
    words += "--image-size 40 --validations 2 --head.width 32 --head.convolutions 1 --optim.lr 1 --optim.layer-decay 1 "
    words += "--optim.warmup-epochs 5 --data.scale [0.95,1.05] --data.flip 0 --data.color-jitter 0 --workers 0 "
    assert main([*words.split(), "--precision", "32-true"]) == 0
    return out


def settings(mask_folder, encoder_folder, out, **changes):
    values = {
        "data": BoxSettings(str(mask_folder)),
        "out": str(out),
        "init": str(encoder_folder),
        "labels": 8,
        "steps": 6,
        "batch_size": 4,
        "validations": 2,
        "workers": 0,
        "precision": "32-true",
        "head": HeadSettings(16, 1),
        **changes,
    }
    return DetectionSettings(**values)


def image_of(folder, number):
    """An image as the model sees it, (1, 1, 40, 40) uint8."""
    record = {"bytes": None, "path": str(folder / "images" / "val" / f"{number:02d}.png")}
    return open_picture(record, 1).crop((0, 0, SIDE, SIDE), (SIDE, SIDE))[None]


def test_ten_images_are_learned(mask_folder, run):
    """To an AP50 of masks above 0.9; the masks that the saved model trusts cover what is drawn."""
    with (run / "mask-ap.csv").open(newline="") as text:
        written = {row["class"]: [float(row[name]) for name in ("AP", "AP50", "AP75")] for row in csv.DictReader(text)}
    assert set(written) == set(CLASSES) and np.mean([row[1] for row in written.values()]) > 0.9
    with (run / "metrics.csv").open(newline="") as text:
        rows = [row for row in csv.DictReader(text) if row["mask_ap"]]
    best = json.loads((run / "encoder" / "config.json").read_text())["provenance"]["mask_ap"]
    assert best == pytest.approx(max(float(row["mask_ap"]) for row in rows), abs=1e-4)
    assert best == pytest.approx(np.mean([row[0] for row in written.values()]), abs=1e-3)
    assert all(float(row["ap50"]) > 0.9 for row in rows[-1:]) and (run / "ap.csv").is_file()
    saved, overlaps = load_detector(run), []
    assert saved.model.shape.masks
    for number, shapes in enumerate(draw_scenes(10, 1, (SIDE, SIDE)), start=1):
        [found] = saved.find(image_of(mask_folder, number))
        masks = trusted(found, saved.thresholds).draw_masks((SIDE, SIDE)).numpy()
        for shape in shapes:
            overlaps.append(max([(mask & shape.pixels).sum() / (mask | shape.pixels).sum() for mask in masks], default=0))
    assert np.mean(overlaps) > 0.7 and len(overlaps) == 15


def test_a_run_logs_losses_precisions_and_pictures_of_masks(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    expected = {f"validation/{name}" for name in ("ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75")}
    expected |= {"mask_ap_by_class/disk", "mask_ap_by_size/small", "ap_by_class/disk", "loss/masks", "loss/boxes"}
    assert expected <= set(events.Tags()["scalars"])
    losses = [event.value for event in events.Scalars("loss/masks")]
    assert losses[-1] < 0.3 < losses[0]
    picture = np.asarray(Image.open(run / "boxes.png").convert("RGB")).astype(int)
    assert (np.ptp(picture, axis=2) > 60).sum() > 2000, "masks are tinted"


def test_resumed_equals_uninterrupted(mask_folder, encoder_folder, tmp_path, power_cut, monkeypatch):
    """Bit by bit, with accumulated parts, stochastic depth, and fewer masks learned than there are points."""
    monkeypatch.setattr("simmim.finetune.run.MIN_STEPS_PER_CHECKPOINT", 1)
    monkeypatch.setattr("simmim.finetune.detection.losses.MAX_MASKS", 7)
    drop = {"encoder": EncoderSettings(drop_path_rate=0.3), "optim": OptimSettings(accumulate=2, label_smoothing=0.0)}
    whole = finetune(settings(mask_folder, encoder_folder, tmp_path / "whole", **drop), quiet=True)
    with power_cut(after_step=5):
        finetune(settings(mask_folder, encoder_folder, tmp_path / "cut", **drop), quiet=True)
    cut = finetune(settings(mask_folder, encoder_folder, tmp_path / "cut", **drop, resume=True), quiet=True)
    first, second = (torch.load(r.run / "checkpoints/last.ckpt", weights_only=True) for r in (whole, cut))
    assert any("head.control" in name for name in first["state_dict"])
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    assert cut == replace(whole, run=cut.run) and whole.monitor == "mask_ap"


def test_boxes_alone_are_learned_where_that_is_asked_for(mask_folder, encoder_folder, tmp_path):
    heads = [HeadSettings(16, 1, masks) for masks in (False, None)]
    runs = [
        finetune(
            settings(mask_folder, encoder_folder, tmp_path / str(head.masks), steps=1, validations=1, head=head), quiet=True
        )
        for head in heads
    ]
    assert [one.monitor for one in runs] == ["ap", "mask_ap"] and not (runs[0].run / "mask-ap.csv").exists()
    shapes = [load_detector(one.run).model.shape for one in runs]
    assert [shape.masks for shape in shapes] == [False, True]
    saved = load_detector(runs[0].run)
    [found] = saved.find(image_of(mask_folder, 1))
    assert found.masks is None
    with pytest.raises(ValueError, match="the detector was trained on boxes alone"):
        found.draw_masks((SIDE, SIDE))


def test_what_predict_writes_scores_as_validation_did(mask_folder, run, tmp_path, capsys):
    """As COCO results, judged by pycocotools from the files alone; areas and counts are those of the masks."""
    images, out = mask_folder / "images" / "val", tmp_path / "out"
    assert main(["predict", "--run", str(run), "--images", str(images), "--out", str(out)]) == 0
    assert "10 images, " in capsys.readouterr().out
    labels = json.loads((mask_folder / "annotations" / "instances_val.json").read_text())
    described = json.loads((out / "images.json").read_text())
    ids = {one["file_name"].rpartition("/")[2]: one["id"] for one in described["images"]}
    new_ids = {image["id"]: ids[image["file_name"]] for image in labels["images"]}
    for one in labels["annotations"]:
        one["image_id"] = new_ids[one["image_id"]]
    described["annotations"] = labels["annotations"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **described}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(str(out / "results.json")), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    best = json.loads((run / "encoder" / "config.json").read_text())["provenance"]["mask_ap"]
    assert judge.stats[0] == pytest.approx(best, abs=0.002)
    saved = load_detector(run)
    with (out / "boxes.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    with (out / "counts.csv").open(newline="") as text:
        counts = {row["path"].rpartition("/")[2]: row for row in csv.DictReader(text)}
    assert len(counts) == 10
    for number in range(1, 11):
        [found] = saved.find(image_of(mask_folder, number))
        found = trusted(found.at((SIDE, SIDE), (SIDE, SIDE)), saved.thresholds)
        areas = [int(mask.sum()) for mask in found.draw_masks((SIDE, SIDE))]
        name = f"{number:02d}.png"
        assert [int(row["area"]) for row in rows if row["path"].endswith(name) and row["area"]] == areas
        for label, class_name in enumerate(CLASSES):
            of_class = [area for area, one in zip(areas, found.classes.tolist()) if one == label]
            assert int(counts[name][class_name]) == len(of_class)
            assert int(counts[name][f"area of {class_name}"]) == sum(of_class)
    assert len(read_boxed_scenes(str(out / "boxes.csv"), None, 0).train) > 0, "the table can be read as labels"
    overlay = np.asarray(Image.open(out / "overlays" / "01.png")).astype(int)
    assert overlay.shape == (SIDE, SIDE, 3) and (np.ptp(overlay, axis=2) > 40).sum() > 40


def test_an_exported_detector_draws_the_same_masks(mask_folder, run, tmp_path):
    """As this toolkit's files, and as ONNX by the code of its card."""
    for format in ("safetensors", "onnx"):
        words = ["export", "--run", str(run), "--format", format, "--form", "detector", "--out", str(tmp_path / format)]
        assert main([*words, "--license", "CC0-1.0"]) == 0
        card = (tmp_path / format / "README.md").read_text()
        assert "pipeline_tag: image-segmentation" in card and "- mask ap: 0." in card and "masks by CondInst" in card
    saved, own = load_detector(run), load_detector(tmp_path / "safetensors")
    images = image_of(mask_folder, 2)
    [expected], [found] = saved.find(images), own.find(images)
    assert torch.equal(expected.draw_masks((SIDE, SIDE)), found.draw_masks((SIDE, SIDE)))
    card = (tmp_path / "safetensors" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("FOLDER", str(tmp_path / "safetensors"))
    place = {"images": images}
    exec(code, place)
    assert torch.equal(place["masks"], found.draw_masks((SIDE, SIDE)))
    code = re.search(r"```python\n(.*?)```", (tmp_path / "onnx" / "README.md").read_text(), re.S)[1]
    place = {"given": normalize(images, saved.preprocessing.mean, saved.preprocessing.std).numpy()}
    exec(re.sub(r"numpy\.zeros\([^#]*", "given  ", code.replace("FOLDER", str(tmp_path / "onnx"))), place)
    best = trusted(expected, saved.thresholds)
    assert len(best.boxes) == 2
    for number, name in enumerate(CLASSES):
        rows = [row for row, label in enumerate(best.classes.tolist()) if label == number]
        assert len(place["masks"][name]) == len(rows)
        for logits, row in zip(place["masks"][name], rows):
            top, left = (int(start // 4) for start in best.masks[row].corner)
            wanted = best.masks[row].logits
            part = logits[top : top + wanted.shape[0], left : left + wanted.shape[1]]
            assert abs(part - wanted).max() < 0.05 * max(1, abs(wanted).max())
    assert draw(best.masks[0].packed((SIDE, SIDE)), (SIDE, SIDE)).any()


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [SIDE, SIDE], "counts": [5, 10]}, "annotation 100: run lengths of 15 pixels, and the image has 40 x 40"),
        ({"size": [20, 20], "counts": [400]}, r"annotation 100: run lengths of 20x20 pixels, and the image has 40x40"),
        ([[1, 2, 3, 4]], "annotation 100: polygon 0 has 4 numbers, expected x and y of 3 points or more"),
        ([], r"annotation 100 has no mask, as 1 of \d+ objects .* head.masks false"),
    ],
)
def test_wrong_masks_end_in_one_line(mask_folder, tmp_path, capsys, segmentation, message):
    data = shutil.copytree(mask_folder, tmp_path / "data")
    labels = data / "annotations" / "instances_train.json"
    content = json.loads(labels.read_text())
    content["annotations"][0]["segmentation"] = segmentation
    labels.write_text(json.dumps(content))
    words = ["finetune", "detection", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
