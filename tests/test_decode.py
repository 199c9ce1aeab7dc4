"""Decoding against pixels known before they were written: every mode and format, orientation, transparency, depth."""

import colorsys

import numpy as np
import pytest
from image_corpus import (
    ALPHA,
    CORPUS,
    INDICES,
    RGB,
    palette_image,
)
from image_files import (
    noise,
    oriented,
    over_white,
    pixels_of,
    record,
    whole_pixels,
)
from PIL import Image
from test_unreadable_images import REFUSED

from simmim.data import (
    Picture,
    open_picture,
    read_image,
)

pytest.importorskip("tifffile")


@pytest.mark.parametrize("name", CORPUS)
def test_every_mode_and_format_shows_what_was_written(tmp_path, name):
    """Read from a path, from bytes, a second time, and held in memory."""
    write, channels, expected, within = CORPUS[name]
    write(tmp_path / name)
    expected = np.asarray(expected, dtype=np.float64)
    expected = expected[..., None] if expected.ndim == 2 else expected
    expected = np.broadcast_to(expected, (*expected.shape[:2], channels))
    from_bytes = {"path": name, "bytes": (tmp_path / name).read_bytes()}
    picture = open_picture(record(tmp_path / name), channels)
    for shown in (picture, picture, picture.decoded(), open_picture(from_bytes, channels)):
        assert shown.size == expected.shape[:2] and shown.channels == channels
        assert np.abs(whole_pixels(shown) - expected).max() <= within
    if channels in (1, 3):
        assert np.abs(np.asarray(read_image(from_bytes, channels)).reshape(expected.shape) - expected).max() <= within


def test_the_corpus_is_large_and_has_every_mode(tmp_path):
    assert len(CORPUS) + len(REFUSED) >= 150
    modes = set()
    for name, (write, *_) in CORPUS.items():
        write(tmp_path / name)
        try:
            with Image.open(tmp_path / name) as image:
                modes.add(image.mode)
        except OSError:
            assert name.endswith("npy") or "tif" in name or name.startswith("array")
    in_files = {"1", "L", "La", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"}
    assert modes >= in_files


def test_modes_that_occur_in_memory_only():
    hsv = noise(6, 7, 3, seed=3)
    by_hand = [[np.array(colorsys.hsv_to_rgb(*pixel / 255)) * 255 for pixel in row] for row in hsv]
    assert np.abs(whole_pixels(Picture(Image.fromarray(hsv, "HSV"))) - np.array(by_hand)).max() <= 2
    pa = palette_image().convert("RGBA")
    pa.putalpha(Image.fromarray(ALPHA))
    pa = pa.convert("PA")
    colors = np.asarray(pa.convert("RGBA"))[..., :3]
    assert np.abs(whole_pixels(Picture(pa)) - over_white(colors, ALPHA)).max() <= 1
    rgb = np.minimum(RGB, ALPHA[..., None])
    premultiplied = Image.frombytes("RGBa", (13, 9), np.dstack([rgb, ALPHA]).tobytes())
    assert np.abs(whole_pixels(Picture(premultiplied)) - (rgb + 255.0 - ALPHA[..., None])).max() <= 2
    spare = Image.frombytes("RGBX", (13, 9), np.dstack([RGB, ALPHA]).tobytes())
    assert np.array_equal(whole_pixels(Picture(spare)), RGB)


def test_channels_are_detected(tmp_path):
    """1 for gray of every kind, 3 for color, its count for bands."""
    ramp = Image.fromarray(INDICES, "P")
    ramp.putpalette(np.repeat(np.arange(5, dtype=np.uint8) * 40, 3).tobytes())
    ramp.save(tmp_path / "gray-palette.png")
    assert open_picture(record(tmp_path / "gray-palette.png"), None).channels == 1
    expected = {
        "1.png": 1,
        "l.jpg": 1,
        "la.tif": 1,
        "16-big.tif": 1,
        "float.pfm": 1,
        "gray.npy": 1,
        "float64.tif": 1,
        "rgb.jpg": 3,
        "p.gif": 3,
        "cmyk.jpg": 3,
        "rgba.png": 3,
        "lab.tif": 3,
        "color-first.npy": 3,
        "float-rgb.tif": 3,
        "rgbx.tif": 4,
        "2.tif": 2,
        "5.tif": 5,
        "10-planes.tif": 10,
        "bands.npy": 10,
    }
    for name, channels in expected.items():
        CORPUS[name][0](tmp_path / name)
        assert open_picture(record(tmp_path / name), None).channels == channels, name


def gray_of(rgb):
    """ITU-R 601 luma by hand; the last bit is a matter of rounding."""
    return rgb.astype(np.float64) @ (0.299, 0.587, 0.114)


def assert_close(actual, expected, within=1.0):
    assert actual.shape == expected.shape and actual.dtype == np.uint8
    assert np.abs(actual.astype(np.float64) - expected).max() <= within


def test_gray_and_color(tmp_path):
    gray, rgb = noise(7, 5), noise(7, 5, 3, seed=1)
    Image.fromarray(gray).save(tmp_path / "l.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    assert np.array_equal(pixels_of(tmp_path / "l.png", 1), gray)
    assert np.array_equal(pixels_of(tmp_path / "l.png"), np.stack([gray] * 3, axis=-1))
    assert np.array_equal(pixels_of(tmp_path / "rgb.png"), rgb)
    assert_close(pixels_of(tmp_path / "rgb.png", 1), gray_of(rgb))
    data = (tmp_path / "rgb.png").read_bytes()
    assert np.array_equal(np.asarray(read_image({"path": None, "bytes": data}, 3)), rgb)


def test_bilevel(tmp_path):
    bits = noise(9, 11) > 127
    Image.fromarray(bits).save(tmp_path / "1.png")
    assert Image.open(tmp_path / "1.png").mode == "1"
    assert np.array_equal(pixels_of(tmp_path / "1.png", 1), bits * np.uint8(255))


def test_transparency_is_laid_over_white(tmp_path):
    rgb, gray, alpha = noise(8, 8, 3), noise(8, 8, seed=1), noise(8, 8, seed=2)
    alpha[0], alpha[1] = 0, 255
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([gray, alpha]), "LA").save(tmp_path / "la.png")
    assert [Image.open(tmp_path / name).mode for name in ("rgba.png", "la.png")] == ["RGBA", "LA"]
    shown = pixels_of(tmp_path / "rgba.png")
    assert (shown[0] == 255).all() and np.array_equal(shown[1], rgb[1])
    assert_close(shown, over_white(rgb, alpha))
    assert_close(pixels_of(tmp_path / "la.png", 1), over_white(gray[..., None], alpha)[..., 0], within=1.5)


def test_palette_with_and_without_transparency(tmp_path):
    palette, indices = noise(4, 3, seed=5), noise(6, 6) % 4
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "one.png", transparency=2)
    image.save(tmp_path / "each.png", transparency=bytes([0, 100, 255, 30]))
    image.save(tmp_path / "p.gif", transparency=1)
    rgb = palette[indices]
    assert Image.open(tmp_path / "one.png").mode == "P"
    assert np.array_equal(pixels_of(tmp_path / "p.png"), rgb)
    assert np.array_equal(pixels_of(tmp_path / "one.png"), np.where((indices == 2)[..., None], 255, rgb))
    assert np.array_equal(pixels_of(tmp_path / "p.gif"), np.where((indices == 1)[..., None], 255, rgb))
    assert_close(pixels_of(tmp_path / "each.png"), over_white(rgb, np.array([0, 100, 255, 30])[indices]))


