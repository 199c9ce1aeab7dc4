"""Decoding, held by pixels known before they were written: every mode and format, broken files of every kind, crops."""

import colorsys
import contextlib
import io
import os
import random
import re
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data import UNREADABLE, dataset_from_paths, describe_error, measure_images, open_picture, read_image
from simmim.data.decode import TURNS, JpegPicture, Picture, stored_box

tifffile = pytest.importorskip("tifffile")


def noise(*shape, seed=0, kind=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max + 1, shape, dtype=kind)


def flat_blocks(*channels, seed=0):
    """32x48 pixels in flat squares of 16: what lossy formats keep within a few levels."""
    return np.random.default_rng(seed).integers(30, 226, (2, 3, *channels), dtype=np.uint8).repeat(16, 0).repeat(16, 1)


GRAY, RGB, ALPHA, INKS = noise(9, 13), noise(9, 13, 3, seed=1), noise(9, 13, seed=2), noise(9, 13, 4, seed=3)
BLOCKS, GRAY_BLOCKS = flat_blocks(3), flat_blocks(seed=4)
PALETTE, INDICES = noise(5, 3, seed=5), noise(9, 13, seed=6) % 5
DEEP, FLOATS = noise(9, 13, seed=7, kind=np.uint16) // 3 + 500, np.random.default_rng(8).normal(0, 3, (9, 13))
BANDS = noise(12, 14, 10, seed=9)


def over_white(values, alpha):
    alpha = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return values * alpha + 255 * (1 - alpha)


def by_range(values, low=None, high=None):
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min() if low is None else low, values.max() if high is None else high
    return (values - low) / (high - low) * 255


def palette_image():
    image = Image.fromarray(INDICES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def lab_of(rgb):
    """CIE L*a*b* of sRGB values by the published formulas, white D50, as the bytes of mode LAB."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = (
        linear
        @ np.array(
            [
                [0.4360747, 0.3850649, 0.1430804],
                [0.2225045, 0.7168786, 0.0606169],
                [0.0139322, 0.0971045, 0.7141733],
            ]
        ).T
        / (0.96422, 1.0, 0.82521)
    )
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    lab = np.stack([(116 * y - 16) * 2.55, 500 * (x - y), 200 * (y - z)], axis=-1)
    return lab.round().astype(int).astype(np.uint8)  # a* and b* are signed bytes


def ycbcr_of(rgb):
    """JFIF's formulas."""
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, 128 + 0.564334 * (blue - luma), 128 + 0.713267 * (red - luma)], -1).round().astype(np.uint8)


