"""Channels and pages: what of a file, or of several, is an image. Values are held to tifffile's own."""

import json
import os

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from simmim.cli import main
from simmim.data import measure_images, open_images, open_labeled_source, open_picture
from simmim.data.arrangement import pattern_expression
from simmim.data.decode import open_stored
from simmim.data.duplicates import find_duplicates
from simmim.data.records import num_bytes
from simmim.messages import Notice
from simmim.pretrain.reconstruction_grid import as_color
from simmim.reading import AUTO, Reading

NAMES = ["DAPI", "GFP", "RFP", "Cy5", "BF"]
TOY = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'


def record_of(path):
    return {"bytes": None, "path": str(path)}


def stack(seed, *shape):
    """Random values, smooth along the last axis, uint16."""
    values = np.random.default_rng(seed).integers(100, 4000, (*shape, 40, 48))
    return np.sort(values, axis=-1).astype(np.uint16)


def values_of(path, reading=AUTO):
    return open_stored(record_of(path), levels=True, reading=reading).values


def write_ome(path, values, axes, **metadata):
    tifffile.imwrite(path, values, ome=True, photometric="minisblack", metadata={"axes": axes, **metadata})


@pytest.mark.parametrize(
    "options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}, {"compression": "lzw"}, {"bigtiff": True}]
)
def test_channels_of_an_ome_tiff(tmp_path, options):
    """Tiled, compressed and BigTIFF too, with their names."""
    values = stack(0, 5)
    metadata = {"axes": "CYX", "Channel": {"Name": NAMES}}
    tifffile.imwrite(tmp_path / "a.ome.tif", values, ome=True, photometric="minisblack", metadata=metadata, **options)
    stored = open_stored(record_of(tmp_path / "a.ome.tif"), reading=AUTO)
    np.testing.assert_array_equal(stored.values, tifffile.imread(tmp_path / "a.ome.tif"))
    np.testing.assert_array_equal(stored.values, values)
    assert stored.names == tuple(NAMES)
    [only] = open_images(tmp_path, reading=AUTO)["image"]
    assert only["path"] == str(tmp_path / "a.ome.tif")


def test_depths_and_times_are_images_and_channels_stay_together(tmp_path):
    """Axes in any order; each image is a row, with a name of its own, and no duplicate of the others."""
    values = stack(1, 2, 3, 4)  # T, C, Z
    write_ome(tmp_path / "a.ome.tif", values, "TCZYX")
    with pytest.warns(Notice, match="^1 file holds 8 images: each page is one"):
        images = open_images(tmp_path, reading=AUTO)
    assert len(images) == 8
    for row, (time, depth) in enumerate(np.ndindex(2, 4)):
        record = images[row]["image"]
        assert record["path"] == f"{tmp_path / 'a.ome.tif'}#page={row}"
        np.testing.assert_array_equal(open_stored(record, reading=AUTO).values, values[time, :, depth])
    assert find_duplicates(images, np.array([num_bytes(record) for record in images["image"]]), workers=0) == []


def test_an_imagej_hyperstack(tmp_path):
    """Its pages may be described by the first alone."""
    values = stack(2, 3, 2)  # Z, C
    tifffile.imwrite(tmp_path / "a.tif", values, imagej=True, metadata={"axes": "ZCYX", "Labels": ["red", "green"] * 3})
    with pytest.warns(Notice, match="1 file holds 3 images"):
        images = open_images(tmp_path, reading=AUTO)
    for depth in range(3):
        np.testing.assert_array_equal(open_stored(images[depth]["image"], reading=AUTO).values, values[depth])