def test_one_transparent_color(tmp_path):
    """PNG's tRNS in gray and RGB files: that color is transparent, others are not."""
    gray, rgb = noise(6, 6), noise(6, 6, 3, seed=1)
    Image.fromarray(gray).save(tmp_path / "l.png", transparency=int(gray[2, 3]))
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=tuple(map(int, rgb[1, 4])))
    assert np.array_equal(pixels_of(tmp_path / "l.png", 1), np.where(gray == gray[2, 3], 255, gray))
    transparent = (rgb == rgb[1, 4]).all(axis=-1, keepdims=True)
    assert np.array_equal(pixels_of(tmp_path / "rgb.png"), np.where(transparent, 255, rgb))


def test_cmyk(tmp_path):
    inks = noise(8, 8, 4)
    Image.fromarray(inks, "CMYK").save(tmp_path / "cmyk.tif")
    assert Image.open(tmp_path / "cmyk.tif").mode == "CMYK"
    white, ink = 255 - inks[..., :3].astype(np.float64), inks[..., 3:].astype(np.float64)
    assert_close(pixels_of(tmp_path / "cmyk.tif"), white * (255 - ink) / 255)


@pytest.mark.parametrize(
    "name, kind", [("16.png", np.uint16), ("16.tif", np.uint16), ("32.tif", np.int32), ("f.tif", np.float32)]
)
def test_deep_images_are_scaled_by_their_range(tmp_path, name, kind):
    values = np.random.default_rng(0).uniform(300, 40_000, (9, 7))
    values = (values / 1e4 - 2 if kind is np.float32 else values).astype(kind)
    Image.fromarray(values).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode[0] in "IF"
    low, high = values.min().astype(np.float64), values.max().astype(np.float64)
    shown = pixels_of(tmp_path / name, 1)
    assert_close(shown, (values - low) / (high - low) * 255, within=0.5 + 1e-4)
    assert shown.min() == 0 and shown.max() == 255
    assert np.array_equal(pixels_of(tmp_path / name)[..., 1], shown)


def test_deep_images_without_contrast_and_with_holes(tmp_path):
    Image.fromarray(np.full((4, 4), 777, dtype=np.uint16)).save(tmp_path / "flat.png")
    assert (pixels_of(tmp_path / "flat.png", 1) == 0).all()
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    values[1, 1] = np.nan
    Image.fromarray(values).save(tmp_path / "hole.tif")
    shown = pixels_of(tmp_path / "hole.tif", 1)
    assert shown[1, 1] == 0 and shown[3, 3] == 255 and shown[2, 0] == round(8 / 15 * 255)


def test_deep_color_keeps_its_upper_8_bits(tmp_path):
    """Unlike deep gray it is not scaled by the image's range."""
    import tifffile

    values = noise(6, 10, 3, kind=np.uint16) // 4
    tifffile.imwrite(tmp_path / "deep.tif", values, photometric="rgb")
    np.testing.assert_array_equal(pixels_of(tmp_path / "deep.tif", 3), values >> 8)


@pytest.mark.parametrize("name", ["pages.tif", "frames.gif", "frames.png"])
def test_the_first_page_or_frame_is_read(tmp_path, name):
    first, second = (Image.fromarray(np.full((6, 10), level, dtype=np.uint8)) for level in (10, 200))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    assert (pixels_of(tmp_path / name, 1) == 10).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """A picture stored in this orientation comes out upright, pixel by pixel."""
    upright = noise(6, 10, 3, seed=orientation)
    oriented(upright, orientation)(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").getexif()[0x0112] == orientation
    assert np.array_equal(pixels_of(tmp_path / "x.png"), upright)
