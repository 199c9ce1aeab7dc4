"""OME-Zarr and Zarr arrays: which folders are images, their values and levels, and what is refused in a line."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import tifffile
import torch
from image_files import noise, notices, record
from zarr_files import edit_metadata, write_array, write_group, write_ome_zarr, zarr

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.cli import main
from simmim.data import (
    UNREADABLE,
    find_images,
    index_folder,
    open_images,
    open_picture,
    open_source,
    read_labeled_images,
    zarr_folders,
)
from simmim.data.addresses import Tile, address_tile
from simmim.data.check import check_images, tally_images
from simmim.data.decode import count_images, open_stored, open_windows
from simmim.data.inspection import RowTallies
from simmim.data.label_maps import ClassScheme
from simmim.data.records import num_bytes
from simmim.data.tiff_windows import pixel_size_of
from simmim.data.tiles import plan_tiles
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.finetune.segmentation.model import HeadShape, SavedSegmenter, Segmenter, save_segmenter
from simmim.finetune.segmentation.tiled_prediction import segment_tiles
from simmim.messages import without_notices
from simmim.reading import AUTO, Reading, TileSettings

VERSIONS = ("0.4", "0.5")
DEEP = {"seed": 3, "kind": np.uint16}


def stored_of(path, reading=AUTO, page=None):
    address = f"{path}#page={page}" if page is not None else str(path)
    return open_stored(record(address), levels=True, reading=reading)


def paths_in(path, reading=AUTO):
    with without_notices():
        return [row["path"] for row in open_images(str(path), reading=reading)["image"]]


# --- one image -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axes", ["yx", "cyx", "tczyx", "zyx", "yxc", "tyx"])
def test_values_are_those_of_the_library(tmp_path, version, axes):
    """C are channels with their names, and each plane along T and Z is an image."""
    sizes = {"t": 2, "c": 3, "z": 4, "y": 40, "x": 56}
    values = noise(*(sizes[axis] for axis in axes), **DEEP)
    names = ("DAPI", "GFP", "RFP") if "c" in axes else ()
    path = tmp_path / "a.ome.zarr"
    write_ome_zarr(path, values, axes, version, names=names)
    np.testing.assert_array_equal(zarr.open_array(str(path / "0"), mode="r")[...], values)

    moved = values[tuple(slice(None) if axis in axes else None for axis in "tczyx")] if axes != "yxc" else None
    moved = np.moveaxis(values, -1, 0)[None, :, None] if moved is None else moved  # (t, c, z, y, x)
    planes = [moved[time, :, depth] for time in range(moved.shape[0]) for depth in range(moved.shape[2])]
    assert count_images(record(path), AUTO) == len(planes)
    expected = [str(path)] if len(planes) == 1 else [f"{path}#page={page}" for page in range(len(planes))]
    assert paths_in(path) == paths_in(tmp_path) == expected
    for address, plane in zip(expected, planes):
        stored = open_stored(record(address), levels=True, reading=AUTO)
        np.testing.assert_array_equal(stored.values, plane)
        assert stored.values.dtype == np.uint16 and stored.names == names
    assert paths_in(path, Reading("auto", pages="first")) == [str(path)]
    np.testing.assert_array_equal(stored_of(path, Reading("auto", pages="first")).values, planes[0])
    together = stored_of(path, Reading("auto", pages="channels"))
    np.testing.assert_array_equal(together.values, np.concatenate(planes))
    assert together.names == (names if len(planes) == 1 else ())


@pytest.mark.parametrize("version", VERSIONS)
def test_levels_and_parts(tmp_path, version):
    """Levels are those of the pyramid, with the size of a pixel; a part of one is that of the array."""
    path = tmp_path / "a.zarr"
    levels = write_ome_zarr(path, noise(2, 3, 70, 90, **DEEP), "zcyx", version, num_levels=3, unit="nanometer", length=250)
    image = open_windows(record(f"{path}#page=1"), reading=AUTO)
    assert image.levels == ((70, 90), (35, 45), (18, 23)) and image.pixel_size == pytest.approx(0.25)
    image.close()
    for level, left, top, width, height in ((0, 13, 5, 40, 33), (1, 0, 0, 45, 35), (2, 22, 17, 1, 1)):
        tile = address_tile(f"{path}#page=1", Tile(level, left, top, width, height))
        stored = open_stored(record(tile), levels=True, reading=AUTO)
        np.testing.assert_array_equal(stored.values, levels[level][1, :, top : top + height, left : left + width])


def test_a_part_reads_its_chunks_alone(tmp_path):
    """Broken chunks elsewhere do not matter."""
    path = tmp_path / "a.zarr"
    (values,) = write_ome_zarr(path, noise(1, 64, 64, **DEEP), "cyx", num_levels=1)
    for row in (0, 1, 2):
        for chunk in (path / "0" / "c" / "0" / str(row)).iterdir():
            chunk.write_bytes(b"nothing")
    tile = open_stored(record(address_tile(str(path), Tile(0, 20, 48, 30, 16))), levels=True, reading=AUTO)
    np.testing.assert_array_equal(tile.values, values[:, 48:, 20:50])
    with pytest.raises(UNREADABLE, match="broken file"):
        stored_of(path)


def test_shards_and_other_byte_orders(tmp_path):
    path = tmp_path / "a.zarr"
    (values,) = write_ome_zarr(
        path,
        noise(48, 64, **DEEP).astype(">u2"),
        "yx",
        num_levels=1,
        chunks=(8, 8),
        shards=(16, 32),
    )
    np.testing.assert_array_equal(stored_of(path).values, values[None])
    old = tmp_path / "b.zarr"
    write_array(old, values.astype(">u2"), "0.4", chunks=(16, 16))
    stored = stored_of(old).values
    np.testing.assert_array_equal(stored, values[None])
    assert stored.dtype == np.uint16 and stored.dtype.isnative


def test_fewer_planes_in_coarser_levels(tmp_path):
    """Of a level with half the planes along Z the plane is read that lies there."""
    path = tmp_path / "a.zarr"
    values = noise(4, 32, 32, **DEEP)
    write_ome_zarr(path, values, "zyx", num_levels=2)
    shutil.rmtree(path / "1")
    write_array(path / "1", values[::2, ::2, ::2])
    for page in range(4):
        tile = open_stored(record(address_tile(f"{path}#page={page}", Tile(1, 0, 0, 16, 16))), levels=True, reading=AUTO)
        np.testing.assert_array_equal(tile.values[0], values[page // 2 * 2, ::2, ::2])


def test_the_length_of_a_pixel(tmp_path):
    """Scales of a dataset and of all are multiplied; without a unit nothing is told."""
    path = tmp_path / "a.zarr"
    write_ome_zarr(path, noise(32, 32), "yx", "0.4", length=2.0)
    edit_metadata(
        path,
        "0.4",
        lambda found: found["multiscales"][0].update(coordinateTransformations=[{"type": "scale", "scale": [0.25, 0.25]}]),
    )
    assert open_windows(record(path), reading=AUTO).pixel_size == 0.5
    with without_notices():
        (tiled,) = plan_tiles(open_images(str(path)), TileSettings(8, pixel_size=1.0), AUTO).images
    assert (tiled.level, tiled.side) == (1, 8)
    write_ome_zarr(tmp_path / "b.zarr", noise(32, 32), "yx", unit=None)
    assert open_windows(record(tmp_path / "b.zarr"), reading=AUTO).pixel_size is None
    with pytest.raises(ValueError, match=r"it tells no size of a pixel: give data\.tile_level"):
        plan_tiles(open_images(str(tmp_path / "b.zarr")), TileSettings(8, pixel_size=1.0), AUTO)


@pytest.mark.parametrize("version", VERSIONS)
def test_plain_arrays_are_as_npy_files(tmp_path, version):
    """Two axes, or channels first or last; names of the axes decide where there are some."""
    for name, shape in (("gray", (20, 30)), ("first", (3, 20, 30)), ("last", (20, 30, 3))):
        values = noise(*shape, **DEEP)
        write_array(tmp_path / f"{name}.zarr", values, version, chunks=shape)
        np.save(tmp_path / f"{name}.npy", values)
        of_npy = stored_of(tmp_path / f"{name}.npy").values
        np.testing.assert_array_equal(stored_of(tmp_path / f"{name}.zarr").values, of_npy)
        assert open_windows(record(tmp_path / f"{name}.zarr"), reading=AUTO).levels == (of_npy.shape[1:],)
    values = noise(2, 20, 30, **DEEP)
    named = {"dimension_names": "zyx"} if version == "0.5" else {}
    array = write_array(tmp_path / "stack.zarr", values, version, chunks=(1, 20, 30), **named)
    if version == "0.4":
        array.attrs["_ARRAY_DIMENSIONS"] = ["z", "y", "x"]
    np.testing.assert_array_equal(stored_of(tmp_path / "stack.zarr", page=1).values, values[1:])


def test_eight_bit_color_is_a_picture(tmp_path):
    path = tmp_path / "a.zarr"
    values = noise(3, 32, 48)
    write_ome_zarr(path, values, "cyx")
    picture = open_picture(record(path), 3)
    np.testing.assert_array_equal(picture.crop((0, 0, 48, 32), (32, 48)).numpy(), values)
    with pytest.raises(UNREADABLE, match=r"more than the limit of 1000: read it by tiles \(data.tile\)"):
        open_picture(record(path), 3, max_pixels=1000)


def test_files_in_a_folder_of_that_name_are_read(tmp_path):
    """As they were before there were Zarr folders."""
    (tmp_path / "a.zarr").mkdir()
    np.save(tmp_path / "a.zarr" / "b.npy", noise(16, 16))
    assert stored_of(tmp_path / "a.zarr" / "b.npy").values.shape == (1, 16, 16)


# --- many images of a folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_fields_of_a_plate_are_images(tmp_path, version):
    """In a folder beside others, as the source itself, a well alone, by a glob and by a list."""
    plate = tmp_path / "images" / "plate.ome.zarr"
    wells = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}, {"path": "B/2", "rowIndex": 1, "columnIndex": 1}]
    write_group(plate, {"plate": {"wells": wells}}, version)
    values = {}
    for number, well in enumerate(wells):
        write_group(plate / well["path"], {"well": {"images": [{"path": "0"}, {"path": "1"}]}}, version)
        for field in range(2):
            path = plate / well["path"] / str(field)
            values[str(path)] = write_ome_zarr(path, noise(2, 24, 24, seed=2 * number + field), "cyx", version)[0]
    np.save(tmp_path / "images" / "a.npy", noise(24, 24))
    fields, file = list(values), str(tmp_path / "images" / "a.npy")
    assert find_images(tmp_path / "images") == paths_in(tmp_path / "images") == [file, *fields]
    assert paths_in(plate) == paths_in(tmp_path / "images" / "*.zarr") == fields
    assert paths_in(plate / "B" / "2") == paths_in(plate / "B" / "*" / "*") == fields[2:]
    assert paths_in(tmp_path / "images" / "**" / "*") == [file, *fields], "not what lies in them once more"
    (tmp_path / "list.txt").write_text("images/plate.ome.zarr/A/1/1\nimages/plate.ome.zarr/B/2\n")
    assert paths_in(tmp_path / "list.txt") == fields[1:]
    for path, stored in values.items():
        np.testing.assert_array_equal(stored_of(path).values, stored)
    with pytest.raises(UNREADABLE, match=f"^holds 4 images: give one, such as {fields[0]}$"):
        stored_of(plate)
    shutil.rmtree(plate / "A" / "1")
    assert find_images(plate) == [str(plate / "A" / "1"), *fields[2:]], "a missing well is told where it is opened"
    with pytest.raises(UNREADABLE, match="No such file or directory"):
        stored_of(plate / "A" / "1")


def test_series_and_groups_of_images(tmp_path):
    """Of bioformats2raw in their order, and of SpatialData without its labels."""
    series = tmp_path / "raw.zarr"
    write_group(series, {"bioformats2raw.layout": 3}, "0.4")
    for number in (0, 1, 10, 2):
        write_ome_zarr(series / str(number), noise(16, 16, seed=number), "yx", "0.4", num_levels=1)
    assert find_images(series) == [str(series / name) for name in ("0", "1", "2", "10")]
    write_group(series / "OME", {"series": ["10", "0"]}, "0.4")
    assert find_images(series) == [str(series / name) for name in ("10", "0")]
    spatial = tmp_path / "spatial.zarr"
    write_group(spatial, {})
    for name in ("images", "labels", "tables"):
        write_group(spatial / name, {})
    write_ome_zarr(spatial / "images" / "slide", noise(3, 16, 16), "cyx")
    write_ome_zarr(spatial / "labels" / "cells", noise(16, 16), "yx")
    write_array(spatial / "tables" / "counts", noise(20, 5))
    assert find_images(spatial) == [str(spatial / "images" / "slide")]


def test_the_index_does_not_look_into_stores_but_notices_changes(tmp_path, monkeypatch):
    """Labels of an image, chunks and metadata are no files of the folder; a new field is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("simmim.data.index.TRUSTED_AGE_S", -1.0)
    folder = tmp_path / "images"
    write_ome_zarr(folder / "a.zarr", noise(16, 16), "yx")
    write_ome_zarr(folder / "a.zarr" / "labels" / "cells", noise(16, 16), "yx")
    np.save(folder / "a.zarr" / "beside.npy", noise(16, 16))
    index, said = notices(index_folder, folder)
    assert [row["path"] for row in index["image"]] == [str(folder / "a.zarr")] and not said
    assert list((tmp_path / "cache").rglob("*.json"))
    well = folder / "b.zarr"
    write_group(well, {"well": {"images": [{"path": "0"}]}})
    for field in "01":
        write_ome_zarr(well / field, noise(16, 16), "yx")
    assert len(index_folder(folder)) == 2
    edit_metadata(well, "0.5", lambda found: found["well"]["images"].append({"path": "1"}))
    assert len(index_folder(folder)) == 3
    edit_metadata(folder / "a.zarr", "0.5", lambda found: None)
    monkeypatch.setattr("simmim.data.index.build_index", None)
    with pytest.raises(TypeError):
        index_folder(folder)


