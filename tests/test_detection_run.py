"""Detection runs by the command, on bright shapes: what they learn and write, and what they refuse."""

import contextlib
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from box_files import CLASSES, Scene, write_coco
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simmim import load_encoder
from simmim.checkpoints import read_encoder
from simmim.checkpoints.own_files import save_encoder
from simmim.cli import main
from simmim.data import normalize, open_picture
from simmim.finetune import DetectionSettings, finetune, load_detector
from simmim.finetune.detection.ap import Judged, average_precision
from simmim.finetune.detection.defaults import resolve_image_size, resolve_settings
from simmim.finetune.detection.inference import trusted
from simmim.finetune.detection.labels.scenes import ClassSize, read_boxed_scenes
from simmim.finetune.detection.model import save_detector
from simmim.finetune.detection.preparation import read_labels
from simmim.finetune.detection.settings import BoxSettings, HeadSettings
from simmim.finetune.registry import task_named
from simmim.finetune.settings import EncoderSettings, OptimSettings
from simmim.finetune.start import takes_larger_images
from simmim.reading import Reading


def scenes_of(count, seed, side=40):
    """One or two rectangles of two classes, which differ in brightness, a scene."""
    generator, scenes = np.random.default_rng(seed), []
    for number in range(count):
        objects = []
        for half in range(1 + number % 2):
            width, height = generator.integers(8, 17, 2).tolist()
            left = half * side // 2 + int(generator.integers(0, side // 2 - width + 1))
            top = int(generator.integers(0, side - height + 1))
            objects.append((CLASSES[int(generator.integers(0, 2))], left, top, left + width, top + height))
        scenes.append(Scene(f"{seed}-{number:02d}", (side, side), tuple(objects)))
    return scenes


@pytest.fixture(scope="module")
def box_folder(tmp_path_factory):
    """COCO's layout: ten scenes to train on, and the same to validate with."""
    folder = tmp_path_factory.mktemp("boxes")
    for part in ("train", "val"):
        write_coco(folder, scenes_of(10, 1), f"images/{part}", f"annotations/instances_{part}2017.json")
    return folder