def test_bands_and_no_data_of_a_geotiff(tmp_path):
    """GDAL's tags name 13 bands, and the value that is none."""
    values = stack(3, 13) + np.uint16(10_000)
    values[:, :10, :10] = 0
    items = "".join(f'<Item name="DESCRIPTION" sample="{band}" role="description">B{band + 1}</Item>' for band in range(13))
    tags = [(42113, "s", 0, "0", True), (42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)]
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="minisblack", planarconfig="separate", extratags=tags, metadata=None
    )
    stored = open_stored(record_of(tmp_path / "a.tif"), reading=AUTO)
    np.testing.assert_array_equal(stored.values, values)
    assert stored.nodata == 0 and stored.names == tuple(f"B{band + 1}" for band in range(13))
    measured = measure_images(open_images(tmp_path), reading=AUTO)
    assert measured.missing == pytest.approx((100 / (40 * 48),) * 13, abs=0.01)
    assert min(low for low, _ in measured.reading.range) > 9000, "zeros are no values"
    view = open_picture(record_of(tmp_path / "a.tif"), 13, reading=measured.reading).crop((0, 0, 48, 40), (40, 48))
    assert torch.equal(view.isnan(), torch.from_numpy(values == 0))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_pages_that_nothing_explains_are_asked_for(tmp_path, kind):
    """In one line, and read as the answer says."""
    values = (stack(4, 5) // (1 if kind is np.uint16 else 16)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", metadata=None)
    with pytest.raises(
        ValueError, match=r"holds 5 pages that nothing explains: give data\.pages channels, images or first$"
    ):
        open_stored(record_of(tmp_path / "a.tif"), levels=True, reading=AUTO)
    np.testing.assert_array_equal(values_of(tmp_path / "a.tif", Reading(pages="channels")), values)
    np.testing.assert_array_equal(values_of(tmp_path / "a.tif", Reading(pages="first")), values[:1])
    with pytest.warns(Notice, match="5 images"):
        images = open_images(tmp_path, reading=Reading(pages="images"))
    for page in range(5):
        stored = open_stored(images[page]["image"], levels=True, reading=Reading(pages="images"))
        np.testing.assert_array_equal(stored.values, values[page : page + 1])
    picture = open_picture(record_of(tmp_path / "a.tif"), 5, reading=Reading("type", pages="channels"))
    levels = picture.crop((0, 0, 48, 40), (40, 48)).numpy()
    np.testing.assert_array_equal(levels, values if kind is np.uint8 else (values / 257).round())


def test_a_pyramid_is_one_image(tmp_path):
    """Reduced pages are no images."""
    values = stack(5)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(values, metadata=None, photometric="minisblack")
        file.write(values[::2, ::2], subfiletype=1, metadata=None, photometric="minisblack")
    np.testing.assert_array_equal(values_of(tmp_path / "a.tif"), values[None])
    assert len(open_images(tmp_path, reading=AUTO)) == 1


# --- files of their own ------------------------------------------------------------------------------------------------


def write_plate(folder, channels="12", sites=2):
    """A plate of two wells as a microscope writes it."""
    folder.mkdir()
    for well in ("A1", "B2"):
        for site in range(1, sites + 1):
            for channel in channels:
                values = stack(hash((well, site, channel)) % 1000)
                Image.fromarray(values).save(folder / f"{well}_s{site}_w{channel}.png")


def test_channels_in_files_of_their_own(tmp_path):
    """Files that agree but for the channel are one image; w10 comes after w2; other files are counted."""
    write_plate(tmp_path / "plate", ("2", "10"))
    Image.fromarray(stack(0)).save(tmp_path / "plate" / "overview.png")
    reading = Reading("auto", pages=None, channel_files="{well}_s{site}_w{channel}")
    with pytest.warns(Notice, match="leaves out 1 file that it does not match: .*overview.png"):
        images = open_images(tmp_path / "plate", reading=reading)
    assert len(images) == 4
    settled = measure_images(images, reading=reading).reading
    assert settled.channel_names == ("2", "10") and len(settled.range) == 2
    record = images[0]["image"]
    first = [tmp_path / "plate" / f"A1_s1_w{channel}.png" for channel in (2, 10)]
    np.testing.assert_array_equal(
        open_stored(record, reading=reading).values, [np.asarray(Image.open(path)) for path in first]
    )
    assert num_bytes(record) == sum(map(os.path.getsize, first))
    only = open_stored(record, reading=Reading(channels_used=("10",)))
    np.testing.assert_array_equal(only.values[0], np.asarray(Image.open(first[1])))


def test_labeled_images_of_channel_files_and_pages(tmp_path):
    """Each image is drawn once, with its label."""
    (tmp_path / "plates").mkdir()
    for label in ("dead", "alive"):
        write_plate(tmp_path / "plates" / label)
    source = open_labeled_source(tmp_path / "plates", reading=Reading(channel_files="{well}_s{site}_w{channel}"))
    assert {label: len(rows) for label, rows in source.rows.items()} == {"alive": 4, "dead": 4}
    assert all("/dead/" in source.train[row]["image"]["path"] for row in source.rows["dead"])
    for label in ("a", "b"):
        (tmp_path / "stacks" / label).mkdir(parents=True)
        write_ome(tmp_path / "stacks" / label / "0.ome.tif", stack(0, 3), "ZYX")
    with pytest.warns(Notice, match="2 files hold 6 images"):
        source = open_labeled_source(tmp_path / "stacks", reading=AUTO)
    assert {label: len(rows) for label, rows in source.rows.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("pattern", ["{well}_w1", "{channel}_{channel}", "w*"])
def test_patterns_that_tell_no_channel(pattern):
    with pytest.raises(ValueError, match=r"give parts of names in braces, each once, with \{channel\} among them"):
        pattern_expression(pattern)


def test_a_star_stands_for_what_does_not_matter():
    found = pattern_expression("{well}_w{channel}_*").search("/plates/1/A1_w2_8C5F")
    assert found.groupdict() == {"well": "A1", "channel": "2"} and pattern_expression("w{channel}").search("/p/xw1") is None


@pytest.mark.parametrize(
    "words, line",
    [
        (("--data.channel_files", "{a}-{channel}"), "matches none of 8 files, such as "),
        (
            ("--data.channel_files", "{well}_s{site}_w{channel}"),
            "1 of 4 images lacks some of the channels 1, 2; the first, 'B2 2', has no 2",
        ),
        (("--data.channel_files", "{well}_*_w{channel}"), "are both channel 1 of one image: name in braces"),
        (("--data.channels_used", "[3]"), "data.channels_used: no channel 3; it has 1, from 0 on"),
        (("--data.channels_used", "[GFP]"), "data.channels_used: no channel 'GFP'; its channels are not named"),
        (("--data.channel_names", "[a, b]"), "data.channel_names has 2 names and there are 1 channel"),
        (("--data.pages", "all"), "unknown data.pages 'all': give one of channels, images, first"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, capsys, words, line):
    write_plate(tmp_path / "plate")
    if "site" in words[1]:
        os.remove(tmp_path / "plate" / "B2_s2_w2.png")
    assert main(["pretrain", "--data", str(tmp_path / "plate"), "--out", str(tmp_path / "run"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert line in lines[-1] and "Traceback" not in "".join(lines)


def test_unexplained_pages_end_the_command(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", stack(4, 5), photometric="minisblack", metadata=None)
    assert main(["pretrain", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "holds 5 pages that nothing explains: give data.pages" in capsys.readouterr().err.strip().splitlines()[-1]


# --- pictures and runs -------------------------------------------------------------------------------------------------


def test_composites_show_every_channel():
    """Each channel has a color, all together are white; one and three channels are as they are."""
    pixels = torch.eye(5).view(5, 5, 1, 1)
    colors = as_color(pixels)
    assert colors.shape == (5, 3, 1, 1) and len({tuple(color.flatten().tolist()) for color in colors}) == 5
    assert torch.equal(as_color(torch.ones(5, 2, 2)), torch.ones(3, 2, 2))
    assert torch.equal(as_color(torch.zeros(4, 2, 2)), torch.zeros(3, 2, 2))
    image = torch.rand(3, 2, 2)
    assert torch.equal(as_color(image), image) and torch.equal(as_color(image[:1]), image[:1].expand(3, 2, 2))


def test_chosen_channels_from_pretraining_to_embeddings(tmp_path, capsys):
    """Named ones of an OME-TIFF; their names stand in config, card and report."""
    for number in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        write_ome(tmp_path / "images" / f"{number}.ome.tif", stack(number, 5), "CYX", Channel={"Name": NAMES})
    run, images = str(tmp_path / "run"), str(tmp_path / "images")
    words = ("--preset", "nano", "--model.encoder", TOY, "--image-size", "32", "--epochs", "1", "--batch-size", "6")
    chosen = ("--data.channels_used", "[RFP, DAPI]", "--workers", "0")
    assert main(["pretrain", "--data", images, "--out", run, *words, *chosen]) == 0
    stored = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text(encoding="utf-8"))["preprocessing"]
    assert stored["reading"]["channels_used"] == [2, 0] and stored["reading"]["channel_names"] == ["RFP", "DAPI"]
    assert main(["pretrain", "--out", run, "--resume"]) == 0
    assert main(["embed", "--run", run, "--images", images, "--out", str(tmp_path / "v.parquet"), "--workers", "0"]) == 0
    assert main(["export", "--run", run, "--out", str(tmp_path / "exported")]) == 0
    assert "RFP" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["check-data", images, "--channels-used", "[RFP, DAPI]", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "\n  RFP  " in printed and """--data.channels_used '["RFP", "DAPI"]'""" in printed
