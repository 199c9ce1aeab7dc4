"""Tiles: parts of images are what reading the whole gives; draws, weights, background, the commands."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from image_files import jpeg_bytes, noise, notices, photo
from PIL import Image

from simmim.cli import main
from simmim.data import RandomView, build_loader, dataset_from_paths, open_images, open_picture
from simmim.data.addresses import Tile, address_tile, parse_address, without_tile
from simmim.data.decode import open_stored, open_windows
from simmim.data.headers import file_stamps
from simmim.data.kept_pictures import stamp_of
from simmim.data.tiles import TiledSamples, TileWalk, background_share, plan_tiles, tile_starts
from simmim.reading import AUTO, Reading, TileSettings

ROOT = Path(__file__).resolve().parent.parent
TOY = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'
SHORT = ("--preset", "nano", "--model.encoder", TOY, "--image-size", "32", "--workers", "0")


def record_of(path):
    return {"bytes": None, "path": str(path)}


def tile_of(path, level, left, top, width, height):
    return {"bytes": None, "path": address_tile(str(path), Tile(level, left, top, width, height))}


def write(path, values, **options):
    tifffile.imwrite(path, values, **options)
    return path


def same_as_whole(path, reading=AUTO):
    """Whether parts of an image at its corners and inside are those of all of it."""
    whole = open_stored(record_of(path), levels=True, reading=reading)
    height, width = whole.values.shape[1:]
    for left, top, across, down in ((0, 0, width, height), (width - 9, height - 7, 9, 7), (5, 3, 21, 30), (17, 0, 1, 1)):
        part = open_stored(tile_of(path, 0, left, top, across, down), levels=True, reading=reading)
        np.testing.assert_array_equal(part.values, whole.values[:, top : top + down, left : left + across])
        assert part.values.dtype == whole.values.dtype and (part.nodata, part.names) == (whole.nodata, whole.names)
    return whole


# --- parts of files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gray", "color", "planes", "deep", "float"])
@pytest.mark.parametrize(
    "options", [{}, {"tile": (16, 32)}, {"rowsperstrip": 7, "compression": "zlib"}, {"tile": (16, 16), "compression": "lzw"}]
)
def test_a_part_of_a_tiff_file_is_that_of_the_whole(tmp_path, kind, options):
    """Tiled or in strips, compressed or mapped, samples together or in planes, of any type and byte order."""
    shape = {"color": (50, 70, 3), "planes": (4, 50, 70)}.get(kind, (50, 70))
    values = noise(*shape, kind={"deep": np.uint16}.get(kind, np.uint8))
    if kind == "float":
        values = values.astype(np.float32) / 7
    how = {"photometric": "rgb" if kind == "color" else "minisblack", "bigtiff": kind == "deep"}
    how |= {"planarconfig": "separate"} if kind == "planes" else {}
    path = write(tmp_path / "a.tif", values, byteorder=">" if kind in ("deep", "float") else "<", **how, **options)
    stored = same_as_whole(path).values
    np.testing.assert_array_equal(stored, np.moveaxis(values, -1, 0) if kind == "color" else values.reshape(-1, 50, 70))


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_a_part_of_a_turned_file_is_upright(tmp_path, orientation):
    extra = [(274, "H", 1, orientation, True)]
    assert same_as_whole(write(tmp_path / "a.tif", noise(50, 70), tile=(16, 16), extratags=extra)).values.shape[0] == 1


def test_parts_of_stacks(tmp_path):
    """Channels of an OME file, each page an image, and ImageJ's stack that one page describes."""
    values = noise(2, 3, 40, 48, kind=np.uint16)
    ome = {"axes": "ZCYX", "Channel": {"Name": ["a", "b", "c"]}, "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    write(tmp_path / "a.ome.tif", values, ome=True, photometric="minisblack", metadata=ome, tile=(16, 16))
    write(tmp_path / "b.tif", values, imagej=True, metadata={"axes": "ZCYX"})
    for name in ("a.ome.tif", "b.tif"):
        for page in range(2):
            whole = same_as_whole(f"{tmp_path / name}#page={page}")
            np.testing.assert_array_equal(whole.values, values[page])
    assert open_windows(record_of(f"{tmp_path / 'a.ome.tif'}#page=1"), reading=AUTO).pixel_size == 0.5


def test_parts_of_other_formats(tmp_path):
    """Decoded whole once, or mapped; channels in files of their own; the channels that are used."""
    pixels = photo(50, 70)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes(pixels))
    np.save(tmp_path / "a.npy", noise(5, 50, 70, kind=np.uint16))
    for name in ("a.png", "a.jpg", "a.npy"):
        same_as_whole(tmp_path / name)
    for channel in "12":
        write(tmp_path / f"x_w{channel}.tif", noise(50, 70, seed=int(channel), kind=np.uint16), tile=(16, 16))
    [record] = open_images(f"{tmp_path}/x*.tif", reading=Reading("auto", channel_files="{image}_w{channel}"))["image"]
    assert same_as_whole(record["path"]).names == ("1", "2")
    used = Reading("auto", pages=None, channels_used=(3, 0))
    np.testing.assert_array_equal(same_as_whole(tmp_path / "a.npy", used).values, np.load(tmp_path / "a.npy")[[3, 0]])


