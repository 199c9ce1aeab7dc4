"""Images that are kept decoded on disk: the same samples with and without entries, whatever happens to these."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from image_files import jpeg_bytes, notices, oriented, photo
from PIL import Image

from simmim.cli import main
from simmim.cli.check_report import as_json, render
from simmim.data import ImageSamples, RandomView, build_loader, dataset_from_paths, kept_pictures, open_images, open_picture
from simmim.data.check import check_images
from simmim.data.image_statistics import ImageStatistics
from simmim.data.kept_pictures import KeptPictures, is_worth_keeping, read_entry, stamp_of, way_to_keep
from simmim.data.shrinking import kept_size, needed_scale
from simmim.pretrain.keeping import parse_budget
from simmim.pretrain.model import read_settings
from simmim.pretrain.preparation import resolve_run
from simmim.pretrain.settings import DataSettings, PretrainSettings
from simmim.reading import AUTO, Reading, TileSettings

VIEW = RandomView((32, 32))
TOY = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'


def record_of(path):
    return {"bytes": None, "path": str(path)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six photographs of 300 × 400 px, JPEG but for one."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg_bytes(photo(300, 400, seed=number)))
    Image.fromarray(photo(300, 400, seed=9)).save(folder / "9.png")
    return folder


def samples_of(folder, kept, views=(VIEW,), **options):
    paths = sorted(str(path) for path in folder.iterdir() if path.is_file())
    return ImageSamples(dataset_from_paths(paths), views[0], 3, seed=1, kept=kept, further=views[1:], **options)


def kept_in(folder, budget=10**9, views=(VIEW,), how=(3,)):
    return KeptPictures(views, how, budget, folder)


def entries(folder):
    return sorted(folder.rglob("*.kept"))


# --- what is kept ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("target", [(32, 32), (24, 48)])
@pytest.mark.parametrize("is_jpeg", [False, True])
def test_no_crop_is_enlarged_and_the_smallest_is_hardly_shrunk(turns, target, is_jpeg):
    """Over draws from images of many proportions: a fourth more than the smallest needs, of a JPEG within steps of two."""
    view = RandomView(target, turns=turns)
    for size in ((300, 400), (900, 200), (130, 1000), (257, 259)):
        kept = kept_size([view], size, is_jpeg)
        generator, least = random.Random(0), np.inf
        for _ in range(3000):
            left, top, right, bottom = view.crop_box(size, generator)
            for tall, wide in {target, target[::-1]} if turns else {target}:
                down, across = size[0] / kept[0], size[1] / kept[1]
                least = min(least, (bottom - top) / down / tall, (right - left) / across / wide)
        assert 1.23 <= least < (2.75 if is_jpeg else 1.45), size


def test_an_image_with_little_more_than_crops_need_is_not_kept():
    assert kept_size([VIEW], (70, 70), False) is None
    assert needed_scale([VIEW], (20, 20)) == 1


def test_further_views_decide_too():
    large = RandomView((96, 96))
    assert kept_size([VIEW, large], (800, 800), False) == kept_size([large], (800, 800), False)


def as_file(tmp_path, kind):
    pixels = photo(300, 400)
    if kind == "jpeg":
        (tmp_path / "a.jpg").write_bytes(jpeg_bytes(pixels))
        return tmp_path / "a.jpg", 3, AUTO
    if kind == "turned":
        oriented(pixels, 6, format="JPEG", quality=90)(tmp_path / "a.jpg")
        return tmp_path / "a.jpg", 3, AUTO
    if kind in ("png", "gray"):
        Image.fromarray(pixels if kind == "png" else pixels[..., 0]).save(tmp_path / "a.png")
        return tmp_path / "a.png", 3 if kind == "png" else 1, AUTO
    if kind == "channels":
        tifffile.imwrite(tmp_path / "a.tif", np.stack([*np.moveaxis(pixels, -1, 0)] * 2)[:5], planarconfig="separate")
        return tmp_path / "a.tif", 5, Reading("image", pages="channels")
    values = pixels[..., :2].astype(np.uint16) * 200
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(values, -1, 0), photometric="minisblack")
    return tmp_path / "a.tif", 2, Reading([[0, 51000], [0, 51000]], pages="channels")


@pytest.mark.parametrize("kind", ["jpeg", "turned", "png", "gray", "channels", "deep"])
def test_crops_are_those_of_the_file(tmp_path, kind):
    """Within 1.5 levels in the mean; cold and warm bit for bit the same. Boxes are drawn in the image's own pixels."""
    path, channels, reading = as_file(tmp_path, kind)
    how = (record_of(path), channels, 10**9, reading)
    kept = kept_in(tmp_path / "kept", how=(kind,))
    apart = []
    for seed in range(12):
        views = [
            VIEW(open_picture(*how), random.Random(seed)),
            VIEW(kept_in(tmp_path / "none", 0).open(how[0], lambda: open_picture(*how)), random.Random(seed)),
            VIEW(kept.open(how[0], lambda: open_picture(*how)), random.Random(seed)),
            VIEW(kept.open(how[0], lambda: pytest.fail("the entry is there")), random.Random(seed)),
        ]
        assert torch.equal(views[1], views[2]) and torch.equal(views[2], views[3])
        assert views[0].shape == views[3].shape and views[0].dtype == views[3].dtype
        scale = 255 if views[0].is_floating_point() else 1
        apart.append(float((views[0].float() - views[3].float()).abs().mean()) * scale)
    assert np.mean(apart) < 1.5
    assert kind not in ("jpeg", "turned") or np.mean(apart) < 0.2
    assert len(entries(tmp_path / "kept")) == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["jpeg", "turned", "png", "gray", "channels"])
