"""Segmentation runs by the command, on digits on photographs: what they write, and what they refuse."""

import csv
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from simmim import load_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.cli import main
from simmim.data import open_picture
from simmim.data.label_map_files import read_label_map
from simmim.data.tiff_windows import pixel_size_of
from simmim.encoders.swinv2 import SwinV2
from simmim.finetune import SegmentationSettings, finetune, load_segmenter
from simmim.finetune.segmentation.defaults import resolve_settings
from simmim.finetune.segmentation.preparation import read_labels
from simmim.finetune.segmentation.settings import HeadSettings, SceneSettings
from simmim.finetune.segmentation.sliding import most_likely_class
from simmim.finetune.segmentation.tiled_prediction import piece_places, segment_tiles
from simmim.finetune.settings import EncoderSettings, OptimSettings
from simmim.reading import TileSettings


def settings(scene_folder, encoder_folder, out, **changes):
    values = {
        "data": SceneSettings(str(scene_folder)),
        "out": str(out),
        "init": str(encoder_folder),
        "labels": 12,
        "steps": 12,
        "batch_size": 6,
        "validations": 3,
        "head": HeadSettings(width=16),
        **changes,
    }
    return SegmentationSettings(**values)


@pytest.fixture(scope="module")
def run(scene_folder, encoder_folder, tmp_path_factory):
    """One run of the command."""
    out = tmp_path_factory.mktemp("segmentation") / "run"
    words = f"finetune segmentation --init {encoder_folder} --data {scene_folder} --out {out} --labels 12 --steps 40 "
    words += "--batch-size 6 --validations 4 --head.width 16 --optim.lr 0.2 --workers 0"
    assert main(words.split()) == 0
    return out


def test_a_step_has_the_published_number_of_images(scene_folder, tmp_path):
    opened = settings(scene_folder, "none", tmp_path, labels=None, steps=None, batch_size=None, image_size=32)
    scenes = read_labels(opened)
    resolved, reasons = resolve_settings(opened, scenes, small=True, device="cpu")
    assert resolved.batch_size == 16 < len(scenes.train)
    assert "batch size 16: as published" in reasons