def test_a_part_is_cropped_as_the_whole_is(tmp_path):
    """The picture of a tile gives the crops that the whole picture gives there, for shares of a range too."""
    write(tmp_path / "deep.tif", noise(64, 64, kind=np.uint16), tile=(16, 16))
    Image.fromarray(photo(64, 64)).save(tmp_path / "a.png")
    for name, reading in (("deep.tif", Reading([[100, 60000]], pages=None)), ("a.png", AUTO)):
        whole = open_picture(record_of(tmp_path / name), None, reading=reading)
        part = open_picture(tile_of(tmp_path / name, 0, 16, 8, 32, 32), None, reading=reading)
        assert torch.equal(part.crop((0, 0, 32, 32), (32, 32)), whole.crop((16, 8, 48, 40), (32, 32)))


def write_pyramid(path, values, **options):
    with tifffile.TiffWriter(path) as file:
        file.write(values, subifds=2, tile=(32, 32), **options)
        for step in (2, 4):
            file.write(values[::step, ::step], subfiletype=1, tile=(32, 32))


def test_levels_and_lengths(tmp_path):
    """A level by number; or the coarsest level that is no coarser than a pixel size, and a side that gives the rest."""
    write_pyramid(tmp_path / "a.tif", values := noise(256, 320), resolution=(20000, 20000), resolutionunit="CENTIMETER")
    source, levels = dataset_from_paths([str(tmp_path / "a.tif")]), [values, values[::2, ::2], values[::4, ::4]]
    image = open_windows(source[0]["image"], reading=AUTO)
    assert image.levels == ((256, 320), (128, 160), (64, 80)) and image.pixel_size == 0.5
    for number, expected in enumerate(levels):
        part = open_stored(tile_of(tmp_path / "a.tif", number, 7, 5, 20, 30), levels=True, reading=AUTO).values
        np.testing.assert_array_equal(part[0], expected[5:35, 7:27])
    placed = {size: plan_tiles(source, TileSettings(32, pixel_size=size), AUTO).images[0] for size in (0.5, 1.0, 1.5, 0.25)}
    assert {size: (image.level, image.side) for size, image in placed.items()} == {
        0.5: (0, 32),
        1.0: (1, 32),
        1.5: (1, 48),
        0.25: (0, 16),
    }
    assert [len(plan_tiles(source, TileSettings(32, level), AUTO)) for level in (0, 1, 2)] == [80, 20, 5]
    assert placed[1.0].full_resolution(placed[1.0].at(10, 20)) == (40, 20, 64, 64)
    with pytest.raises(ValueError, match=r"data\.tile_level is 3, and it has 3 levels"):
        plan_tiles(source, TileSettings(32, 3), AUTO)


def test_pixel_sizes_that_files_tell(tmp_path):
    """GeoTIFF's scale, Aperio's µm, a resolution; what screens have is none."""
    scale = [(33550, "d", 3, (10.0, 10.0, 0.0), True)]
    told = {
        "geo": {"extratags": scale},
        "aperio": {"description": "Aperio Image Library v1\r\n50x70|AppMag = 20|MPP = 0.499"},
        "scan": {"resolution": (25400, 25400), "resolutionunit": "INCH"},
        "screen": {"resolution": (72, 72), "resolutionunit": "INCH"},
        "none": {},
    }
    found = {}
    for name, options in told.items():
        write(tmp_path / f"{name}.tif", noise(50, 70, 3), tile=(16, 16), photometric="rgb", metadata=None, **options)
        found[name] = open_windows(record_of(tmp_path / f"{name}.tif"), reading=AUTO).pixel_size
    assert found == {"geo": 10.0, "aperio": 0.499, "scan": 1.0, "screen": None, "none": None}