def saved(pixels, mode=None, **options):
    """Writes by Pillow, of copies: some of its formats leave their settings in the image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    more = [frame.copy() for frame in options.pop("append_images", ())]
    return lambda path: image.copy().save(path, **options, **({"append_images": more} if more else {}))


def tiff(pixels, **options):
    return lambda path: tifffile.imwrite(path, pixels, **options)


def array(values):
    def write(path):
        with open(path, "wb") as file:
            np.save(file, values)

    return write


def oriented(upright, number, **options):
    exif = Image.Exif()
    exif[0x0112] = number
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[number]
    return saved(np.ascontiguousarray(stored), exif=exif, **options)


CMY = (255.0 - BLOCKS[..., :3]).astype(np.uint8)
CMYK_BLOCKS = np.dstack([CMY, GRAY_BLOCKS // 4])
CMYK_SHOWN = BLOCKS * (255.0 - (GRAY_BLOCKS // 4)[..., None]) / 255
HOLES = FLOATS.astype(np.float32)
HOLES[0, :3] = np.nan, np.inf, -np.inf
HOLES_SHOWN = by_range(HOLES, HOLES[np.isfinite(HOLES)].min(), HOLES[np.isfinite(HOLES)].max())
HOLES_SHOWN[0, :3] = 0, 255, 0
FRAMES = [Image.fromarray(flat_blocks(3, seed=seed)) for seed in (20, 21, 22)]
EXACT = {"quality": 100, "subsampling": 0}

# File name: how to write it, channels asked for, what must be seen, within how many levels.
READ = {
    "1.png": (saved(GRAY > 127), 1, (GRAY > 127) * 255, 0),
    "1.tif": (saved(GRAY > 127), 1, (GRAY > 127) * 255, 0),
    "1-group4.tif": (saved(GRAY > 127, compression="group4"), 3, (GRAY > 127) * 255, 0),
    "l.png": (saved(GRAY), 1, GRAY, 0),
    "l-as-color.png": (saved(GRAY), 3, GRAY, 0),
    "l.jpg": (saved(GRAY_BLOCKS, **EXACT), 1, GRAY_BLOCKS, 2),
    "l-as-color.jpg": (saved(GRAY_BLOCKS, **EXACT), 3, GRAY_BLOCKS, 2),
    "l.pgm": (saved(GRAY), 1, GRAY, 0),
    "l.bmp": (saved(GRAY), 1, GRAY, 0),
    "l.gif": (saved(GRAY), 3, GRAY, 0),
    "white-is-0.tif": (tiff(GRAY, photometric="miniswhite"), 1, 255 - GRAY, 0),
    "la.png": (saved(np.dstack([GRAY, ALPHA]), "LA"), 1, over_white(GRAY[..., None], ALPHA), 1.5),
    "la.tif": (saved(np.dstack([GRAY, ALPHA]), "LA"), 3, over_white(GRAY[..., None], ALPHA), 1.5),
    "la-premultiplied.tif": (
        tiff(np.dstack([np.minimum(GRAY, ALPHA), ALPHA]), photometric="minisblack", extrasamples=[1]),
        1,
        np.minimum(GRAY, ALPHA) + 255.0 - ALPHA,
        2,
    ),
    "p.png": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p.tif": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p.bmp": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p.gif": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p-clear.png": (saved(palette_image(), transparency=2), 3, over_white(PALETTE[INDICES], (INDICES != 2) * 255), 0),
    "p-clear.gif": (saved(palette_image(), transparency=1), 3, over_white(PALETTE[INDICES], (INDICES != 1) * 255), 0),
    "p-alphas.png": (
        saved(palette_image(), transparency=bytes([0, 90, 255, 30, 128])),
        3,
        over_white(PALETTE[INDICES], np.array([0, 90, 255, 30, 128])[INDICES]),
        1,
    ),
    "rgb.png": (saved(RGB), 3, RGB, 0),
    "rgb-as-gray.png": (saved(RGB), 1, RGB @ (0.299, 0.587, 0.114), 1),
    "rgb.bmp": (saved(RGB), 3, RGB, 0),
    "rgb.ppm": (saved(RGB), 3, RGB, 0),
    "rgb.tif": (saved(RGB), 3, RGB, 0),
    "rgb-lzw.tif": (saved(RGB, compression="tiff_lzw"), 3, RGB, 0),
    "rgb-planes.tif": (tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), 3, RGB, 0),
    "rgb-tiles.tif": (tiff(RGB, photometric="rgb", tile=(16, 16)), 3, RGB, 0),
    "rgb.webp": (saved(RGB, lossless=True), 3, RGB, 0),
    "rgb.jp2": (saved(RGB), 3, RGB, 0),
    "rgb.qoi": (saved(RGB), 3, RGB, 0),
    "rgb.sgi": (saved(RGB), 3, RGB, 0),
    "rgb.jpg": (saved(BLOCKS, **EXACT), 3, BLOCKS, 3),
    "rgb-as-gray.jpg": (saved(BLOCKS, **EXACT), 1, BLOCKS @ (0.299, 0.587, 0.114), 3),
    "progressive.jpg": (saved(BLOCKS, progressive=True, **EXACT), 3, BLOCKS, 3),
    "stored-as-rgb.jpg": (saved(BLOCKS, keep_rgb=True, **EXACT), 3, BLOCKS, 3),
    "phone.mpo": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:], **EXACT), 3, np.asarray(FRAMES[0]), 3),
    "rgb-clear.png": (
        saved(RGB, transparency=tuple(map(int, RGB[3, 4]))),
        3,
        np.where((RGB == RGB[3, 4]).all(-1, keepdims=True), 255, RGB),
        0,
    ),
    "l-clear.png": (saved(GRAY, transparency=int(GRAY[3, 4])), 1, np.where(GRAY == GRAY[3, 4], 255, GRAY), 0),
    "rgba.png": (saved(np.dstack([RGB, ALPHA])), 3, over_white(RGB, ALPHA), 1),
    "rgba.tif": (saved(np.dstack([RGB, ALPHA])), 3, over_white(RGB, ALPHA), 1),
    "rgba.webp": (saved(np.dstack([RGB, ALPHA]), lossless=True, exact=True), 3, over_white(RGB, ALPHA), 1),
    "rgba-premultiplied.tif": (
        tiff(np.dstack([np.minimum(RGB, ALPHA[..., None]), ALPHA]), photometric="rgb", extrasamples=[1]),
        3,
        np.minimum(RGB, ALPHA[..., None]) + 255.0 - ALPHA[..., None],
        2,
    ),
    "rgba-as-4.png": (saved(np.dstack([RGB, ALPHA])), 4, np.dstack([RGB, ALPHA]), 0),
    "rgbx.tif": (tiff(np.dstack([RGB, ALPHA]), photometric="rgb", extrasamples=[0]), 3, RGB, 0),
    "rgbx-as-4.tif": (
        tiff(np.dstack([RGB, ALPHA]), photometric="rgb", extrasamples=[0]),
        4,
        np.dstack([RGB, ALPHA]),
        0,
    ),
    "cmyk.tif": (saved(INKS, "CMYK"), 3, (255.0 - INKS[..., :3]) * (255.0 - INKS[..., 3:]) / 255, 1),
    "cmyk.jpg": (saved(CMYK_BLOCKS, "CMYK", quality=100), 3, CMYK_SHOWN, 4),
    "ycbcr.tif": (saved(ycbcr_of(BLOCKS), "YCbCr"), 3, BLOCKS, 2),
    "lab.tif": (saved(Image.frombytes("LAB", (48, 32), lab_of(BLOCKS).tobytes())), 3, BLOCKS, 8),  # coarse
    "16.png": (saved(DEEP), 1, by_range(DEEP), 0.51),
    "16.pgm": (saved(DEEP), 1, by_range(DEEP), 0.51),
    "16-little.tif": (tiff(DEEP, byteorder="<"), 1, by_range(DEEP), 0.51),
    "16-big.tif": (tiff(DEEP, byteorder=">"), 3, by_range(DEEP), 0.51),
    "16-white-is-0.tif": (tiff(DEEP, photometric="miniswhite"), 1, 255 - by_range(DEEP), 0.51),
    "16-signed.tif": (tiff((DEEP - 9000).astype(np.int16)), 1, by_range((DEEP - 9000).astype(np.int16)), 0.51),
    "16-clear.png": (
        saved(DEEP, transparency=int(DEEP.max())),
        1,
        np.where(DEEP == DEEP.max(), 255, by_range(DEEP, high=np.sort(DEEP.ravel())[-2])),
        0.51,
    ),
    "32.tif": (saved(DEEP.astype(np.int32) * 70_000 - 10**9), 1, by_range(DEEP), 0.51),
    "32-unsigned.tif": (tiff(DEEP.astype(np.uint32) * 60_000), 1, by_range(DEEP), 0.51),
    "float.tif": (saved(FLOATS.astype(np.float32)), 1, by_range(FLOATS), 0.51),
    "float-big.tif": (tiff(FLOATS.astype(np.float32), byteorder=">"), 1, by_range(FLOATS), 0.51),
    "float64.tif": (tiff(FLOATS), 3, by_range(FLOATS), 0.51),
    "float.pfm": (saved(FLOATS.astype(np.float32)), 1, by_range(FLOATS), 0.51),
    "float-holes.tif": (saved(HOLES), 1, HOLES_SHOWN, 0.51),
    "float-rgb.tif": (tiff(np.float32(RGB) / 7 - 3, photometric="rgb"), 3, by_range(RGB), 0.51),
    "flat-16.png": (saved(np.full((5, 6), 777, np.uint16)), 1, np.zeros((5, 6)), 0),
    "animation.gif": (
        saved(palette_image(), save_all=True, append_images=[Image.new("P", (13, 9))]),
        3,
        PALETTE[INDICES],
        0,
    ),
    "animation.png": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), 3, np.asarray(FRAMES[0]), 0),
    "animation.webp": (
        saved(FRAMES[0], save_all=True, append_images=FRAMES[1:], lossless=True),
        3,
        np.asarray(FRAMES[0]),
        0,
    ),
    "pages.tif": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), 3, np.asarray(FRAMES[0]), 0),
    "png-called.jpg": (lambda path: Image.fromarray(RGB).save(path, "PNG"), 3, RGB, 0),
    "jpeg-called.png": (lambda path: Image.fromarray(BLOCKS).save(path, "JPEG", **EXACT), 3, BLOCKS, 3),
    "no-extension": (lambda path: Image.fromarray(RGB).save(path, "BMP"), 3, RGB, 0),
    "array-called.jpg": (array(RGB), 3, RGB, 0),
    "one-pixel.png": (saved(RGB[:1, :1]), 3, RGB[:1, :1], 0),
    "gray.npy": (array(GRAY), 1, GRAY, 0),
    "gray-as-color.npy": (array(GRAY), 3, GRAY, 0),
    "color.npy": (array(RGB), 3, RGB, 0),
    "color-first.npy": (array(RGB.transpose(2, 0, 1)), 3, RGB, 0),
    "color-as-gray.npy": (array(RGB), 1, RGB @ (0.299, 0.587, 0.114), 1),
    "bands.npy": (array(BANDS), 10, BANDS, 0),
    "bands-first.npy": (array(BANDS.transpose(2, 0, 1)), 10, BANDS, 0),
    "bands-fortran.npy": (array(np.asfortranarray(BANDS)), 10, BANDS, 0),
    "bands-16.npy": (array(BANDS * np.uint16(100) + np.uint16(7)), 10, by_range(BANDS), 0.51),
    "bands-64.npy": (array(BANDS.astype(np.int64) * -(10**15)), 10, by_range(-1.0 * BANDS), 0.51),
    "bands-float.npy": (array(BANDS / 9.0 - 4), 10, by_range(BANDS), 0.51),
    "bands-huge.npy": (array((BANDS / 127.5 - 1) * 1.7e308), 10, by_range(BANDS), 0.51),
    "bands-half.npy": (array(BANDS.astype(np.float16)), 10, by_range(BANDS), 0.51),
    "bands-bool.npy": (array(BANDS > 99), 10, (BANDS > 99) * 255, 0),
    "bands-nan.npy": (array(np.dstack([HOLES, HOLES])), 2, np.dstack([HOLES_SHOWN, HOLES_SHOWN]), 0.51),
    "all-nan.npy": (array(np.full((4, 5), np.nan)), 1, np.zeros((4, 5)), 0),
    "big-endian.npy": (array(DEEP.astype(">u2")), 1, by_range(DEEP), 0.51),
    "2.tif": (tiff(BANDS[..., :2], photometric="minisblack", planarconfig="contig"), 2, BANDS[..., :2], 0),
    "5.tif": (tiff(BANDS[..., :5], photometric="rgb", planarconfig="contig"), 5, BANDS[..., :5], 0),
    "10.tif": (tiff(BANDS, photometric="minisblack", planarconfig="contig", compression="zlib"), 10, BANDS, 0),
    "10-planes.tif": (
        tiff(BANDS.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"),
        10,
        BANDS,
        0,
    ),
    "10-deep.tif": (
        tiff(BANDS * np.uint16(9), photometric="minisblack", planarconfig="contig", tile=(16, 16)),
        10,
        by_range(BANDS),
        0.51,
    ),
    "10-turned.tif": (
        tiff(BANDS, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 6, True)]),
        10,
        np.rot90(BANDS, -1),
        0,
    ),
    **{f"turned-{number}.jpg": (oriented(BLOCKS, number, **EXACT), 3, BLOCKS, 3) for number in range(1, 9)},
    **{f"turned-{number}.png": (oriented(RGB, number), 3, RGB, 0) for number in range(1, 9)},
    "turned-6.tif": (oriented(RGB, 6), 3, RGB, 0),
    "turned-7.webp": (oriented(RGB, 7, lossless=True), 3, RGB, 0),
}


def record(path):
    return {"path": str(path), "bytes": None}


def seen(picture):
    """All pixels of a picture, (height, width, channels)."""
    whole = picture.crop((0, 0, *picture.size), picture.size[::-1])
    assert whole.shape == (picture.channels, *picture.size[::-1])
    assert whole.dtype == torch.uint8 and whole.is_contiguous()
    return whole.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", READ)
def test_every_mode_and_format_shows_what_was_written(tmp_path, name):
    """From a path, from bytes, a second time, and kept in memory."""
    write, channels, expected, within = READ[name]
    write(tmp_path / name)
    expected = np.asarray(expected, dtype=np.float64)
    expected = expected[..., None] if expected.ndim == 2 else expected
    expected = np.broadcast_to(expected, (*expected.shape[:2], channels))
    from_bytes = {"path": name, "bytes": (tmp_path / name).read_bytes()}
    picture = open_picture(record(tmp_path / name), channels)
    for shown in (picture, picture, picture.decoded(), open_picture(from_bytes, channels)):
        assert shown.size == expected.shape[1::-1] and shown.channels == channels
        assert np.abs(seen(shown) - expected).max() <= within
    if channels in (1, 3):
        assert np.abs(np.asarray(read_image(from_bytes, channels)).reshape(expected.shape) - expected).max() <= within


def test_the_corpus_is_large_and_has_every_mode(tmp_path):
    assert len(READ) + len(REFUSED) >= 150
    modes = set()
    for name, (write, *_) in READ.items():
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
    assert np.abs(seen(Picture(Image.fromarray(hsv, "HSV"))) - np.array(by_hand)).max() <= 2
    pa = palette_image().convert("RGBA")
    pa.putalpha(Image.fromarray(ALPHA))
    pa = pa.convert("PA")
    colors = np.asarray(pa.convert("RGBA"))[..., :3]
    assert np.abs(seen(Picture(pa)) - over_white(colors, ALPHA)).max() <= 1
    rgb = np.minimum(RGB, ALPHA[..., None])
    premultiplied = Image.frombytes("RGBa", (13, 9), np.dstack([rgb, ALPHA]).tobytes())
    assert np.abs(seen(Picture(premultiplied)) - (rgb + 255.0 - ALPHA[..., None])).max() <= 2
    spare = Image.frombytes("RGBX", (13, 9), np.dstack([RGB, ALPHA]).tobytes())
    assert np.array_equal(seen(Picture(spare)), RGB)


def test_channels_are_found(tmp_path):
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
        READ[name][0](tmp_path / name)
        assert open_picture(record(tmp_path / name), None).channels == channels, name


# --- refusals --------------------------------------------------------------------------------------------------------


def cut(name, share):
    def write(path):
        READ[name][0](path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return write


def raw(data):
    return lambda path: path.write_bytes(data)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


CUT_SHORT = (
    "rgb.jpg",
    "progressive.jpg",
    "cmyk.jpg",
    "rgb.png",
    "p.gif",
    "rgb.webp",
    "rgb-lzw.tif",
    "rgb.bmp",
    "rgb.ppm",
    "rgb.jp2",
    "10.tif",
    "10-planes.tif",
    "10-deep.tif",
    "bands.npy",
)
IGNORED_METRICS = noise(5000, seed=11).tobytes()

# File name: how to write it, channels asked for, the reason.
REFUSED = {
    **{f"cut-{part}-{name}": (cut(name, part), READ[name][1], "") for name in CUT_SHORT for part in (0.02, 0.3, 0.9)},
    **{f"noise.{kind}": (raw(IGNORED_METRICS), 3, "^not an image$") for kind in ("jpg", "png", "gif", "tif", "npy", "tga")},
    "noisy.jpg": (raw(b"\xff\xd8\xff\xe0" + IGNORED_METRICS), 3, "^JPEG file with a broken header$|(?i:truncated)"),
    "noisy.png": (raw(b"\x89PNG\r\n\x1a\n" + IGNORED_METRICS), 3, "^PNG file with a broken header$|broken PNG file"),
    "noisy.tif": (raw(b"II*\0" + IGNORED_METRICS), 3, ""),
    "noisy.npy": (raw(b"\x93NUMPY\1\0" + IGNORED_METRICS), 3, ""),
    "without-signature.tga": (saved(RGB), 3, "^not an image$"),  # in the same way noise would be an image
    "needs-ghostscript.eps": (saved(RGB), 3, "^not an image$"),
    "text.jpg": (raw(b"no picture, whatever its name says"), 3, "^not an image$"),
    "empty.jpg": (raw(b""), 3, "^empty file$"),
    "empty.npy": (raw(b""), 10, "^empty file$"),
    "x.jpg": (lambda path: path.mkdir(), 3, "^a folder, not a file$"),
    "pipe.jpg": (lambda path: os.mkfifo(path), 3, "^not a regular file$"),
    "gone.jpg": (lambda path: None, 3, "^No such file or directory$"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere"), 3, "^No such file or directory$"),
    "iphone.heic": (raw(b"\0\0\0\x24ftypheic" + IGNORED_METRICS), 3, "^HEIC image: convert it to JPEG or PNG$"),
    "bomb.png": (
        raw(png_header(60_000, 60_000)),
        3,
        "^60000x60000 = 3600000000 pixels, more than the limit of 200000000$",
    ),
    "bomb.ppm": (raw(b"P5 20000 20000 255 "), 3, "400000000 pixels, more than the limit of 200000000$"),
    "zero.ppm": (raw(b"P6 0 0 255 "), 3, ""),
    "zero.png": (raw(png_header(0, 5)), 3, ""),
    "zero.npy": (array(np.zeros((0, 5))), 1, "^an image of 5x0 pixels$"),
    "zero-bands.npy": (array(np.zeros((7, 8, 0))), 3, ""),
    "text.npy": (array(np.array([["a", "b"]])), 1, "^holds <U1 values, not real numbers$"),
    "complex.npy": (array(np.ones((4, 4), complex)), 1, "^holds complex128 values, not real numbers$"),
    "objects.npy": (array(np.array([[{}, {}]], dtype=object)), 1, "allow_pickle|Python objects"),
    "flat.npy": (array(np.zeros(9)), 1, "^an array of 1 dimensions, expected 2 or 3$"),
    "video.npy": (array(np.zeros((2, 3, 4, 5))), 3, "^an array of 4 dimensions, expected 2 or 3$"),
    "4.npy": (array(BANDS[..., :4]), 10, "^has 4 channels, expected 10$"),
    "4-for-3.npy": (array(BANDS[..., :4]), 3, "^has 4 channels, expected 3$"),
    "5-for-3.tif": (READ["5.tif"][0], 3, "^has 5 channels, expected 3$"),
    "2-for-1.tif": (READ["2.tif"][0], 1, "^has 2 channels, expected 1$"),
    "10-for-4.tif": (READ["10.tif"][0], 4, "^has 10 channels, expected 4$"),
    "3-for-10.png": (READ["rgb.png"][0], 10, "^has 3 channels, expected 10$"),
    "3-for-10.jpg": (READ["rgb.jpg"][0], 10, "^has 3 channels, expected 10$"),
    "1-for-2.png": (READ["l.png"][0], 2, "^has 1 channels, expected 2$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_files_are_refused_with_their_reason(tmp_path, name):
    """Never a picture that is gray below the break; one line, no address in memory."""
    write, channels, message = REFUSED[name]
    write(tmp_path / name)
    records = [record(tmp_path / name)]
    if (tmp_path / name).is_file():
        records.append({"path": name, "bytes": (tmp_path / name).read_bytes()})
    for each in records:
        with pytest.raises(UNREADABLE) as caught:
            seen(open_picture(each, channels))
        line = describe_error(caught.value)
        assert line and "\n" not in line and " at 0x" not in line and len(line) < 300
        assert re.search(message, line), line


@pytest.mark.parametrize("name", CUT_SHORT)
def test_a_cut_file_is_refused_or_whole(tmp_path, name):
    """At every one of 60 points and at the last bytes."""
    READ[name][0](tmp_path / name)
    data, channels = (tmp_path / name).read_bytes(), READ[name][1]
    whole = seen(open_picture({"path": None, "bytes": data}, channels))
    refused = 0
    for length in {*np.linspace(0, len(data) - 1, 60).astype(int), *range(len(data) - 15, len(data))}:
        try:
            assert np.array_equal(seen(open_picture({"path": None, "bytes": data[:length]}, channels)), whole)
        except UNREADABLE:
            refused += 1
    assert refused >= 55


def test_a_cut_photo_is_refused_by_a_coarse_crop_too(tmp_path):
    data = jpeg_bytes(photo(800, 600))
    for share in (0.3, 0.6, 0.9, 0.99):
        picture = open_picture({"path": None, "bytes": data[: int(len(data) * share)]}, 3)
        with pytest.raises(UNREADABLE, match="truncated"):
            picture.crop((0, 0, 100, 100), (20, 20))


def test_permission_refused_and_a_file_that_vanishes(tmp_path, monkeypatch):
    Image.fromarray(BLOCKS).save(tmp_path / "x.jpg")
    picture = open_picture(record(tmp_path / "x.jpg"), 3)
    first = picture.crop((0, 0, 48, 32), (16, 24))
    (tmp_path / "x.jpg").unlink()
    with pytest.raises(UNREADABLE) as caught:
        picture.crop((0, 0, 48, 32), (16, 24))
    assert describe_error(caught.value) == "No such file or directory" and first.shape == (3, 16, 24)
    Image.fromarray(RGB).save(tmp_path / "y.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "y.png"))

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, who is refused nothing
    with pytest.raises(UNREADABLE) as caught:
        open_picture(record(tmp_path / "y.png"), 3)
    assert describe_error(caught.value) == "Permission denied"
    with pytest.raises(UNREADABLE, match="neither bytes nor a path"):
        open_picture({"path": None, "bytes": None}, 3)


def test_the_limit_of_pixels_is_ours_alone(tmp_path, monkeypatch):
    """Pillow's own neither warns nor stops below ours, in any thread, and is as it was afterwards."""
    for name in ("x.png", "x.jpg", "x.tif", "x.npy"):
        (array(RGB) if name == "x.npy" else saved(RGB))(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            records = [record(tmp_path / name) for name in ("x.png", "x.jpg", "x.tif", "x.npy")] * 20
            shapes = list(pool.map(lambda each: seen(open_picture(each, 3, max_pixels=117)).shape, records))
        assert set(shapes) == {(9, 13, 3)} and list(warnings.filters) == before
    assert Image.MAX_IMAGE_PIXELS == 10
    for name in ("x.png", "x.jpg", "x.tif", "x.npy"):
        with pytest.raises(UNREADABLE, match=r"13x9 = 117 pixels, more than the limit of 116"):
            open_picture(record(tmp_path / name), 3, max_pixels=116)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_without_tifffile(tmp_path, monkeypatch):
    READ["10.tif"][0](tmp_path / "10.tif")
    READ["rgb.tif"][0](tmp_path / "rgb.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UNREADABLE, match=r"^needs tifffile: pip install tifffile$"):
        open_picture(record(tmp_path / "10.tif"), 10)
    assert np.array_equal(seen(open_picture(record(tmp_path / "rgb.tif"), 3)), RGB)


def test_an_error_of_the_caller_is_not_the_files(tmp_path):
    """A mistake in a view must end a run, not fill its list of skipped images."""
    Image.fromarray(RGB).save(tmp_path / "x.png")
    with pytest.raises(TypeError):
        open_picture(record(tmp_path / "x.png"), 3).crop(None, (4, 4))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_no_file_stays_open(tmp_path):
    for name in ("rgb.jpg", "rgb.png", "10.tif", "rgb.tif", "phone.mpo", "bands.npy", "animation.gif"):
        READ[name][0](tmp_path / name)
    (tmp_path / "text.jpg").write_text("no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else None
        for path in tmp_path.iterdir():
            for limit in (1, 10**6):
                with contextlib.suppress(*UNREADABLE):  # what is refused is to be closed too
                    picture = open_picture(record(path), READ.get(path.name, (0, 3))[1], max_pixels=limit)
                    picture.crop((0, 0, 4, 4), (4, 4))
                    open_picture(record(path), READ.get(path.name, (0, 3))[1])  # never cropped
        del picture
        assert before is None or os.listdir("/proc/self/fd") == before


FUZZED = (
    "rgb.jpg",
    "cmyk.jpg",
    "p-alphas.png",
    "16.png",
    "animation.gif",
    "rgb.webp",
    "rgb.bmp",
    "rgb-lzw.tif",
    "float.tif",
    "10.tif",
    "rgb.jp2",
    "bands-float.npy",
)


@pytest.mark.parametrize("name", FUZZED)
def test_mutated_files_raise_nothing_else(tmp_path, name):
    """Bytes changed, removed and added at random: a picture comes out or one of `UNREADABLE`."""
    READ[name][0](tmp_path / name)
    data, channels = (tmp_path / name).read_bytes(), READ[name][1]
    chance = random.Random(name)
    for _ in range(80):
        mutated = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 20))):
            where = chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 200))
            mutated[where] = chance.choice((0, 1, 128, 255, chance.randrange(256)))
        if chance.random() < 0.1:
            del mutated[chance.randrange(len(mutated)) :]
        try:
            picture = open_picture({"path": None, "bytes": bytes(mutated)}, chance.choice((channels, None)), 100_000)
            assert picture.crop((0, 0, *picture.size), (8, 8)).shape == (picture.channels, 8, 8)
        except UNREADABLE as error:
            assert "\n" not in describe_error(error)