def settings(box_folder, encoder_folder, out, **changes):
    values = {
        "data": BoxSettings(str(box_folder)),
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


@pytest.fixture(scope="module")
def run(box_folder, encoder_folder, tmp_path_factory):
    """One run of the command, on ten images."""
    out = tmp_path_factory.mktemp("detection") / "run"
    words = f"finetune detection --init {encoder_folder} --data {box_folder} --out {out} --steps 300 --batch-size 5 "
    words += (
        "--validations 2 --head.width 64 --head.convolutions 1 --optim.lr 1 --optim.layer-decay 1 --optim.warmup-epochs 5 "
    )
    words += "--data.scale [0.8,1.25] --data.color-jitter 0 --workers 0 --precision 32-true"
    assert main(words.split()) == 0
    return out


@pytest.mark.parametrize(
    ("device", "batch_size", "steps", "line"),
    [
        ("cpu", 2, 1200, "batch size 2: many small steps are worth more than few large ones"),
        ("cuda", 10, 500, "batch size 10: all training images"),
    ],
)
def test_defaults_of_few_images(device, batch_size, steps, line, box_folder, tmp_path):
    opened = settings(box_folder, "none", tmp_path, labels=None, steps=None, batch_size=None, image_size=32)
    resolved, reasons = resolve_settings(opened, read_labels(opened), small=True, device=device)
    assert (resolved.batch_size, resolved.num_steps(10), resolved.optim.layer_decay) == (batch_size, steps, 1.0)
    assert line in reasons and f"{resolved.epochs:g} epochs: {steps:,} steps" in reasons
    given = replace(opened, batch_size=5, steps=7, optim=replace(opened.optim, layer_decay=0.9))
    resolved, reasons = resolve_settings(given, read_labels(given), small=True, device=device)
    assert (resolved.batch_size, resolved.num_steps(10), resolved.optim.layer_decay) == (5, 7, 0.9)
    assert not any("batch size" in reason or "epochs" in reason for reason in reasons)


IMAGES = SimpleNamespace(short_side_px=480)  # of their statistics, what a size by default follows from


@pytest.mark.parametrize(
    ("share", "short_side_px", "device", "side"),
    [
        (0.0822, 480, "cpu", 288),  # 24 / 0.0822 = 292, and the nearest multiple of 32
        (0.01, 2000, "cpu", 320),
        (0.01, 2000, "cuda", 512),
        (0.01, 330, "cpu", 320),  # they could be no larger
        (0.05, 250, "cuda", 224),  # the images are no larger
    ],
)
def test_size_of_images_by_the_smallest_objects(share, short_side_px, device, side, box_folder, tmp_path):
    opened = settings(box_folder, "none", tmp_path, labels=None, image_size=None)
    labels = replace(read_labels(opened), smallest=ClassSize("mite", share, short_side_px))
    resolved, [reason] = resolve_image_size(opened, labels, IMAGES, device)
    assert resolved == replace(opened, image_size=side)
    said = f"image size {side}: the usual object of mite, the smallest class, is {round(side * share)} px there"
    assert reason.startswith(said)
    assert ("(--image-size 1984)" in reason) == (short_side_px == 2000)
    for few in (ClassSize("mite", 0.1, 20), ClassSize("mite", 2.0, 480)):
        assert resolve_image_size(opened, replace(labels, smallest=few), IMAGES, device) == (opened, [])
    for given in (replace(opened, image_size=64), replace(opened, data=replace(opened.data, short_side=0))):
        assert resolve_image_size(given, labels, IMAGES, device) == (given, [])


def test_small_objects_make_images_larger_than_the_encoder_s(encoder_folder, tmp_path):
    """Where it takes them, and never smaller. The reason stands in the summary."""
    rng = np.random.default_rng(0)
    objects = [("cat", *(corner := rng.integers(0, 100, 2).tolist()), *(place + 8 for place in corner)) for _ in range(12)]
    write_coco(tmp_path / "mites", [Scene(name, (128, 160), (object,)) for name, object in zip("abcdefghijkl", objects)])
    opened = settings(tmp_path / "mites", encoder_folder, tmp_path / "run", labels=None, image_size=None)
    prepared = task_named("detection").prepare(opened, "cpu")
    assert prepared.settings.image_size == 128 and prepared.settings.data.short_side == 128
    assert prepared.reasons[0] == "image size 128: the usual object of cat, the smallest class, is 8 px there"
    trained_px = min(read_encoder(encoder_folder).preprocessing.image_size)
    assert not takes_larger_images(opened, trained_px, IMAGES, "cpu")
    assert takes_larger_images(replace(opened, init="none"), 128, IMAGES, "cpu")
    assert not takes_larger_images(replace(opened, init="none"), 96, IMAGES, "cpu")


def judge(saved, folder, images="images/val", labels="annotations/instances_val2017.json"):
    """Average precision of a detector on labeled images, computed image by image."""
    content, judged = json.loads((folder / labels).read_text()), []
    for image in content["images"]:
        pixels = open_picture({"bytes": None, "path": str(folder / images / image["file_name"])}, 1).crop(
            (0, 0, 40, 40), (saved.short_side, saved.short_side)
        )
        [found] = saved.find(pixels[None])
        found = found.at((saved.short_side, saved.short_side), (40, 40))
        given = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in given)])
        classes = np.array([one["category_id"] - 7 for one in given])
        judged.append(Judged(image["id"], boxes, classes, np.zeros(len(boxes), bool), *(part.numpy() for part in found[:3])))
    return average_precision(judged, 2)