def test_whole_images_have_the_pixels_of_the_file(tmp_path, kind):
    """Images of which crops need nearly all: bit for bit the crops of the decoded file, cold and warm."""
    path, channels, reading = as_file(tmp_path, kind)
    how, view = (record_of(path), channels, 10**9, reading), RandomView((150, 150))
    kept_in(tmp_path / "kept", views=(view,)).open(how[0], lambda: open_picture(*how))
    assert not entries(tmp_path / "kept"), "not without being asked for"
    kept = KeptPictures([view], (kind,), 10**9, tmp_path / "kept", whole=True)
    assert kept.folder != kept_in(tmp_path / "kept", views=(view,), how=(kind,)).folder
    for seed in range(8):
        expected = view(open_picture(*how).decoded(), random.Random(seed))
        cold_or_warm = view(kept.open(how[0], lambda: open_picture(*how)), random.Random(seed))
        warm = view(kept.open(how[0], lambda: pytest.fail("the entry is there")), random.Random(seed))
        if kind == "turned":  # a filter that looks over a turned crop's edges sums in another order
            assert (expected.int() - warm.int()).abs().max() <= 1
        else:
            assert torch.equal(expected, warm)
        assert torch.equal(cold_or_warm, warm)
    [entry] = entries(tmp_path / "kept")
    assert read_entry(str(entry), stamp_of(record_of(path))).values.shape == (
        channels,
        *((400, 300) if kind == "turned" else (300, 400)),
    )


def test_pixels_without_data_stay_so(tmp_path):
    values = np.full((1, 200, 200), np.nan, np.float32)
    values[:, 100:] = 0.5
    np.save(tmp_path / "a.npy", values)
    how = (record_of(tmp_path / "a.npy"), 1, 10**9, Reading([[0, 1]]))
    view = RandomView((20, 20), (1, 1), (1, 1), flip=0)
    kept = kept_in(tmp_path / "kept", views=[view])
    for _ in range(2):
        crop = view(kept.open(how[0], lambda: open_picture(*how)), random.Random(0))
        assert crop[:, :9].isnan().all() and (crop[:, 11:] == 0.5).all()