def test_the_best_segmenter_is_kept(scene_folder, run):
    """Its IoU on the validation images, counted pixel by pixel, is what the run wrote."""
    saved = load_segmenter(run)
    assert saved.scheme.classes == ("background", "zero", "one") and saved.short_side == 32
    intersection, union = np.zeros(3), np.zeros(3)
    for file in sorted((scene_folder / "val" / "images").iterdir()):
        pixels = open_picture({"bytes": None, "path": str(file)}, 1).crop((0, 0, 40, 40), (32, 32))
        predicted = most_likely_class(saved.logits(pixels[None]), (40, 40))[0].numpy()
        labels = read_label_map({"bytes": None, "path": str(scene_folder / "val" / "masks" / file.name)})
        for number in range(3):
            intersection[number] += ((labels == number) & (predicted == number)).sum()
            union[number] += ((labels == number) | (predicted == number)).sum()
    with (run / "iou.csv").open(newline="") as text:
        written = [float(row["IoU"] or 0) for row in csv.DictReader(text)]
    assert written == pytest.approx((intersection / np.maximum(union, 1)).tolist(), abs=1e-4)
    with (run / "metrics.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert max(float(row["mean_iou"]) for row in rows if row["mean_iou"]) <= np.mean(intersection / union) + 1e-6
    assert written[0] > 0.5, "the background is learned"


def test_a_run_logs_scalars_and_label_maps(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert any("masks: image, labels, prediction" in tag for tag in tags["images"])
    expected = {"validation/mean_iou", "validation/pixel_accuracy", "iou/zero", "validation/cross_entropy"}
    assert expected <= set(tags["scalars"])
    assert Image.open(run / "masks.png").width > 300


def test_predict_writes_label_maps(scene_folder, run, tmp_path, capsys):
    images = scene_folder / "val" / "images"
    assert main(["predict", "--run", str(run), "--images", str(images), "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "10 images segmented, 0 unreadable" in output and "background" in output
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {path.name for path in images.iterdir()}
    assert {Image.open(path).size for path in (tmp_path / "out" / "masks").iterdir()} == {(40, 40)}
    assert main(["predict", "--run", str(run), "--images", str(images), "--out", str(tmp_path / "out")]) == 2
    assert (
        main(["predict", "--run", str(run), "--images", str(images), "--out", str(tmp_path / "bare"), "--overlays", "false"])
        == 0
    )
    assert not (tmp_path / "bare" / "overlays").exists()


def test_resumed_equals_uninterrupted(scene_folder, encoder_folder, tmp_path, power_cut, monkeypatch):
    """Bit by bit, with dropout, stochastic depth, random views and jitter."""
    monkeypatch.setattr("simmim.finetune.run.MIN_STEPS_PER_CHECKPOINT", 1)
    drop = {"encoder": EncoderSettings(drop_path_rate=0.3)}
    whole = finetune(settings(scene_folder, encoder_folder, tmp_path / "whole", **drop), quiet=True)
    with power_cut(after_step=10):
        finetune(settings(scene_folder, encoder_folder, tmp_path / "cut", **drop), quiet=True)
    assert (tmp_path / "cut/checkpoints/step-00000008.ckpt").is_file()
    cut = finetune(settings(scene_folder, encoder_folder, tmp_path / "cut", **drop, resume=True), quiet=True)
    first, second = (torch.load(r.run / "checkpoints/last.ckpt", weights_only=True) for r in (whole, cut))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    assert cut == replace(whole, run=cut.run)


def test_a_frozen_encoder_stays_and_the_heads_learn(scene_folder, encoder_folder, tmp_path):
    result = finetune(
        settings(scene_folder, encoder_folder, tmp_path / "run", freeze=True, class_weights="balanced"), quiet=True
    )
    state = torch.load(result.run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in load_encoder(encoder_folder).state_dict().items():
        assert torch.equal(state[f"model.encoder.{name}"], value), name
    assert state["model.head.classify.bias"].abs().max() > 0
    assert state["model.norms.0.bias"].abs().max() > 0
    assert result.score == result.metrics["mean_iou"] <= result.best
    with pytest.raises(AttributeError, match="this task has no accuracy: take score, its mean_iou"):
        _ = result.accuracy


def test_norms_follow_from_the_images_of_a_forward_pass(scene_folder, encoder_folder, run, tmp_path):
    assert load_segmenter(run).model.shape.norm == "batch"  # 6 images
    small = settings(
        scene_folder, encoder_folder, tmp_path / "run", batch_size=6, optim=OptimSettings(accumulate=3), steps=2
    )
    assert load_segmenter(finetune(small, quiet=True).run).model.shape.norm == "image"
    alone = settings(
        scene_folder, encoder_folder, tmp_path / "alone", batch_size=1, head=HeadSettings(width=16, norm="batch")
    )
    with pytest.raises(ValueError, match=r"head\.norm is batch, with 1 image per device"):
        finetune(alone, quiet=True)
    assert not (tmp_path / "alone").exists()


def test_images_of_other_sizes_and_a_head_of_the_same_classes(scene_folder, run, tmp_path, capsys):
    """Validation images one by one in windows; the head of a run for the same classes are loaded."""
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for number, file in enumerate(sorted((scene_folder / part / kind).iterdir())):
                image = Image.open(file).resize((40 + 8 * (number % 4), 60), Image.Resampling.NEAREST)
                image.save(tmp_path / "data" / part / kind / file.name)
    (tmp_path / "data" / "classes.txt").write_text("background\nzero\none\n")
    words = f"finetune segmentation --init {run} --data {tmp_path / 'data'} --out {tmp_path / 'run'} --steps 4 "
    words += "--batch-size 4 --optim.lr 1e-9 --head.width 16 --data.short_side 0 --data.inference slide --validations 1"
    assert main(words.split()) == 0
    output = capsys.readouterr().out
    assert "head of the same 3 classes loaded" in output
    before, after = (dict(load_segmenter(place).model.named_parameters()) for place in (run, tmp_path / "run"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)
    assert re.search(r"mean_iou [\d.]+% at the end", output)
    assert main([*words.replace(str(tmp_path / "run"), str(tmp_path / "other")).split(), "--head.width", "32"]) == 0
    assert "head of 3 classes replaced by a fresh one of 3" in capsys.readouterr().out


def test_gray_scenes_take_a_color_encoder(scene_folder, encoder_folder, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = SwinV2(replace(load_encoder(encoder_folder).config, in_channels=3))
    save_encoder(tmp_path / "encoder", encoder, Preprocessing((32, 32), (0.4,) * 3, (0.2,) * 3), {})
    words = f"finetune segmentation --init {tmp_path / 'encoder'} --data {scene_folder} --out {tmp_path / 'run'} --steps 2 "
    words += "--batch-size 4 --head.width 16 --validations 1"
    assert main(words.split()) == 0
    assert load_segmenter(tmp_path / "run").model.encoder.config.in_channels == 3


def test_an_encoder_of_many_channels_is_adapted_and_the_run_reports_it(scene_folder, encoder_folder, tmp_path, capsys):
    encoder = SwinV2(replace(load_encoder(encoder_folder).config, in_channels=5))
    save_encoder(tmp_path / "encoder", encoder, Preprocessing((32, 32), (0.4,) * 5, (0.2,) * 5), {})
    words = f"finetune segmentation --init {tmp_path / 'encoder'} --data {scene_folder} --out {tmp_path / 'run'} --steps 2 "
    words += "--batch-size 4 --head.width 16 --validations 1"
    assert main(words.split()) == 0
    assert "5 input channels to 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "problem, message",
    [
        ("unknown value", r"label map .*00003\.png holds the value 9, expected 0 to 2"),
        ("size", r"label map .*00003\.png is 40x41 pixels and its image .*00003\.png 40x40 \(height x width\)"),
        ("no label map", r"image .*00003\.png has no label map"),
        ("classes", r"holds the value 2, expected 0 to 1"),
        ("empty", "images' is empty"),
        ("labels", "31 labeled scenes asked for, there are 30"),
        ("stage", "unknown setting"),
        ("width", "head.width is 17: give a positive multiple of 16"),
    ],
)
def test_wrong_input_ends_in_one_line(scene_folder, tmp_path, capsys, problem, message):
    data = shutil.copytree(scene_folder, tmp_path / "data")
    label_map, more = data / "train" / "masks" / "00003.png", []
    if problem == "unknown value":
        values = np.array(Image.open(label_map))
        values[0, 0] = 9
        Image.fromarray(values).save(label_map)
    elif problem == "size":
        Image.new("L", (41, 40)).save(label_map)
    elif problem == "no label map":
        label_map.unlink()
    elif problem == "classes":
        (data / "classes.txt").write_text("background\nzero\n")
    elif problem == "empty":
        for file in (data / "train" / "images").iterdir():
            file.unlink()
    else:
        more = {"labels": ["--labels", "31"], "stage": ["--lables", "3"], "width": ["--head.width", "17"]}[problem]
    words = ["finetune", "segmentation", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", *more]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused():
    for values, message in (
        ({"scale": (0.0, 1.0)}, "data.scale"),
        ({"flip": 2.0}, "data.flip"),
        ({"inference": "windows"}, "whole, slide"),
        ({"short_side": -1}, "data.short_side"),
        ({"crop_class_share": 0.0}, "crop_class_share"),
        ({"color_jitter": 1.0}, "color_jitter"),
    ):
        with pytest.raises(ValueError, match=message):
            SceneSettings("x", **values)
    with pytest.raises(ValueError, match="none or balanced"):
        SegmentationSettings(data="x", out="y", class_weights="some")
    assert SegmentationSettings(data="x", out="y").optim == OptimSettings(label_smoothing=0.0)


def test_a_run_is_not_resumed_with_other_scenes(scene_folder, encoder_folder, tmp_path):
    """A study may grow by labels; a run keeps those that it started with."""
    finetune(settings(scene_folder, encoder_folder, tmp_path / "run", steps=1), quiet=True)
    with pytest.raises(ValueError, match=r"was started with other settings: .*labels was 12, is 13"):
        finetune(settings(scene_folder, encoder_folder, tmp_path / "run", steps=1, labels=13, resume=True), quiet=True)


def test_label_maps_tile_by_tile(scene_folder, run, tmp_path, capsys):
    """Each pixel is of the tile around it, predicted as an image of its own; the file has tiles, colors and georeference."""
    photograph = np.array(Image.open(next((scene_folder / "val" / "images").iterdir())).convert("L"))
    large = np.tile(photograph, (4, 5))[:150, :170]
    geo = [(33550, "d", 3, (10.0, 20.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 5e5, 4e6, 0.0), True)]
    tifffile.imwrite(tmp_path / "map.tif", large, tile=(16, 16), extratags=geo, metadata=None)
    words = ["predict", "--run", str(run), "--images", str(tmp_path / "map.tif"), "--out", str(tmp_path / "out")]
    assert main([*words, "--tile", "40", "--overlap", "0.2", "--batch-size", "7"]) == 0
    assert "1 image segmented, 0 unreadable" in capsys.readouterr().out
    saved = load_segmenter(run)
    with tifffile.TiffFile(tmp_path / "out" / "masks" / "map.tif") as file:
        page = file.pages.first
        written = page.asarray()
        assert page.is_tiled and page.tilewidth == 32 and page.photometric.name == "PALETTE"
        assert (page.tags[33550].value, page.tags[33922].value) == (geo[0][3], geo[1][3])
    assert written.shape == (150, 170) and (tmp_path / "out" / "classes.txt").read_text().split() == list(
        saved.scheme.classes
    )
    # A piece inside lies in the middle of its tile; one at the edge has its tile pushed inside.
    for (top, left), (first_row, first_column) in {(32, 64): (28, 60), (0, 0): (0, 0), (128, 160): (110, 130)}.items():
        part = Image.fromarray(large[first_row : first_row + 40, first_column : first_column + 40])
        part.save(tmp_path / "part.png")
        pixels = open_picture({"bytes": None, "path": str(tmp_path / "part.png")}, 1).crop((0, 0, 40, 40), (32, 32))
        classes = most_likely_class(saved.logits(pixels[None]), (40, 40))[0].numpy()
        expected = np.array(saved.scheme.values)[classes][top - first_row :, left - first_column :][:32, :32]
        np.testing.assert_array_equal(written[top : top + 32, left : left + 32], expected[: 150 - top, : 170 - left])


def test_label_maps_of_a_level(run, tmp_path):
    """Of its size, with its size of a pixel; an image that breaks is named, and leaves nothing behind."""
    images = tmp_path / "images"
    images.mkdir()
    with tifffile.TiffWriter(images / "a.tif") as file:
        values = np.random.default_rng(0).integers(0, 256, (128, 192), dtype=np.uint8)
        file.write(values, subifds=1, tile=(16, 16), resolution=(20000, 20000), resolutionunit="CENTIMETER", metadata=None)
        file.write(values[::2, ::2], subfiletype=1, tile=(16, 16), metadata=None)
    broken = images / "b.tif"
    tifffile.imwrite(broken, values, tile=(16, 16), compression="zlib", metadata=None)
    with tifffile.TiffFile(broken) as file:
        place = file.pages.first.dataoffsets[-1]
    broken.write_bytes(broken.read_bytes()[: place + 9])
    tiles = TileSettings(32, pixel_size=1.0)
    with pytest.raises(ValueError, match=r"1 of 2 images have no such tiles; the first, .*b\.tif: data\.pixel_size"):
        segment_tiles(run, images, tmp_path / "out", tiles, 0.25)
    result = segment_tiles(run, f"{images}/a*.tif", tmp_path / "out", tiles, 0.25)
    assert (result.count, sum(result.pixels.values())) == (1, 64 * 96)
    with tifffile.TiffFile(tmp_path / "out" / "masks" / "a.tif") as file:
        assert file.pages.first.shape == (64, 96) and pixel_size_of(file) == pytest.approx(1.0)
    result = segment_tiles(run, images, tmp_path / "both", TileSettings(32), 0.25)
    assert result.count == 1 and "cut short" in result.unreadable[str(broken)]
    assert sorted(path.name for path in (tmp_path / "both" / "masks").iterdir()) == ["a.tif"]


def test_tiles_too_small_for_a_file_are_refused(run, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8), tile=(16, 16))
    words = ["predict", "--run", str(run), "--images", str(tmp_path / "a.tif"), "--out", str(tmp_path / "out")]
    for more, expected in ((["--tile", "8"], "a tile is 8 px: give 16 or more"), (["--overlap", "1"], "overlap is 1: give")):
        assert main([*words, "--tile", "32", *more]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert expected in error[-1]


def test_pieces_lie_in_the_middle_of_their_tiles():
    """But at the image's edges, where the tile is pushed inside; together they are the whole label map."""
    pieces = {
        (piece.top + piece.inside[0], piece.left + piece.inside[1]): piece for piece in piece_places((150, 170), 40, 32)
    }
    assert pieces[32, 64] == (28, 60, (4, 4), (32, 32)) and pieces[0, 0] == (0, 0, (0, 0), (32, 32))
    assert pieces[128, 160] == (110, 130, (18, 30), (22, 10))
    assert len(pieces) == 5 * 6 and sum(piece.size[0] * piece.size[1] for piece in pieces.values()) == 150 * 170