def test_ten_images_are_learned_and_the_best_detector_is_kept(box_folder, run):
    """The table that the run wrote is what the saved model finds, image by image."""
    saved = load_detector(run)
    assert saved.classes == CLASSES and saved.short_side == 32 and saved.model.shape.num_above == 0
    scores = judge(saved, box_folder)
    with (run / "ap.csv").open(newline="") as text:
        written = [[float(row[name]) for name in ("AP", "AP50", "AP75")] for row in csv.DictReader(text)]
    assert np.array(written) == pytest.approx(scores.by_class, abs=0.002)
    assert saved.thresholds == pytest.approx(scores.thresholds, abs=1e-3)
    assert scores.overall[1] > 0.9
    with (run / "metrics.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert max(float(row["ap"]) for row in rows if row["ap"]) == pytest.approx(scores.overall[0], abs=0.002)


def test_a_run_logs_scalars_and_boxes(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert any("boxes: image, given, found" in tag for tag in tags["images"])
    expected = {"validation/ap", "validation/ap50", "validation/ap75", "ap_by_class/cat", "ap_by_size/small"}
    expected |= {"loss/detection", "loss/classes", "loss/boxes", "loss/centerness"}
    assert expected <= set(tags["scalars"])
    assert Image.open(run / "boxes.png").width > 300 and Image.open(run / "precision-recall.png").width > 300


def test_resumed_equals_uninterrupted(box_folder, encoder_folder, tmp_path, power_cut, monkeypatch):
    """Bit by bit, with accumulated parts, stochastic depth, random views and jitter."""
    monkeypatch.setattr("simmim.finetune.run.MIN_STEPS_PER_CHECKPOINT", 1)
    drop = {"encoder": EncoderSettings(drop_path_rate=0.3), "optim": OptimSettings(accumulate=2, label_smoothing=0.0)}
    whole = finetune(settings(box_folder, encoder_folder, tmp_path / "whole", **drop), quiet=True)
    with power_cut(after_step=5):
        finetune(settings(box_folder, encoder_folder, tmp_path / "cut", **drop), quiet=True)
    assert (tmp_path / "cut/checkpoints/step-00000003.ckpt").is_file()
    cut = finetune(settings(box_folder, encoder_folder, tmp_path / "cut", **drop, resume=True), quiet=True)
    first, second = (torch.load(r.run / "checkpoints/last.ckpt", weights_only=True) for r in (whole, cut))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    assert cut == replace(whole, run=cut.run)


def test_accumulated_parts_equal_one_batch(box_folder, encoder_folder, tmp_path):
    """Though the positive points differ from part to part: the gradient of a step is divided by all of them."""
    states = []
    for parts in (1, 4):
        optim = OptimSettings(accumulate=parts, label_smoothing=0.0, lr=0.5)
        run = settings(box_folder, encoder_folder, tmp_path / str(parts), optim=optim, steps=3, validations=1)
        run = replace(run, encoder=EncoderSettings(drop_path_rate=0.0))
        finetune(run, quiet=True)
        states.append(torch.load(tmp_path / str(parts) / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(*states, rtol=0, atol=2e-5)


def test_a_frozen_encoder_stays_and_a_head_of_the_same_classes_is_loaded(box_folder, run, tmp_path, capsys):
    words = f"finetune detection --init {run} --data {box_folder} --out {tmp_path / 'run'} --labels 4 --steps 2 "
    words += "--batch-size 4 --optim.lr 1e-9 --head.width 64 --head.convolutions 1 --validations 1 --workers 0 --freeze "
    assert main([*words.split(), "--data.inference", "tiles", "--data.short_side", "64"]) == 0
    assert "head of the same 2 classes loaded" in capsys.readouterr().out
    before, after = (dict(load_detector(place).model.named_parameters()) for place in (run, tmp_path / "run"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6 * (not name.startswith("encoder.")), rtol=0)
    assert main([*words.replace(str(tmp_path / "run"), str(tmp_path / "other")).split(), "--head.width", "16"]) == 0
    assert "head of 2 classes replaced by a fresh one of 2" in capsys.readouterr().out


def test_files_that_are_no_detector_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="no encoder at"):
        load_detector(tmp_path / "typo")
    shutil.copytree(run / "encoder", tmp_path / "torn")
    save_encoder(tmp_path / "plain", load_detector(run).model.encoder, load_detector(run).preprocessing, {})
    with pytest.raises(ValueError, match="an encoder but no detector: give a run of simmim finetune detection"):
        load_detector(tmp_path / "plain")
    file = tmp_path / "torn" / "detection.json"
    file.write_text(file.read_text().replace('"width": 64', '"width": 16'))
    with pytest.raises(ValueError, match=r"detection\.safetensors does not fit its description: .*of another shape"):
        load_detector(tmp_path / "torn")
    assert load_encoder(run).config.in_channels == 1


@pytest.mark.parametrize(
    "problem, message",
    [
        ("unknown class", "annotation 0: category_id 3 has no name in categories"),
        ("area", r"annotation 0: box .* \(xywh\) has no area"),
        ("no image", r"there is no image '1-00\.png'"),
        ("labels", "11 labeled scenes asked for, there are 10"),
        ("setting", "unknown setting"),
        ("width", "head.width is 17: give a positive multiple of 16"),
        ("smoothing", "optim.label_smoothing is 0.1: the focal loss of detection takes none"),
        ("scenes", "holds label maps and no boxes: use simmim finetune segmentation"),
    ],
)
def test_wrong_input_ends_in_one_line(box_folder, scene_folder, tmp_path, capsys, problem, message):
    data = shutil.copytree(box_folder, tmp_path / "data")
    labels, more = data / "annotations" / "instances_train2017.json", []
    content = json.loads(labels.read_text())
    if problem == "unknown class":
        content["annotations"][0]["category_id"] = 3
    elif problem == "area":
        content["annotations"][0]["bbox"][2] = 0
    elif problem == "no image":
        (data / "images" / "train" / "1-00.png").unlink()
    elif problem == "scenes":
        data = shutil.copytree(scene_folder, tmp_path / "scenes", ignore=shutil.ignore_patterns("annotations"))
    else:
        more = {
            "labels": ["--labels", "11"],
            "setting": ["--data.mask_column", "x"],
            "width": ["--head.width", "17"],
            "smoothing": ["--optim.label_smoothing", "0.1"],
        }[problem]
    labels.write_text(json.dumps(content))
    words = ["finetune", "detection", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", *more]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused():
    for values, message in (
        ({"scale": (0.0, 1.0)}, r"data\.scale"),
        ({"flip": 2.0}, r"data\.flip"),
        ({"inference": "slide"}, "auto, whole, tiles"),
        ({"short_side": -1}, r"data\.short_side"),
        ({"exif": "turned"}, "auto, upright, stored"),
        ({"box_format": "xyhw"}, "did you mean 'x"),
        ({"color_jitter": 1.0}, "color_jitter"),
    ):
        with pytest.raises(ValueError, match=message):
            BoxSettings("x", **values)
    with pytest.raises(ValueError, match=r"head\.convolutions is 0: give 1 or more"):
        HeadSettings(convolutions=0)


def ap_of_results(box_folder, out):
    """Average precision of what predict wrote of the validation images, by pycocotools from the files alone."""
    labels = json.loads((box_folder / "annotations" / "instances_val2017.json").read_text())
    described = json.loads((out / "images.json").read_text())
    ids = {one["file_name"].rpartition("/")[2]: one["id"] for one in described["images"]}
    new_ids = {image["id"]: ids[image["file_name"]] for image in labels["images"]}
    for one in labels["annotations"]:
        one["id"] += 1  # pycocotools takes an annotation of id 0 for none
        one["image_id"], one["category_id"] = new_ids[one["image_id"]], one["category_id"] - 6
    described["annotations"] = labels["annotations"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **described}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(str(out / "results.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[0]


def best_ap(run):
    """As the run's best validation found it."""
    return json.loads((run / "encoder" / "config.json").read_text())["provenance"]["ap"]


@pytest.mark.parametrize("side, short_side", [(40, 32), (80, 0)], ids=["whole", "by tiles"])
def test_deep_images_are_read_by_predict_as_in_validation(run, tmp_path, side, short_side):
    """16 bits, by one range for the collection: an image that is stretched by its own values shows one class as the other.
    Images of 80 px at their own scale are more than four crops of 32, and searched by tiles. The weights are those of the
    run on 8 bits, which one step without a learning rate leaves as they are."""
    folder, start, tuned, out = (tmp_path / name for name in ("boxes", "start", "tuned", "out"))
    for part in ("train", "val"):
        write_coco(folder, scenes_of(10, 1, side), f"images/{part}", f"annotations/instances_{part}2017.json")
    for file in folder.glob("images/*/*.png"):
        Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16) * 13).save(file)
    saved = load_detector(run)
    reading = Reading(((0, 255 * 13),), pages=None)
    save_detector(start, replace(saved, preprocessing=replace(saved.preprocessing, reading=reading)), {"toolkit": "simmim"})
    words = f"finetune detection --init {start} --data {folder} --out {tuned} --steps 1 --batch-size 1 --workers 0 "
    words += "--optim.lr 1e-12 --optim.warmup-lr 1e-12 --optim.min-lr 1e-12 --head.width 64 --head.convolutions 1 "
    words += f"--data.short-side {short_side} --precision 32-true"
    assert main(words.split()) == 0
    assert load_detector(tuned).preprocessing.reading == reading
    if side == 40:
        assert best_ap(tuned) == pytest.approx(best_ap(run), abs=0.002), "the same shares as of 8 bits"
    assert best_ap(tuned) > 0.1
    assert main(["predict", "--run", str(tuned), "--images", str(folder / "images" / "val"), "--out", str(out)]) == 0
    assert ap_of_results(folder, out) == pytest.approx(best_ap(tuned), abs=0.002)


def test_what_predict_writes_scores_as_validation_did(box_folder, run, tmp_path, capsys):
    """As COCO results, judged by pycocotools from the files alone; the table of trusted boxes can be read as labels."""
    images, out = box_folder / "images" / "val", tmp_path / "out"
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "torn.png").write_bytes(next(images.iterdir()).read_bytes()[:60])
    assert main(["predict", "--run", str(run), "--images", str(tmp_path / "images"), "--out", str(out)]) == 0
    assert "10 images, " in (output := capsys.readouterr().out) and " boxes, 1 unreadable" in output
    assert ap_of_results(box_folder, out) == pytest.approx(best_ap(run), abs=0.002)
    trusted = read_boxed_scenes(str(out / "boxes.csv"), None, 0)
    assert len(trusted.train) + len(trusted.validation) == 10 and trusted.classes == CLASSES
    assert {Image.open(path).size for path in (out / "overlays").iterdir()} == {(40, 40)}
    assert main(["predict", "--run", str(run), "--images", str(images), "--out", str(out)]) == 2
    words = ["predict", "--run", str(run), "--images", str(images), "--out", str(tmp_path / "bare"), "--overlays", "false"]
    assert main(words) == 0 and not (tmp_path / "bare" / "overlays").exists()


def test_an_exported_detector_finds_the_same(box_folder, run, tmp_path, capsys):
    """As this toolkit's files, and as ONNX by the code of its card, suppression and thresholds included."""
    for format in ("safetensors", "onnx"):
        words = ["export", "--run", str(run), "--format", format, "--form", "detector", "--out", str(tmp_path / format)]
        assert main([*words, "--license", "CC0-1.0"]) == 0
        card = (tmp_path / format / "README.md").read_text()
        assert "pipeline_tag: object-detection" in card and "license: CC0-1.0" in card and "- ap: 0." in card
    saved, own = load_detector(run), load_detector(tmp_path / "safetensors")
    file = str(box_folder / "images" / "val" / "1-01.png")
    images = open_picture({"bytes": None, "path": file}, 1).crop((0, 0, 40, 40), (32, 32))[None]
    [expected], [found] = saved.find(images), own.find(images)
    assert all(torch.equal(one, other) for one, other in zip(expected[:3], found[:3]))
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "encoder")]) == 0
    assert (
        "the detection head is left out: simmim predict reads it from the run, and --form detector"
        in capsys.readouterr().out
    )
    code = re.search(r"```python\n(.*?)```", (tmp_path / "onnx" / "README.md").read_text(), re.S)[1]
    normalized = normalize(images, saved.preprocessing.mean, saved.preprocessing.std).numpy()
    place = {"given": normalized}
    exec(re.sub(r"numpy\.zeros\([^#]*", "given  ", code.replace("FOLDER", str(tmp_path / "onnx"))), place)
    trusted_boxes = trusted(expected, saved.thresholds)
    assert len(trusted_boxes.boxes) >= 1  # of two objects; how sure the model is of the other one hangs on last digits
    for number, name in enumerate(CLASSES):
        chosen = trusted_boxes.classes == number
        assert [score for _, score in place["found"][name]] == pytest.approx(trusted_boxes.scores[chosen].tolist(), abs=1e-3)
        for (box, _), wanted in zip(place["found"][name], trusted_boxes.boxes[chosen].tolist()):
            assert box.clip(0, 32).tolist() == pytest.approx(wanted, abs=0.05)
    described = json.loads((tmp_path / "onnx" / "detection.json").read_text())
    assert described["classes"] == list(CLASSES) and described["image_size"] == [32, 32]
    assert main(["export", "--run", str(run), "--format", "timm", "--form", "detector", "--out", str(tmp_path / "x")]) == 2
    assert "a detector cannot be exported as 'timm'" in capsys.readouterr().err
