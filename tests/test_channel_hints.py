"""Files that look like channels of images are told, with the pattern to type, and never read so by themselves."""

import json
from itertools import product

import numpy as np
import pytest
from image_files import notices
from PIL import Image

from simmim.cli import main
from simmim.data import open_images
from simmim.data.channel_hints import suggest_pattern
from simmim.pretrain.preparation import look
from simmim.pretrain.settings import DataSettings, PretrainSettings
from simmim.reading import Reading

GUID = "B3A46C1E-1A2B-4C3D-9E8F-00112233AABB"


def paths_of(template, *parts):
    return sorted("/data/" + template.format(*part) for part in product(*parts))


@pytest.mark.parametrize(
    "template, parts, pattern, names",
    [
        ("{}_s{}_w{}.tif", ("A1 A2", "12", "123"), "{image}_w{channel}", "123"),
        ("{}_ch{}.tif", ("ab", "12"), "{image}_ch{channel}", "12"),
        ("{}_C{}.tif", ("ab", ["01", "02", "10"]), "{image}_C{channel}", ["01", "02", "10"]),
        ("image{}ch0{}.tif", ("12", "01"), "{image}ch{channel}", ["00", "01"]),
        ("{}-{}.tif", ("xy", ["DAPI", "GFP", "tubulin"]), "{image}-{channel}", ["DAPI", "GFP", "tubulin"]),
        ("r01c0{}f01p01-ch{}sk1fk1fl1.tiff", ("12", "1234"), "{image}-ch{channel}sk1fk1fl1", "1234"),
        ("S2_{}_B{}.jp2", ("ab", ["02", "8A", "11"]), "{image}_B{channel}", ["02", "8A", "11"]),
        ("{}_w{}" + GUID + ".tif", (["A01_s1", "A02_s1"], "12"), "{image}_w{channel}*", "12"),
        ("{}_w{}_t{}.tif", ("ab", "12", "123"), "{image}_w{channel}_t{rest}", "12"),
        ("{}/{}.tif", (["DAPI", "GFP"], "abc"), "{channel}/{image}", ["DAPI", "GFP"]),
    ],
)
def test_names_that_look_like_channels(template, parts, pattern, names):
    hint = suggest_pattern(paths_of(template, *(part.split() if " " in part else part for part in parts)))
    assert (hint.pattern, set(hint.names)) == (pattern, set(names))


@pytest.mark.parametrize(
    "template, parts",
    [
        ("{}/{}.png", (["cat", "dog"], "abc")),
        ("IMG_{}.jpg", ("12345",)),
        ("c{}.png", ("12345",)),  # one image
        ("week{}_{}.png", ("12", "12")),
        ("r01c0{}f0{}.tif", ("12", "12")),  # wells and fields
        ("{}_w1.tif", ("abc",)),
    ],
)
def test_names_that_do_not(template, parts):
    assert suggest_pattern(paths_of(template, *parts)) is None


def test_images_that_mostly_lack_channels_are_none():
    assert suggest_pattern(["/data/a_w1.tif", "/data/b_w2.tif", "/data/c_w3.tif"]) is None
    assert suggest_pattern([]) is None
    grid = paths_of("{}_w{}.tif", "abcdef", "12")
    assert suggest_pattern(grid[1:]).pattern == "{image}_w{channel}", (
        "one file is missing, which is said when it is asked for"
    )


def test_it_is_told_and_followed_only_when_typed(tmp_path, capsys):
    for well, channel in product(("A01", "A02", "A03"), (1, 2)):
        values = np.random.default_rng(channel).integers(0, 4000, (40, 40)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{well}_s1_w{channel}.tif")
    assert main(["check-data", str(tmp_path), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert '2 channels of an image each (1; 2): --channel-files "{image}_w{channel}" reads them so' in told
    assert "6 images" in told and "--data.channel_files" not in told
    assert main(["check-data", str(tmp_path), "--workers", "0", "--channel-files", "{image}_w{channel}"]) == 0
    told = capsys.readouterr().out
    assert "3 images" in told and "look like" not in told and "2 channels" in told
    assert main(["check-data", str(tmp_path), "--workers", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["channel_hint"] == {"pattern": "{image}_w{channel}", "names": ["1", "2"]}
    assert len(open_images(tmp_path, reading=Reading(channel_files="{image}_w{channel}"))) == 3

    def opening(**data):
        settings = PretrainSettings(data=DataSettings(str(tmp_path), **data), out=str(tmp_path / "run"))
        found, told = notices(look, settings)
        return found.statistics.channels, [line for line in told if "look like" in line]

    channels, [line] = opening()
    assert channels == 1 and '--data.channel_files "{image}_w{channel}" reads them so' in line
    assert opening(channel_files="{image}_w{channel}") == (2, [])