def test_a_changed_or_torn_file_is_unreadable(tmp_path):
    path = write(tmp_path / "a.tif", noise(64, 64), tile=(16, 16), compression="zlib")
    tile = tile_of(path, 0, 32, 32, 32, 32)
    open_picture(tile, 1)
    write(path, noise(40, 40), tile=(16, 16))
    with pytest.raises(ValueError, match="has changed: level 0 is 40x40 pixels now"):
        open_picture(tile, 1)
    write(path, noise(64, 64), tile=(16, 16), metadata=None)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ValueError, match="cut short"):
        open_picture(tile, 1)


def test_addresses():
    tile = Tile(2, 10, 20, 30, 40)
    for path in ("a.tif", "a.tif#page=3", "f/a.tif|b.tif#channels=1,2"):
        address = address_tile(path, tile)
        assert parse_address(address) == parse_address(path)._replace(tile=tile) and without_tile(address) == path


# --- draws -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    """Three TIFF files of very different areas, the first half empty."""
    folder = tmp_path_factory.mktemp("mosaic")
    for number, (height, width) in enumerate(((256, 512), (128, 128), (64, 64))):
        values = noise(height, width, seed=number)
        values[:, : width // 2 if number == 0 else 0] = 240
        write(folder / f"{number}.tif", values, tile=(32, 32), compression="zlib")
    return folder


def samples_of(folder, max_background=0.95, size_px=64):
    source = open_images(folder, reading=AUTO)
    plan = plan_tiles(source, TileSettings(size_px, max_background=max_background), AUTO)
    return TiledSamples(source, plan, RandomView((16, 16), (1, 1), (1, 1)), 1, seed=3)


def test_an_epoch_weighs_images_by_area(mosaic):
    """As many tiles of each image as cover it; an index is of one image in every epoch, at another place."""
    samples = samples_of(mosaic)
    assert len(samples) == 32 + 4 + 1
    names = [os.path.basename(samples.path_of((0, index))) for index in range(37)]
    assert names == ["0.tif"] * 32 + ["1.tif"] * 4 + ["2.tif"]
    assert torch.equal(samples[0, 34]["image"], samples[0, 34]["image"])
    assert not torch.equal(samples[0, 34]["image"], samples[1, 34]["image"])


def test_empty_tiles_are_left_out_and_counted(mosaic):
    kept = [samples_of(mosaic)[0, index] for index in range(32)]
    assert all(sample["image"].float().std() > 3 for sample in kept)
    assert 5 < sum(sample["empty_tiles"] for sample in kept) < 80
    everything = [samples_of(mosaic, max_background=1)[0, index] for index in range(32)]
    assert sum(sample["empty_tiles"] for sample in everything) == 0
    assert 5 < sum(bool(sample["image"].float().std() == 0) for sample in everything) < 25


def test_background_is_what_lies_near_the_median_or_has_no_data(tmp_path):
    """Shares of pixels, by hand: a tenth differs, in one of three channels; noise below a 32nd of the range does not."""
    values = np.random.default_rng(0).integers(236, 244, (64, 64, 3)).astype(np.uint8)
    values[:16, :16, 1] = 200
    Image.fromarray(values).save(tmp_path / "a.png")
    assert background_share(open_picture(record_of(tmp_path / "a.png"), 3)) == pytest.approx(1 - 256 / 4096)
    deep = np.full((1, 64, 64), np.nan, np.float32)
    deep[:, :8] = np.linspace(0, 1, 512).reshape(8, 64)
    np.save(tmp_path / "a.npy", deep)
    share = background_share(open_picture(record_of(tmp_path / "a.npy"), 1, reading=Reading([[0, 1]])))
    assert share == pytest.approx(1 - 512 * (1 - 2 / 32) / 4096, abs=2 / 4096)


def test_an_image_without_contents_gives_its_place_to_others(tmp_path):
    """And where nothing has any, the error names the rule."""
    write(tmp_path / "a.tif", np.full((128, 128), 7, np.uint8), tile=(32, 32))
    samples = samples_of(tmp_path)
    with pytest.raises(ValueError, match=r"256 tiles in a row are background: give a higher data\.max_background"):
        samples.view_of(0, random.Random(0))
    write(tmp_path / "b.tif", noise(256, 256), tile=(32, 32))
    sample = samples_of(tmp_path)[0, 0]
    assert sample["empty_tiles"] >= 32 and not sample["skipped"] and sample["image"].float().std() > 3


def test_tiles_do_not_depend_on_workers_ranks_or_where_a_run_stopped(mosaic):
    """Batches of two ranks and two workers, and those after a stop, are those of one process."""
    samples = samples_of(mosaic)

    def batches(workers, count, **part):
        stream = iter(build_loader(samples, workers, samples.batches(**part)))
        return [next(stream) for _ in range(count)]

    alone = batches(0, 4, batch_size=8)
    by_workers = batches(2, 4, batch_size=8)
    ranks = [batches(2, 4, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    resumed = batches(0, 2, batch_size=8, start=2)
    for number, batch in enumerate(alone):
        together = [rank[number] for rank in ranks]
        assert torch.equal(batch["image"], by_workers[number]["image"])
        assert torch.equal(batch["image"], torch.cat([part["image"] for part in together]))
        assert batch["empty_tiles"] == [count for part in together for count in part["empty_tiles"]]
    assert all(torch.equal(after["image"], batch["image"]) for after, batch in zip(resumed, alone[2:]))


def test_unreadable_files_are_left_out_of_the_plan(mosaic, tmp_path):
    for path in mosaic.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "broken.tif").write_bytes(b"II*\0nothing")
    source = open_images(tmp_path, reading=AUTO)
    plan, told = notices(plan_tiles, source, TileSettings(64), AUTO)
    assert len(plan) == 37 and "1 image cannot be opened and left out; the first" in told[0] and "broken.tif" in told[0]
    with pytest.raises(ValueError, match=r"^1 of 4 images cannot be opened"):
        plan_tiles(source, TileSettings(64), AUTO, max_unreadable=0.05)


@pytest.fixture
def openings(monkeypatch, tmp_path):
    """Names of the files that plans of tiles open, and a cache of their own."""
    names = []

    def counting(record, *how):
        names.append(os.path.basename(record["path"]))
        return open_windows(record, *how)

    monkeypatch.setattr("simmim.data.tiles.open_windows", counting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def write_slides(folder, count=3, side=96, age_s=60):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        write_pyramid(folder / f"{number}.tif", noise(side + 32 * number, side), resolution=(20000, 20000), resolutionunit=3)
        os.utime(folder / f"{number}.tif", (time.time() - age_s,) * 2)
    return dataset_from_paths([str(folder / f"{number}.tif") for number in range(count)])


def test_a_plan_opens_files_once(tmp_path, openings):
    """At the second start none; then the one that has changed, one that is new, and all where another pixel limit or other
    pages are asked for. The plan is the same."""
    source = write_slides(tmp_path / "slides")
    settings = TileSettings(32, pixel_size=1.0)
    plan = plan_tiles(source, settings, AUTO)
    assert openings == ["0.tif", "1.tif", "2.tif"] and plan.images[0].level == 1
    again = plan_tiles(source, settings, AUTO)
    assert len(openings) == 3 and again.images == plan.images and again.rows == plan.rows
    assert len(plan_tiles(source, TileSettings(32), AUTO)) == 9 + 12 + 15 and len(openings) == 3

    changed = tmp_path / "slides" / "1.tif"
    write_pyramid(changed, noise(64, 160))
    os.utime(changed, (time.time() - 30,) * 2)
    for _ in range(2):
        assert plan_tiles(source, TileSettings(32), AUTO).images[1].size == (64, 160)
    assert openings[3:] == ["1.tif"]
    plan_tiles(write_slides(tmp_path / "slides", 4, age_s=20), TileSettings(32), AUTO)
    assert openings[4:] == ["0.tif", "1.tif", "2.tif", "3.tif"]
    (tmp_path / "slides" / "0.tif").unlink()
    _, told = notices(plan_tiles, source, TileSettings(32), AUTO)
    assert openings[8:] == [] and "1 image cannot be opened" in told[0]
    for reading, limit in ((AUTO, 10**6), (Reading("image"), 10**9)):
        with_notices_dropped = notices(plan_tiles, source, TileSettings(32), reading, limit)
        assert len(with_notices_dropped[0].rows) == 2
    assert openings[8:] == ["1.tif", "2.tif"] * 2


def test_a_file_that_has_just_changed_is_opened_again(tmp_path, openings):
    """Its time stamp may not tell the next change."""
    source = write_slides(tmp_path / "slides", age_s=0)
    for _ in range(2):
        plan_tiles(source, TileSettings(32), AUTO)
    assert len(openings) == 6 and not list((tmp_path / "cache").rglob("*.json"))


def test_files_that_belong_to_a_slide_count(tmp_path):
    """For headers and pictures that are kept. An image that is a folder has no stamp of its header, as that of the folder
    does not tell what is in it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Slidat.ini").write_text("one")
    (tmp_path / "a.mrxs").write_bytes(b"slide")
    stamps, kept = file_stamps(record_of(tmp_path / "a.mrxs")), stamp_of(record_of(tmp_path / "a.mrxs"))
    (tmp_path / "a" / "Slidat.ini").write_text("others")
    assert stamp_of(record_of(tmp_path / "a.mrxs")) != kept
    assert len(stamps) == 2 and file_stamps(record_of(tmp_path / "a.mrxs")) != stamps
    assert file_stamps(record_of(tmp_path / "a")) is None and file_stamps({"bytes": b"a", "path": "a.tif"}) is None


@pytest.mark.parametrize("harm", ["cut", "other version", "empty", "no folder"])
def test_headers_that_cannot_be_used_are_read_again(tmp_path, openings, harm):
    source = write_slides(tmp_path / "slides")
    plan = plan_tiles(source, TileSettings(32), AUTO)
    [kept] = (tmp_path / "cache").rglob("*-headers.json")
    if harm == "no folder":
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").touch()
    else:
        content = kept.read_text()
        other = content.replace('"version":1', '"version":0')
        kept.write_text({"cut": content[:-9], "other version": other, "empty": ""}[harm])
    assert plan_tiles(source, TileSettings(32), AUTO).images == plan.images and len(openings) == 6
    plan_tiles(source, TileSettings(32), AUTO)
    assert len(openings) == (9 if harm == "no folder" else 6)


def test_several_processes_keep_headers_at_once(tmp_path, openings):
    """Each plan is right at any time, and nothing but the one file is left."""
    source = write_slides(tmp_path / "slides")
    expected, wrong = plan_tiles(source, TileSettings(32), AUTO).images, []
    [kept] = (tmp_path / "cache").rglob("*-headers.json")

    def run():
        for _ in range(10):
            if plan_tiles(source, TileSettings(32), AUTO).images != expected:
                wrong.append(1)
            kept.unlink(missing_ok=True)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and plan_tiles(source, TileSettings(32), AUTO).images == expected
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("length, side, overlap", [(100, 100, 0.5), (101, 100, 0.5), (1000, 100, 0.25), (977, 64, 0)])
def test_a_walk_covers_everything(length, side, overlap):
    starts = tile_starts(length, side, overlap)
    assert starts[0] == 0 and starts[-1] == length - side
    assert all(0 < after - before <= side * (1 - overlap) for before, after in pairwise(starts))


def test_a_walk_names_places(mosaic):
    source = open_images(mosaic, reading=AUTO)
    walk = TileWalk(source, plan_tiles(source, TileSettings(64), AUTO), 0)
    assert len(walk) == 37 == len(list(walk))
    assert [walk.place(number) for number in (0, 1)] == [(0, 0, 64, 64), (64, 0, 64, 64)]
    assert walk[0]["image"]["path"] == f"{mosaic}/0.tif#tile=0,0,0,64,64"
    assert walk[36]["image"]["path"].startswith(f"{mosaic}/2.tif#tile=0,")
    with pytest.raises(IndexError):
        walk[37]


# --- the commands ----------------------------------------------------------------------------------------------------------


def test_pretraining_embedding_and_reconstructing_by_tiles(mosaic, tmp_path, capsys):
    """Empty tiles are counted; vectors have places; images are held out whole."""
    words = ("--data", str(mosaic), "--data.tile", "64", "--out", str(tmp_path / "run"), "--data.validation", "1")
    assert not main(["pretrain", *words, *SHORT, "--epochs", "1", "--batch-size", "9"])
    printed = capsys.readouterr().out
    assert "tiles of 64 px an epoch, gray" in printed and "background (data.max_background)" in printed
    words = ("--run", str(tmp_path / "run"), "--images", str(mosaic))
    assert not main(["reconstruct", *words, "--out", str(tmp_path / "grid.png"), "--count", "2"])
    capsys.readouterr()
    assert not main(
        ["embed", *words, "--tile", "64", "--overlap", "0", "--out", str(tmp_path / "v.parquet"), "--workers", "0"]
    )
    assert "21 vectors of 16 values, 16 tiles of background left out, 0 tiles unreadable" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    assert (table["path"][0], table["x"][0], table["y"][0], table["width"][0]) == (f"{mosaic}/0.tif", 256, 0, 64)
    assert len(table["vector"][0]) == 16 and table["path"][-1] == f"{mosaic}/2.tif"


def test_check_data_by_tiles(mosaic, capsys):
    assert main(["check-data", str(mosaic), "--tile", "64", "--workers", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tiles"], report["images"]) == (37, 3) and 0.2 < report["empty_share"] < 0.6
    assert report["suggestion"]["command"].endswith("--data.tile 64")
    assert main(["check-data", str(mosaic), "--tile", "64", "--workers", "0"]) == 0
    assert "tiles        37 an epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--data.tile", "100"), "data.tile is 100 and 1 of 3 images are smaller, such as {folder}/2.tif of 64x64 pixels"),
        (("--data.tile", "0"), "data.tile is 0: give the side of a tile"),
        (("--data.tile_level", "1"), "data.tile_level is of tiles: give data.tile"),
        (("--data.tile", "64", "--data.pixel_size", "0.5"), "3 of 3 images have no such tiles; the first, {folder}/0.tif: "),
        (("--data.tile", "64", "--data.tile_level", "1"), "data.tile_level is 1, and it has 1 level, from 0 on"),
        (("--data.tile", "64", "--data.streaming", "true"), "those of a stream have none: leave out data.tile"),
        (("--data.tile", "64", "--data.max_background", "0"), "data.max_background is 0.0: give a share above 0"),
    ],
)
def test_wrong_tiles_are_refused_in_one_line(mosaic, tmp_path, capsys, words, expected):
    assert main(["pretrain", "--data", str(mosaic), "--out", str(tmp_path / "run"), *words, *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected.format(folder=mosaic) in error
    assert not (tmp_path / "run").exists()


CHILD = """
from simmim.cli import main
for words in {commands!r}:
    assert not main(words), words
# Of this program alone: ru_maxrss begins with that of the process that started it.
lines = dict(line.split(":") for line in open("/proc/self/status"))
print("peak", int(lines["VmHWM"].split()[0]) // 1024)
"""
SIDE, PIECE, MOST_MIB = 22_000, 256, 1200


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_an_image_of_484_megapixels_takes_little_memory(tmp_path):
    """A sparse BigTIFF of 1.35 GiB in memory: pre-training and embedding stay below 1.2 GiB, with all libraries."""
    pieces = -(-SIDE // PIECE)
    blocks = [noise(PIECE // 8, PIECE // 8, 3, seed=seed).repeat(8, 0).repeat(8, 1) for seed in range(3)]

    def tiles():
        for row in range(pieces):
            for column in range(pieces):
                yield blocks[(row + column) % 3] if (row // 8 + column // 8) % 2 == 0 else None

    path = tmp_path / "large.tif"
    how = {"tile": (PIECE, PIECE), "photometric": "rgb", "bigtiff": True, "compression": "zlib"}
    tifffile.imwrite(path, tiles(), shape=(SIDE, SIDE, 3), dtype=np.uint8, **how)
    with pytest.raises(ValueError, match=r"more than the limit of 200000000: read it by tiles \(data.tile\)"):
        open_picture(record_of(path), 3)
    run, vectors = tmp_path / "run", tmp_path / "v.parquet"
    pretrain = ("pretrain", "--data", str(path), "--data.tile", "512", "--out", str(run), "--epochs", "0.02")
    embed = ("embed", "--run", str(run), "--images", str(path), "--tile", "4096", "--overlap", "0", "--out", str(vectors))
    commands = [[*pretrain, "--batch-size", "16", *SHORT], [*embed, "--workers", "0", "--batch-size", "8"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(commands=commands)], capture_output=True, text=True, env=environment
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert int(child.stdout.rsplit("peak", 1)[1]) < MOST_MIB
    places = pq.read_table(vectors, columns=["x", "y", "width", "height"]).to_pydict()
    assert 0 < len(places["x"]) <= 64 and set(places["width"]) == {4096}
