"""Whole slides by OpenSlide: the library's own values, its agreement with tifffile, files that belong together."""

import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from image_files import noise, notices, record
from slide_files import write_mirax, write_vms

from simmim.cli import main
from simmim.data import UNREADABLE, find_images, index_folder, open_images, open_picture
from simmim.data.addresses import Tile, address_tile
from simmim.data.check import check_images
from simmim.data.decode import open_stored, open_windows
from simmim.data.known_formats import PATH_FORMATS
from simmim.data.records import num_bytes
from simmim.data.slides import SlideImage, lay_over
from simmim.data.tiff_windows import TiffImage
from simmim.data.tiles import background_share, plan_tiles
from simmim.messages import without_notices
from simmim.reading import AUTO, TileSettings

openslide = pytest.importorskip("openslide", reason="whole slides need the extra slides")

FILL = (250, 245, 240)


def colors(height=128, width=192, seed=0):
    """Smooth colors, which JPEG keeps."""
    down, across = np.mgrid[:height, :width]
    return np.stack([across + seed, down, (down + across) // 2], axis=-1).astype(np.uint8)


def stored_of(path, level, left, top, width, height):
    tile = address_tile(str(path), Tile(level, left, top, width, height))
    return open_stored(record(tile), levels=True, reading=AUTO).values


def library_values(path, level, left, top, width, height, background=(255, 255, 255)):
    """What the library gives, laid over a color."""
    with openslide.OpenSlide(path) as slide:
        down = slide.level_downsamples[level]
        region = slide.read_region((round(left * down), round(top * down)), level, (width, height))
    values = np.asarray(region).astype(np.float64)
    share = values[..., 3:] / 255
    return (values[..., :3] * share + np.array(background) * (1 - share)).round().astype(np.uint8).transpose(2, 0, 1)


BOXES = ((0, 0, 0, 192, 128), (0, 37, 21, 50, 60), (1, 0, 0, 96, 64), (1, 33, 17, 40, 31), (1, 95, 63, 1, 1))


# --- formats of several files --------------------------------------------------------------------------------------------


def test_mirax_with_what_was_not_scanned(tmp_path):
    """Tiles are those that were written; the rest has the slide's own color, and is background."""
    path = tmp_path / "a.mrxs"
    levels = write_mirax(path, colors(), missing=[(0, 0), (1, 2)], fill=FILL)
    image = open_windows(record(path), reading=AUTO)
    assert isinstance(image, SlideImage) and image.levels == ((128, 192), (64, 96)) and image.pixel_size == 0.25
    image.close()
    for box in BOXES:
        level, left, top, width, height = box
        values = stored_of(path, *box)
        np.testing.assert_array_equal(values, library_values(path, *box, background=FILL))
        written = levels[level][top : top + height, left : left + width].transpose(2, 0, 1)
        assert np.abs(values.astype(int) - written).max() <= 2, "decoders of JPEG differ by rounding"
    np.testing.assert_array_equal(stored_of(path, 0, 0, 0, 32, 32), np.full((3, 32, 32), 1) * np.array(FILL)[:, None, None])
    tiles = {left: record(address_tile(str(path), Tile(0, left, 0, 32, 32))) for left in (0, 96)}
    assert background_share(open_picture(tiles[0], 3)) == 1.0 and background_share(open_picture(tiles[96], 3)) < 0.5
    np.testing.assert_array_equal(open_stored(record(path), levels=True).values, stored_of(path, 0, 0, 0, 192, 128))
    with pytest.raises(UNREADABLE, match=r"more than the limit of 1000: read it by tiles \(data\.tile\)"):
        open_picture(record(path), 3, max_pixels=1000)


def test_hamamatsu_vms(tmp_path):
    path = tmp_path / "b.vms"
    written = write_vms(path, colors(), um_per_px=0.5)
    image = open_windows(record(path), reading=AUTO)
    assert image.levels[:3] == ((128, 192), (64, 96), (32, 48)) and image.pixel_size == 0.5
    for box in BOXES:
        np.testing.assert_array_equal(stored_of(path, *box), library_values(path, *box))
    assert np.abs(stored_of(path, 0, 0, 0, 192, 128).astype(int) - written.transpose(2, 0, 1)).max() <= 2
    (tiled,) = plan_tiles(open_images(str(path)), TileSettings(16, pixel_size=2.0), AUTO).images
    assert (tiled.level, tiled.side) == (2, 16)


def test_files_that_belong_to_a_slide_are_no_others(tmp_path):
    """In a folder, by a glob, and in the sizes and copies that check-data counts; a file that no slide names stays."""
    folder = tmp_path / "slides"
    write_mirax(folder / "a.mrxs", colors())
    write_vms(folder / "b.vms", colors(seed=9))
    (folder / "notes.ini").write_text("[nothing]")
    shutil.copy(folder / "b_macro.jpg", folder / "c.jpg")
    slides = [str(folder / name) for name in ("a.mrxs", "b.vms", "c.jpg")]
    index, said = notices(index_folder, folder)
    assert [row["path"] for row in index["image"]] == slides
    assert said == [f"1 file in {str(folder)!r} is not read: .ini 1"]
    for pattern in ("*.[mvj]*", "**/*.[mvjd]*"):
        images, said = notices(open_images, f"{folder}/{pattern}")
        assert [row["path"] for row in images["image"]] == slides and not said
    inside = [folder / "a.mrxs", *(folder / "a").iterdir()]
    assert num_bytes(record(slides[0])) == sum(file.stat().st_size for file in inside)
    shutil.copy(folder / "a.mrxs", folder / "d.mrxs")
    shutil.copytree(folder / "a", folder / "d")
    with without_notices():
        report = check_images(open_images(str(folder)), workers=0, reading=AUTO, tiles=TileSettings(16))
    assert report.formats == {"OpenSlide": 3, "JPEG": 1} and report.without_up == {"slide": 3} and report.sound
    assert report.duplicates == ((slides[0], str(folder / "d.mrxs")),)


# --- formats that tifffile reads too -------------------------------------------------------------------------------------


TILED = {"tile": (16, 16), "photometric": "rgb", "metadata": None, "compression": "zlib"}


def write_svs(path, pixels):
    """An Aperio-like slide of two levels without loss, with a thumbnail between them."""
    description = "Aperio Image Library v11.2.1 \r\n192x128 |AppMag = 20|MPP = 0.4990"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, description=description, **TILED)
        file.write(pixels[::8, ::8], description=description, photometric="rgb", metadata=None)
        file.write(pixels[::2, ::2], description=description, **TILED)


def write_tiled(path, pixels):
    """A pyramid in a TIFF file that names no program, with a resolution."""
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, resolution=(20040.08, 20040.08), resolutionunit="CENTIMETER", **TILED)
        file.write(pixels[::2, ::2], subfiletype=1, **TILED)