# --- whatever happens to entries -------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_entries(photos, tmp_path):
    """Cold, warm, half warm, and without a budget."""
    expected = [samples_of(photos, kept_in(tmp_path, 0))[0, index]["image"] for index in range(6)]
    assert not entries(tmp_path)
    for _ in range(2):
        samples = samples_of(photos, kept_in(tmp_path))
        assert all(torch.equal(samples[0, index]["image"], image) for index, image in enumerate(expected))
        for entry in entries(tmp_path)[::2]:
            entry.unlink()
    assert len(entries(tmp_path)) == 3


def test_a_file_that_changed_is_read_anew(tmp_path):
    """And its entry replaced, not left beside the new one; a file that is gone is unreadable, though its entry is there."""
    path, kept = tmp_path / "a.jpg", kept_in(tmp_path / "kept")
    for seed in (0, 1):
        path.write_bytes(jpeg_bytes(photo(300, 400, seed=seed)))
        picture = kept.open(record_of(path), lambda: open_picture(record_of(path), 3))
        expected = open_picture(record_of(path), 3).crop((0, 0, 400, 300), (32, 32))
        assert (picture.crop((0, 0, 400, 300), (32, 32)).float() - expected.float()).abs().mean() < 1.5
    assert len(entries(tmp_path / "kept")) == 1
    path.unlink()
    with pytest.raises(OSError):
        kept.open(record_of(path), lambda: pytest.fail("not opened"))


def test_images_of_one_name_have_an_entry_each(tmp_path):
    """As of Parquet that was made of a folder for each class."""
    records = [{"bytes": jpeg_bytes(photo(300, 400, seed=seed)), "path": "0001.jpg"} for seed in range(2)]
    kept, decoded = kept_in(tmp_path / "kept"), []
    for _ in range(2):
        for number, record in enumerate(records):
            kept.open(record, lambda record=record, number=number: decoded.append(number) or open_picture(record, 3))
    assert decoded == [0, 1] and len(entries(tmp_path / "kept")) == 2


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "other"])
def test_a_torn_entry_is_written_again(photos, tmp_path, harm):
    samples = samples_of(photos, kept_in(tmp_path))
    whole = samples[0, 0]["image"]
    [entry] = entries(tmp_path)
    data = entry.read_bytes()
    flipped = data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
    entry.write_bytes({"cut": data[:-100], "flipped": flipped, "empty": b"", "other": b"simmimK1 something"}[harm])
    stamp = stamp_of(samples.source[0]["image"])
    assert read_entry(entry, stamp) is None
    assert torch.equal(samples[0, 0]["image"], whole)
    assert entry.read_bytes() == data


def test_what_a_killed_process_left_is_no_entry(photos, tmp_path):
    """An old part of a file is removed when the next run counts; one that may be in use stays."""
    kept = kept_in(tmp_path)
    samples_of(photos, kept)[0, 0]
    [entry] = entries(tmp_path)
    old, new = entry.parent / f".{entry.name}.1.1", entry.parent / f".{entry.name}.2.2"
    for part in (old, new):
        part.write_bytes(entry.read_bytes()[:1000])
    os.utime(old, (0, 0))
    kept.make_room(0)
    assert not old.exists() and new.exists() and entries(tmp_path) == [entry]


def test_a_full_disk_is_told_once_and_changes_nothing(photos, tmp_path, monkeypatch):
    expected = samples_of(photos, kept_in(tmp_path / "a"))[0, 0]["image"]

    def full(handle, parts):
        os.write(handle, parts[1][:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept_pictures, "write_all", full)
    samples = samples_of(photos, kept_in(tmp_path / "b"))
    (first, second), told = notices(lambda: (samples[0, 0]["image"], samples[0, 1]["image"]))
    assert torch.equal(first, expected) and second.shape == expected.shape
    assert len(told) == 1 and "no longer kept shrunk" in told[0] and "No space left" in told[0]
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file() and ".kept" in path.name]