# --- crops -----------------------------------------------------------------------------------------------------------


def photo(width, height, seed=0):
    """Noise with a photograph's spectrum, 1/f, and hard edges."""
    chance = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))
    phases = [np.exp(2j * np.pi * chance.random(amplitude.shape)) for _ in range(4)]
    layers = [np.fft.irfft2(amplitude * phase, (height, width)) for phase in phases]
    layers = [layer / layer.std() for layer in layers]
    pixels = np.stack([0.9 * layers[3] + 0.3 * layer for layer in layers[:3]], axis=-1)
    for _ in range(20):
        top, left = chance.integers(0, height), chance.integers(0, width)
        pixels[top : top + height // 5, left : left + width // 5] += chance.normal(0, 0.7, 3)
    return np.clip(128 + 50 * pixels, 0, 255).astype(np.uint8)


def jpeg_bytes(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def psnr(view, expected):
    return 10 * np.log10(255**2 / max(np.mean((view.double().numpy() - expected.astype(np.float64)) ** 2), 1e-9))


def plain_crop(data, box, size):
    """The usual way: all pixels decoded, cropped, resized."""
    with Image.open(io.BytesIO(data)) as image:
        view = image.convert("RGB").crop(box).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(view).transpose(2, 0, 1)


def test_coarse_decoding_against_full_decoding(monkeypatch):
    """Never fewer than 1.25 decoded pixels a target pixel, never twice as many as that needs, and 38 dB in any case."""
    data = jpeg_bytes(photo(1203, 901))
    scales = []
    load = JpegPicture._load
    monkeypatch.setattr(JpegPicture, "_load", lambda *given: scales.append((result := load(*given))[1]) or result)
    picture, chance = open_picture({"path": None, "bytes": data}, 3), random.Random(0)
    assert picture.size == (1203, 901)
    for size in ((192, 192), (96, 128), (64, 64), (400, 300), (900, 900)):
        for _ in range(4):
            width, height = chance.randint(300, 1203), chance.randint(300, 901)
            left, top = chance.randint(0, 1203 - width), chance.randint(0, 901 - height)
            box = (left, top, left + width, top + height)
            view = picture.crop(box, size)
            assert psnr(view, plain_crop(data, box, size)) > 38
            kept = min(width / size[1], height / size[0]) / scales[-1]
            assert scales[-1] == 1 or kept >= 1.25 * 0.999
            assert scales[-1] == 8 or kept < 2.5 * 1.02
    assert set(scales) == {1, 2, 4, 8}


def test_crops_of_one_picture_do_not_depend_on_each_other():
    data = jpeg_bytes(photo(640, 480))
    picture = open_picture({"path": None, "bytes": data}, 3)
    boxes = [(0, 0, 640, 480), (10, 20, 300, 200), (0, 0, 640, 480)]
    for box in boxes:
        fresh = open_picture({"path": None, "bytes": data}, 3)
        assert torch.equal(picture.crop(box, (48, 48)), fresh.crop(box, (48, 48)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("number", range(1, 9))
def test_crops_of_turned_pictures_are_those_of_the_upright(tmp_path, kind, number):
    upright = photo(640, 480, seed=number)
    oriented(upright, 1, format=kind, **EXACT)(tmp_path / "upright")
    oriented(upright, number, format=kind, **EXACT)(tmp_path / "turned")
    turned, original = open_picture(record(tmp_path / "turned"), 3), open_picture(record(tmp_path / "upright"), 3)
    assert turned.size == original.size == (640, 480)
    crops = (((64, 32, 320, 448), (48, 64)), ((0, 0, 640, 480), (60, 80)), ((500.5, 3.25, 640, 100), (64, 40)))
    for box, size in crops:
        view, expected = turned.crop(box, size), original.crop(box, size)
        # A turned JPEG is another file: its coefficients are rounded elsewhere.
        assert (view.int() - expected.int()).abs().max() <= (1 if kind == "PNG" else 6)
        assert kind == "PNG" or psnr(view, expected.numpy()) > 42


@pytest.mark.parametrize("number", TURNS)
def test_boxes_in_stored_pixels(number):
    """The box of each upright pixel holds that pixel in the stored picture."""
    stored = np.arange(15).reshape(3, 5)
    upright = np.asarray(Image.fromarray(stored.astype(np.uint8)).transpose(TURNS[number][0]))
    for top, left in np.ndindex(upright.shape):
        x0, y0, x1, y1 = stored_box((left, top, left + 1, top + 1), upright.shape[::-1], number)
        assert stored[y0:y1, x0:x1].tolist() == [[upright[top, left]]]


@pytest.mark.parametrize("box", [(0, 0, 90, 70), (3, 5, 77, 66), (2.25, 1.5, 60.75, 69.9), (40, 40, 44, 43)])
@pytest.mark.parametrize("size", [(16, 24), (70, 90), (100, 10)])
def test_bands_are_resized_as_colors_are(box, size):
    """Against Pillow's three at a time; the bands on disk, of any type, where a box may lie between pixels."""
    pixels = photo(90, 70)
    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=box))
    expected = expected.transpose(2, 0, 1)
    six = np.dstack([pixels, 255 - pixels])
    for values in (six, six.astype(np.float32) * 3 - 100, six.astype(np.uint16) * 200):
        file = io.BytesIO()
        np.save(file, values)
        view = open_picture({"path": None, "bytes": file.getvalue()}, 6).crop(box, size)
        assert view.shape == (6, *size)
        low, high = six.min(), six.max()
        scaled = expected if values is six else (expected - float(low)) * 255 / (high - low)
        assert np.abs(view[:3].numpy() - scaled).max() <= 2


@pytest.mark.parametrize("size", [(20, 24), (100, 130), (6, 5)])
def test_views_of_pictures_in_memory_are_the_usual_ones(size):
    pixels = photo(160, 130)
    for box in ((0, 0, 160, 130), (10, 20, 150, 95)):
        usual = np.asarray(Image.fromarray(pixels).crop(box).resize(size[::-1], Image.Resampling.BILINEAR))
        view = Picture(Image.fromarray(pixels)).crop(box, size)
        if size == (6, 5):  # from 8 pixels a target pixel on, whole pixels are averaged first
            assert psnr(view, usual.transpose(2, 0, 1)) > 34
        else:
            assert np.abs(view.permute(1, 2, 0).numpy() - usual.astype(int)).max() <= 1


def test_boxes_that_rounding_put_outside(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    picture = open_picture(record(tmp_path / "x.png"), 3)
    assert torch.equal(picture.crop((-1e-9, 0, 13 + 1e-9, 9.0000001), (9, 13)), picture.crop((0, 0, 13, 9), (9, 13)))
    for box in ((5, 5, 5, 6), (-3, 0, 4, 4), (0, 0, 20, 9), (8, 0, 2, 9)):
        with pytest.raises(ValueError, match="no box of a picture of 13x9 pixels"):
            picture.crop(box, (4, 4))


# --- image statistics ----------------------------------------------------------------------------------------------------


def survey_of(folder, **arguments):
    return measure_images(dataset_from_paths(sorted(map(str, folder.iterdir()))), **arguments)


def test_survey_finds_channels_and_their_statistics(tmp_path):
    bands = [noise(20 + number, 30, 6, seed=number) // (number + 1) for number in range(3)]
    for number, values in enumerate(bands):
        write = array(values) if number else tiff(values, photometric="minisblack", planarconfig="contig")
        write(tmp_path / f"{number}.tif")
    found = survey_of(tmp_path)
    values = np.concatenate([each.reshape(-1, 6) for each in bands]) / 255
    assert (found.channels, found.sizes) == (6, ((30, 20), (30, 21), (30, 22)))
    assert found.mean == pytest.approx(values.mean(axis=0), abs=6e-4)
    assert found.std == pytest.approx(values.std(axis=0), abs=6e-4)
    assert found.decoded_mib == pytest.approx(6 * 30 * 63 / 2**20)
    assert survey_of(tmp_path, channels=6) == found
    with pytest.raises(ValueError, match=r"none of 3 .*0\.tif: has 6 channels, expected 3"):
        survey_of(tmp_path, channels=3)


def test_survey_names_files_that_differ_in_channels(tmp_path):
    array(BANDS)(tmp_path / "a.npy")
    READ["rgb.png"][0](tmp_path / "b.png")
    READ["l.png"][0](tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"^images differ in channels: .*a\.npy has 10, .*c\.png has 1$"):
        survey_of(tmp_path)
    assert survey_of(tmp_path, channels=3).sizes == ((13, 9), (13, 9))
    (tmp_path / "a.npy").unlink()
    found = survey_of(tmp_path)
    values = np.concatenate([RGB.reshape(-1, 3), GRAY.reshape(-1, 1).repeat(3, 1)]) / 255
    assert found.channels == 3 and found.mean == pytest.approx(values.mean(axis=0), abs=6e-4)


def test_survey_decodes_photos_coarsely(tmp_path, monkeypatch):
    scales = []
    load = JpegPicture._load
    monkeypatch.setattr(JpegPicture, "_load", lambda *given: scales.append((result := load(*given))[1]) or result)
    pixels = photo(1600, 1200)
    oriented(pixels, 6, quality=90)(tmp_path / "x.jpg")
    found = survey_of(tmp_path)
    assert scales == [8] and found.sizes == ((1600, 1200),) and found.short_side_px == 1200
    assert found.mean == pytest.approx(pixels.reshape(-1, 3).mean(axis=0) / 255, abs=0.01)