@pytest.mark.parametrize("write, name", [(write_svs, "a.svs"), (write_tiled, "a.tif")])
def test_openslide_and_tifffile_agree(tmp_path, write, name):
    """On levels, values, and the size of a pixel; by default tifffile reads them."""
    path = tmp_path / name
    write(path, noise(128, 192, 3))
    with open(path, "rb") as stream:
        ours, slide = TiffImage(stream, None, None, 2**20), SlideImage(str(path))
        assert isinstance(open_windows(record(path), reading=AUTO), TiffImage)
        assert slide.levels == ours.levels == ((128, 192), (64, 96))
        assert slide.pixel_size == pytest.approx(ours.pixel_size, rel=1e-6) == pytest.approx(0.499, rel=1e-5)
        for level, left, top, width, height in BOXES:
            box = (left, top, left + width, top + height)
            np.testing.assert_array_equal(slide.read(level, box).values, ours.read(level, box).values)
        slide.close()


@pytest.mark.parametrize("name, vendor", [("a.scn", "leica"), ("a.tif", "philips")])
def test_the_library_is_chosen_by_the_vendor(tmp_path, monkeypatch, name, vendor):
    """A file of that vendor goes to OpenSlide, others of the name to tifffile."""
    path = tmp_path / name
    write_svs(path, noise(128, 192, 3))
    assert isinstance(open_windows(record(path), reading=AUTO), TiffImage)
    monkeypatch.setattr(openslide.OpenSlide, "detect_format", lambda path: vendor)
    monkeypatch.setattr(tifffile.TiffFile, "is_philips", vendor == "philips", raising=False)
    image = open_windows(record(path), reading=AUTO)
    assert isinstance(image, SlideImage)
    np.testing.assert_array_equal(stored_of(path, 1, 33, 17, 40, 31), library_values(path, 1, 33, 17, 40, 31))