@pytest.mark.parametrize("lost", ["metadata", "folder"])
def test_a_well_that_cannot_be_read_for_a_moment_is_there_again(tmp_path, monkeypatch, lost):
    """It is named, and no index is kept that lacks it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("simmim.data.index.TRUSTED_AGE_S", -1.0)
    plate = tmp_path / "images" / "plate.zarr"
    write_group(plate, {"plate": {"wells": [{"path": "A/1"}, {"path": "A/2"}]}})
    for well in ("A/1", "A/2"):
        write_group(plate / well, {"well": {"images": [{"path": "0"}, {"path": "1"}]}})
        for field in "01":
            write_ome_zarr(plate / well / field, noise(16, 16), "yx")
    fields = find_images(plate)

    def failing(real):
        def call(path, *args, **kwargs):
            if str(path).startswith(f"{plate / 'A' / '1'}/"):
                raise OSError(5, "Input/output error", str(path))
            return real(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if lost == "metadata":
            patch.setattr(zarr_folders, "read_object", failing(zarr_folders.read_object))
        else:
            patch.setattr(os, "stat", failing(os.stat))
        index, (line,) = notices(index_folder, tmp_path / "images")
    assert [row["path"] for row in index["image"]] == fields[2:]
    assert f"read without 1 folder that cannot be read: {plate / 'A' / '1'} (Input/output error)" in line
    assert not list((tmp_path / "cache").rglob("*.json")), "no index is stored that lacks a folder"
    index, lines = notices(index_folder, tmp_path / "images")
    assert [row["path"] for row in index["image"]] == fields and not lines
    with monkeypatch.context() as patch:
        patch.setattr(zarr_folders, "read_object", failing(zarr_folders.read_object))
        assert paths_in(plate / "A" / "*") == [str(plate / "A" / "1"), *fields[2:]], "a named one is told where it is opened"


def test_class_folders_and_copies(tmp_path):
    """Stores in class folders have their labels; two of the same files are found by check-data, with their sizes."""
    for label, name in enumerate(("a", "b")):
        for number in range(3):
            write_ome_zarr(tmp_path / name / f"{number}.zarr", noise(24, 24, seed=number), "yx", length=1.0 + label)
    shutil.copytree(tmp_path / "a" / "0.zarr", tmp_path / "b" / "3.zarr")
    images = open_images(str(tmp_path))
    files = [file for file in (tmp_path / "a" / "0.zarr").rglob("*") if file.is_file()]
    assert num_bytes(images[0]["image"]) == sum(file.stat().st_size for file in files) > 0
    report = check_images(images, workers=0, reading=AUTO)
    assert report.formats == {"Zarr": 7} and report.without_up == {"micrograph": 7} and report.sound
    assert report.duplicates == ((str(tmp_path / "a" / "0.zarr"), str(tmp_path / "b" / "3.zarr")),)
    labels = read_labeled_images(tmp_path, None, 0)
    assert sorted([*labels.train["label"], *labels.validation["label"]]) == [0] * 3 + [1] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_in_processes(tmp_path, workers):
    """The library goes on in processes that are forked after it was used."""
    for number in range(3):
        write_ome_zarr(tmp_path / f"{number}.zarr", noise(3, 32, 32, seed=number), "cyx")
    source = open_images(str(tmp_path))
    assert stored_of(tmp_path / "0.zarr").values.any()
    tally, _ = tally_images(RowTallies(source, 3, 2**20, AUTO), workers, False)
    assert tally.formats == {"Zarr": 3} and not tally.unreadable


# --- broken ones ---------------------------------------------------------------------------------------------------------


def remove(*names):
    def change(path):
        for name in names:
            target = path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def with_metadata(**changes):
    return lambda path: edit_metadata(path, "0.4", lambda found: found["multiscales"][0].update(changes))


BROKEN = {
    "no .zattrs": (
        remove(".zattrs"),
        "a Zarr group without multiscales in .zattrs or zarr.json, .* give the path of an array",
    ),
    "no metadata": (
        lambda path: (remove(".zattrs")(path), remove(".zgroup")(path)),
        "a Zarr folder without metadata: none of",
    ),
    "no JSON": (lambda path: (path / ".zattrs").write_text("{"), r"^\.zattrs is broken: "),
    "a list": (lambda path: (path / ".zattrs").write_text("[]"), r"^\.zattrs is broken: it holds no object"),
    "no level": (remove("1"), "its level '1' is missing: no Zarr array is at "),
    "no chunks": (
        lambda path: [remove(f"0/{name}")(path) for name in ("0.0.0", "0.0.1")],
        "none of the chunks of .*0 is there",
    ),
    "unknown axes": (
        with_metadata(axes=[{"name": name} for name in ("q", "y", "x")]),
        "its axes are q, y, x: expected some of t, c, z, y, x, with y and x among them",
    ),
    "no x": (with_metadata(axes=[{"name": name} for name in "tcy"]), "its axes are t, c, y: expected some of"),
    "too many axes": (
        with_metadata(axes=[{"name": name} for name in "tzyx"]),
        "its level '0' has 3 dimensions, and its axes are",
    ),
    "no datasets": (with_metadata(datasets=[]), "its multiscales are broken"),
    "no paths": (with_metadata(datasets=[{}]), r"its multiscales are broken \(KeyError: 'path'\)"),
    "a broken chunk": (lambda path: (path / "0" / "0.0.0").write_bytes(b"nothing"), "broken file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_stores_are_told_in_a_line(tmp_path, name):
    """By whatever reads them; the others are read."""
    path = tmp_path / "a.zarr"
    write_ome_zarr(path, noise(1, 16, 32), "cyx", "0.4")
    change, message = BROKEN[name]
    change(path)
    with pytest.raises(UNREADABLE, match=message) as caught:
        stored_of(path)
    assert "\n" not in str(caught.value)
    assert find_images(tmp_path) == [str(path)] and paths_in(tmp_path) == [str(path)]
    write_ome_zarr(tmp_path / "b.zarr", noise(1, 16, 32), "cyx", "0.4")
    report = check_images(open_images(str(tmp_path)), workers=0, reading=AUTO)
    assert [unreadable for unreadable, _ in report.unreadable] == [str(path)]


def test_other_values_and_large_chunks_are_refused(tmp_path):
    write_array(tmp_path / "a.zarr", np.zeros((8, 8), np.complex64) + 1)
    with pytest.raises(UNREADABLE, match="holds complex64 values, not real numbers"):
        stored_of(tmp_path / "a.zarr")
    write_array(tmp_path / "b.zarr", noise(2, 2, 8, 8), chunks=(1, 1, 8, 8))
    with pytest.raises(UNREADABLE, match="a Zarr array of 4 dimensions without names, expected 2 or 3"):
        stored_of(tmp_path / "b.zarr")
    write_array(tmp_path / "c.zarr", noise(64, 64), chunks=(64, 32))
    with pytest.raises(UNREADABLE, match="its values are in chunks of 64x32 = 2048 values, more than the limit of 2000"):
        open_windows(record(tmp_path / "c.zarr"), 2000, AUTO)


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    """The index needs no library; the command ends in one line."""
    write_ome_zarr(tmp_path / "a.zarr", noise(16, 16), "yx")
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert find_images(tmp_path) == [str(tmp_path / "a.zarr")]
    with pytest.raises(UNREADABLE, match=r"^a Zarr folder: pip install 'simmim-toolkit\[zarr\]', of Python 3.11 or later$"):
        stored_of(tmp_path / "a.zarr")
    assert main(["pretrain", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--preset", "nano"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].endswith("Python 3.11 or later") and "Traceback" not in error


# --- the commands --------------------------------------------------------------------------------------------------------


def test_embed_by_tiles(tmp_path):
    """A vector for each tile of each field, with its place; a level and a length of a pixel name the same tiles."""
    import pyarrow.parquet as pq

    toy = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'
    folder, run = tmp_path / "images", tmp_path / "run"
    for number in range(2):
        write_ome_zarr(folder / f"{number}.ome.zarr", noise(3, 128, 96, seed=number), "cyx")
    tiles = ("--data.tile", "32", "--data.pixel_size", "1.0")
    of_run = ("--preset", "nano", "--model.encoder", toy, "--image-size", "32", "--workers", "0", "--epochs", "1")
    with without_notices():
        assert main(["pretrain", "--data", str(folder), "--out", str(run), "--batch-size", "4", *tiles, *of_run]) == 0
        embed = ["embed", "--run", str(run), "--images", str(folder), "--workers", "0", "--tile", "32"]
        assert main([*embed, "--pixel-size", "1.0", "--out", str(tmp_path / "length.parquet")]) == 0
        assert main([*embed, "--tile-level", "1", "--out", str(tmp_path / "level.parquet")]) == 0
    by_length, by_level = (pq.read_table(tmp_path / f"{name}.parquet").to_pydict() for name in ("length", "level"))
    assert by_length == by_level and len(by_length["x"]) == 2 * 6
    assert set(zip(by_length["x"], by_length["width"])) == {(0, 64), (32, 64)}
    assert json.loads((run / "encoder" / "config.json").read_text())["architecture"]["in_channels"] == 3


def test_label_maps_of_fields_by_tiles(tmp_path):
    """Those of a TIFF file of the same values, with the size of a pixel; their folders are no Zarr folders by name."""
    torch.manual_seed(0)
    model = Segmenter(build(SwinV2Config(16, (1, 1), (1, 2), window_size=4)), 2, HeadShape(width=16)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    scheme = ClassScheme(("ground", "cell"), (0, 1), 255)
    saved = SavedSegmenter(model, scheme, Preprocessing((32, 32), (0.4,) * 3, (0.2,) * 3), 32, "auto")
    save_segmenter(tmp_path / "run" / "encoder", saved, {"method": "segmentation"})
    plate = tmp_path / "images" / "plate.zarr"
    write_group(plate, {"plate": {"wells": [{"path": "A/1"}]}})
    write_group(plate / "A" / "1", {"well": {"images": [{"path": "0"}]}})
    values = write_ome_zarr(plate / "A" / "1" / "0", noise(3, 128, 96), "cyx", length=0.25)[1]
    tifffile.imwrite(tmp_path / "copy.tif", np.moveaxis(values, 0, -1), photometric="rgb", tile=(16, 16))
    segment_tiles(tmp_path / "run", tmp_path / "images", tmp_path / "maps", TileSettings(32, pixel_size=0.5), 0.0)
    segment_tiles(tmp_path / "run", tmp_path / "copy.tif", tmp_path / "of-copy", TileSettings(32), 0.0)
    with tifffile.TiffFile(tmp_path / "maps" / "masks" / "plate" / "A" / "1" / "0.tif") as file:
        written = file.pages.first.asarray()
        assert pixel_size_of(file) == pytest.approx(0.5)
    np.testing.assert_array_equal(written, tifffile.imread(tmp_path / "of-copy" / "masks" / "copy.tif"))
    assert len(np.unique(written)) == 2


def test_open_source_of_a_store(tmp_path):
    write_ome_zarr(tmp_path / "a.zarr", noise(3, 16, 16), "zyx")
    with without_notices():
        source = open_source(str(tmp_path / "a.zarr"), reading=AUTO)
    assert source.num_images == 3