def test_a_write_that_the_system_cuts_short_goes_on(monkeypatch, tmp_path):
    whole, writev = os.urandom(1000), os.writev
    monkeypatch.setattr(kept_pictures.os, "writev", lambda handle, parts: writev(handle, [memoryview(parts[0])[:70]]))
    kept_pictures.write_entry(str(tmp_path / "sub" / "a.kept"), (whole[:300], memoryview(whole[300:])))
    assert (tmp_path / "sub" / "a.kept").read_bytes() == whole


def test_a_process_that_is_killed_while_it_writes(photos, tmp_path):
    """What it wrote is no entry, others that map it meanwhile are not disturbed, and the next run replaces it."""
    script = (
        "import os, sys; from simmim.data import kept_pictures as k; sys.path.insert(0, sys.argv[3]);"
        "k.write_all = lambda handle, parts: os.kill(os.getpid(), 9 if os.write(handle, parts[1][:2000]) else 0);"
        "from test_kept_pictures import *; from pathlib import Path;"
        "samples_of(Path(sys.argv[1]), kept_in(Path(sys.argv[2])))[0, 0]"
    )
    words = (sys.executable, "-c", script, str(photos), str(tmp_path / "kept"), str(Path(__file__).parent))
    assert subprocess.run(words).returncode == -signal.SIGKILL
    [torn] = entries(tmp_path / "kept")
    samples = samples_of(photos, kept_in(tmp_path / "kept"))
    before = torn.open("rb")
    assert torch.equal(samples[0, 0]["image"], samples_of(photos, kept_in(tmp_path, 0))[0, 0]["image"])
    assert os.stat(torn).st_size > 2 * os.fstat(before.fileno()).st_size, "in a file of its own, as this one may be mapped"
    assert read_entry(str(torn), stamp_of(samples.source[0]["image"])) is not None and len(list(torn.parent.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    kept = kept_in(tmp_path / "file")
    _, told = notices(kept.make_room, 0)
    assert len(told) == 1 and "images are not kept shrunk" in told[0] and not kept.may_write


def test_the_budget_is_kept(photos, tmp_path):
    """Of all collections together, by several processes; the collection that was not used for longest gives way."""
    one = len(entry_bytes(photos, tmp_path / "one"))
    root = tmp_path / "kept"
    for how in ("old", "new"):
        kept = kept_in(root, 10 * one, how=(how,))
        kept.make_room(5 * one)
        [samples_of(photos, kept)[0, index] for index in range(5)]
        time.sleep(0.02)
    assert len(entries(root)) == 10
    os.utime(kept_in(root, how=("old",)).folder / "used", (1, 1))
    third = kept_in(root, 10 * one, how=("third",))
    assert third.make_room(3 * one) == 0
    assert len(entries(kept_in(root, how=("old",)).folder)) == 0 and len(entries(kept_in(root, how=("new",)).folder)) == 5
    others = [kept_in(root, 10 * one, how=("third",)) for _ in range(3)]
    for kept in others:
        [samples_of(photos, kept)[0, index] for index in range(6)]
    assert sum(path.stat().st_size for path in entries(root)) <= 10 * one


def entry_bytes(photos, folder):
    samples_of(photos, kept_in(folder))[0, 0]
    return entries(folder)[0].read_bytes()


def test_two_runs_at_once(photos, tmp_path):
    """Both write and read the same entries all the time."""
    expected = [samples_of(photos, kept_in(tmp_path / "alone"))[0, index]["image"] for index in range(6)]
    wrong = []

    def run():
        samples = samples_of(photos, kept_in(tmp_path / "both"))
        for _ in range(10):
            for index in range(6):
                if not torch.equal(samples[0, index]["image"], expected[index]):
                    wrong.append(index)
            for entry in entries(tmp_path / "both")[::2]:
                entry.unlink(missing_ok=True)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(entries(tmp_path / "both")) <= 6


def test_ranks_and_workers_give_the_same_batches_cold_and_warm(photos, tmp_path):
    """Two ranks of two workers each, against one process that keeps nothing."""

    def batches(kept, workers, **part):
        samples = samples_of(photos, kept)
        stream = iter(build_loader(samples, workers, samples.batches(**part)))
        return [next(stream) for _ in range(3)]

    alone = batches(kept_in(tmp_path, 0), 0, batch_size=8)
    for _ in ("cold", "warm"):
        ranks = [batches(kept_in(tmp_path), 2, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
        for number, batch in enumerate(alone):
            assert torch.equal(batch["image"], torch.cat([rank[number]["image"] for rank in ranks]))
            assert batch["seed"] == [seed for rank in ranks for seed in rank[number]["seed"]]
    assert len(entries(tmp_path)) == 6


# --- the command -----------------------------------------------------------------------------------------------------------


def pretrain(photos, out, *words):
    short = ("--preset", "nano", "--model.encoder", TOY, "--image-size", "32", "--workers", "0", "--batch-size", "6")
    return main(["pretrain", "--data", str(photos), "--out", str(out), *short, "--epochs", "2", *words])


def test_runs_keep_images_where_it_pays(photos, tmp_path, monkeypatch, capsys):
    """On by default, said in a line with its size; off keeps none, and neither do images that are hardly larger."""
    monkeypatch.setattr("simmim.pretrain.preparation.KEEP_DECODED_MIB", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert pretrain(photos, tmp_path / "run") == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cache ")]
    assert "images are kept at about 75×100 px, 0.1 MB of at most" in line and "--data.cache off keeps none" in line
    assert len(entries(tmp_path / "cache")) == 6

    def resolved(**data):
        given = {"preset": "nano", "image_size": 32, "batch_size": 6, "epochs": 2, "out": str(tmp_path / "other")}
        return resolve_run(PretrainSettings(data=DataSettings(str(photos), **data), **given))

    assert resolved().kept is not None and parse_budget(resolved().settings.data.cache) > 10**6
    assert resolved(cache="2GB").kept.budget_bytes == 2 * 10**9
    off = resolved(cache="off")
    assert off.kept is None and off.settings.data.cache == "off" and resolved(cache=False).kept is None
    assert resolved(crop_scale=(0.01, 1)).settings.data.cache == "off", "crops need all pixels, and epochs are few"


def statistics(size=(100, 120), reading=AUTO):
    return ImageStatistics(size[0], 3, 1000.0, (0.5,) * 3, (0.2,) * 3, (size,) * 4, reading)


def test_small_collections_are_kept_whole(tmp_path):
    """Up to 4 GB, from four epochs on, where files are compressed; where crops need little, images are shrunk as ever."""
    for number in range(3):
        Image.fromarray(photo(100, 120, seed=number)).save(tmp_path / f"{number}.jpg")
    head, view = dataset_from_paths(sorted(map(str, tmp_path.glob("*.jpg")))), RandomView((64, 64))
    whole = way_to_keep([view], head, 1000, statistics())
    assert whole.whole and whole.size == (100, 120) and whole.num_bytes == 1000 * 100 * 120 * 3
    assert is_worth_keeping(whole) and is_worth_keeping(whole, 4) and not is_worth_keeping(whole, 3.9)
    most = int(4e9) // (100 * 120 * 3)
    assert way_to_keep([view], head, most, statistics()).whole
    many = way_to_keep([view], head, most + 1, statistics())
    assert not many.whole and not is_worth_keeping(many)
    deep = way_to_keep([view], head, 1000, statistics(reading=Reading([[0, 9]] * 3)))
    assert not deep.whole and not is_worth_keeping(deep)
    shrunk = way_to_keep([RandomView((16, 16))], head, 1000, statistics())
    assert not shrunk.whole and shrunk.gain >= 4 and is_worth_keeping(shrunk, 2) and not is_worth_keeping(shrunk, 1)
    Image.fromarray(photo(100, 120)).save(tmp_path / "0.bmp")
    plain = way_to_keep([view], dataset_from_paths([str(tmp_path / "0.bmp")]), 1000, statistics())
    assert not plain.whole and not is_worth_keeping(plain), "a file without compression is read as fast"


def test_a_run_that_goes_on_keeps_images_as_it_did(tmp_path, monkeypatch, capsys):
    """Whole images: said in a line, each decoded once; settings of a saved run, and a size that is given, lead to the same
    entries."""
    monkeypatch.setattr("simmim.pretrain.preparation.KEEP_DECODED_MIB", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder := tmp_path / "photos").mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(jpeg_bytes(photo(50, 60, seed=number)))
    assert pretrain(folder, tmp_path / "run", "--epochs", "4") == 0
    assert "cache    images are kept at about 50×60 px, 0.1 MB of at most" in capsys.readouterr().out
    assert len(entries(tmp_path / "cache")) == 6
    settings = read_settings(tmp_path / "run")
    assert parse_budget(settings.data.cache) > 10**6
    again = resolve_run(replace(settings, out=str(tmp_path / "other")))
    given = resolve_run(replace(settings, out=str(tmp_path / "other"), epochs=1.0, data=replace(settings.data, cache="1GB")))
    assert again.kept.whole and given.kept.whole
    assert {again.kept.folder, given.kept.folder} == {entries(tmp_path / "cache")[0].parents[1]}


def test_check_data_says_what_is_kept(tmp_path, monkeypatch):
    """The number that a run says, of the image size that is suggested; nothing where images stay in memory, are read by
    tiles. Images that are hardly larger than crops are kept whole."""
    for folder, side in ((large := tmp_path / "large", 600), (small := tmp_path / "small", 150)):
        folder.mkdir()
        for number in range(2):
            (folder / f"{number}.jpg").write_bytes(jpeg_bytes(photo(side, side * 4 // 3, seed=number)))
    source = open_images(large)
    report = check_images(source, workers=0)
    side = report.suggestion.image_size_px
    monkeypatch.setattr("simmim.pretrain.preparation.KEEP_DECODED_MIB", 0)
    given = {"preset": "nano", "image_size": side, "batch_size": 6, "epochs": 2, "out": str(tmp_path / "run")}
    run = resolve_run(PretrainSettings(data=DataSettings(str(large)), **given))
    assert report.kept == run.kept.estimate(run.source.head, run.source.num_images, run.statistics)
    (height, width), text = report.kept.size, render(report)
    assert f"MiB: at {side} px a run keeps images at about {height}×{width} px on disk" in text
    assert json.loads(as_json(report))["kept"]["num_bytes"] == report.kept.num_bytes > 0
    for other in (
        check_images(source, workers=0, in_memory_mib=128),
        check_images(source, workers=0, tiles=TileSettings(64)),
    ):
        assert other.kept is None and "\ncache " not in render(other)
    assert not report.kept.whole
    whole = check_images(open_images(small), workers=0)
    assert whole.kept.whole and whole.kept.size == (150, 200) and "at about 150×200 px" in render(whole)


def test_a_size_that_is_none_is_refused(photos, tmp_path, capsys):
    for text in ("many", "-3GB", "20 G"):
        with pytest.raises(ValueError, match="give auto, off, or a size"):
            parse_budget(text)
    assert parse_budget("20GB") == 20 * 10**9 and parse_budget("1.5 MiB") == 1.5 * 2**20
    for text in ("20", "0GB"):
        assert pretrain(photos, tmp_path / "run", "--data.cache", text) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"data.cache is {text!r}: give auto, off, or a size as 20GB" in error
    assert not (tmp_path / "run").exists()