def test_partly_opaque_pixels_lie_over_the_background():
    region = np.array([[[0, 100, 200, 255], [0, 100, 200, 0], [0, 100, 200, 51]]], np.uint8)
    expected = [[[0, 100, 200], FILL, [200, 216, 232]]]
    np.testing.assert_array_equal(lay_over(region, np.array(FILL, np.uint8)), expected)


# --- broken ones ---------------------------------------------------------------------------------------------------------


def test_broken_slides_are_told_in_a_line(tmp_path):
    """Without its folder or its files, not a slide at all, missing; one bad tile leaves the others."""
    lone = tmp_path / "lone.mrxs"
    write_mirax(lone, colors())
    shutil.rmtree(tmp_path / "lone")
    with pytest.raises(UNREADABLE, match=r"^no slide that OpenSlide reads .*: the files that belong to it must lie"):
        open_picture(record(lone), 3)
    with pytest.raises(UNREADABLE, match="No such file or directory"):
        open_picture(record(tmp_path / "none.mrxs"), 3)
    bad = tmp_path / "bad.mrxs"
    write_mirax(bad, colors())
    data = bytearray((tmp_path / "bad" / "Data0000.dat").read_bytes())
    data[4:40] = bytes(36)  # the beginning of the first tile
    (tmp_path / "bad" / "Data0000.dat").write_bytes(data)
    for _ in range(2):
        with pytest.raises(UNREADABLE, match=r"^OpenSlide cannot read it: ") as caught:
            stored_of(bad, 0, 0, 0, 16, 16)
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(stored_of(bad, 0, 64, 64, 32, 32), library_values(bad, 0, 64, 64, 32, 32))
    write_vms(tmp_path / "whole.vms", colors())
    with without_notices():
        report = check_images(open_images(str(tmp_path)), workers=0, reading=AUTO, tiles=TileSettings(16))
    assert str(lone) in dict(report.unreadable)


@pytest.mark.parametrize("write, name", [(write_mirax, "a.mrxs"), (write_vms, "a.vms"), (write_svs, "a.bif")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys, write, name):
    write(tmp_path / name, colors())
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert find_images(tmp_path) == [str(tmp_path / name)]
    with pytest.raises(UNREADABLE, match=r"^a whole slide: pip install 'simmim-toolkit\[slides\]'$"):
        open_picture(record(tmp_path / name), 3)
    assert main(["check-data", str(tmp_path), "--workers", "0", "--tile", "16"]) == 2
    assert capsys.readouterr().err.strip().endswith("a whole slide: pip install 'simmim-toolkit[slides]'")


def test_a_kind_is_found_by_name_or_vendor():
    """Of all kinds at most one."""
    for path in ("a.mrxs", "a.VMS", "a.zarr", "plate.ome.zarr/A/1/0"):
        assert sum(kind.detect(path) for kind in PATH_FORMATS) == 1, path
    assert not any(kind.detect(path) for kind in PATH_FORMATS for path in ("a.tif", "a.zarr.png", "mrxs"))


# --- the commands --------------------------------------------------------------------------------------------------------


def test_pretraining_and_embedding_by_tiles(tmp_path):
    """Empty tiles are left out of training; a vector for each tile, with its place in the full resolution."""
    toy = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'
    folder, run = tmp_path / "slides", tmp_path / "run"
    write_mirax(folder / "a.mrxs", noise(128, 192, 3), missing=[(0, 0)])
    write_vms(folder / "b.vms", noise(128, 192, 3, seed=1), um_per_px=0.25)
    tiles = ("--data.tile", "32", "--data.pixel_size", "0.5")
    of_run = ("--preset", "nano", "--model.encoder", toy, "--image-size", "32", "--workers", "0", "--epochs", "1")
    with without_notices():
        assert main(["pretrain", "--data", str(folder), "--out", str(run), "--batch-size", "4", *tiles, *of_run]) == 0
        embed = [
            "embed",
            "--run",
            str(run),
            "--images",
            str(folder),
            "--workers",
            "0",
            "--tile",
            "32",
            "--pixel-size",
            "0.5",
        ]
        assert main([*embed, "--pixel-size", "0.5", "--overlap", "0", "--out", str(tmp_path / "vectors.parquet")]) == 0
    vectors = pq.read_table(tmp_path / "vectors.parquet").to_pydict()
    assert set(vectors["path"]) == {str(folder / "a.mrxs"), str(folder / "b.vms")}
    assert set(zip(vectors["x"], vectors["y"])) == {(left, top) for left in (0, 64, 128) for top in (0, 64)}
    assert set(vectors["width"]) == {64}
