"""Unreadable files: each is refused with its reason, no other exception is raised, and no file stays open."""

import contextlib
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
from image_corpus import BANDS, BLOCKS, CORPUS, RGB
from image_files import array, broken_files, jpeg_bytes, noise, photo, record, saved, whole_pixels
from PIL import Image

from simmim.data import UNREADABLE, describe_error, open_picture, read_image

pytest.importorskip("tifffile")


def cut(name, share):
    def write(path):
        CORPUS[name][0](path)
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
RANDOM_BYTES = noise(5000, seed=11).tobytes()
# File name: how to write it, channels asked for, the reason.
REFUSED = {
    **{f"cut-{part}-{name}": (cut(name, part), CORPUS[name][1], "") for name in CUT_SHORT for part in (0.02, 0.3, 0.9)},
    **{f"noise.{kind}": (raw(RANDOM_BYTES), 3, "^not an image$") for kind in ("jpg", "png", "gif", "tif", "npy", "tga")},
    "noisy.jpg": (raw(b"\xff\xd8\xff\xe0" + RANDOM_BYTES), 3, "^JPEG file with a broken header$|(?i:truncated)"),
    "noisy.png": (raw(b"\x89PNG\r\n\x1a\n" + RANDOM_BYTES), 3, "^PNG file with a broken header$|broken PNG file"),
    "noisy.tif": (raw(b"II*\0" + RANDOM_BYTES), 3, ""),
    "noisy.npy": (raw(b"\x93NUMPY\1\0" + RANDOM_BYTES), 3, ""),
    "without-signature.tga": (saved(RGB), 3, "^not an image$"),  # without a signature any noise would pass for an image
    "needs-ghostscript.eps": (saved(RGB), 3, "^not an image$"),
    "text.jpg": (raw(b"no picture, whatever its name says"), 3, "^not an image$"),
    "empty.jpg": (raw(b""), 3, "^empty file$"),
    "empty.npy": (raw(b""), 10, "^empty file$"),
    "x.jpg": (lambda path: path.mkdir(), 3, "^a folder, not a file$"),
    "pipe.jpg": (lambda path: os.mkfifo(path), 3, "^not a regular file$"),
    "gone.jpg": (lambda path: None, 3, "^No such file or directory$"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere"), 3, "^No such file or directory$"),
    "iphone.heic": (raw(b"\0\0\0\x24ftypheic" + RANDOM_BYTES), 3, "^(Invalid input|HEIC image: pip install)"),
    "bomb.png": (
        raw(png_header(60_000, 60_000)),
        3,
        r"^60000x60000 = 3600000000 pixels \(height x width\), more than the limit of 200000000$",
    ),
    "bomb.ppm": (raw(b"P5 20000 20000 255 "), 3, r"400000000 pixels \(height x width\), more than the limit of 200000000$"),
    "zero.ppm": (raw(b"P6 0 0 255 "), 3, ""),
    "zero.png": (raw(png_header(0, 5)), 3, ""),
    "zero.npy": (array(np.zeros((0, 5))), 1, r"^an image of 0x5 pixels \(height x width\)$"),
    "zero-bands.npy": (array(np.zeros((7, 8, 0))), 3, ""),
    "text.npy": (array(np.array([["a", "b"]])), 1, "^holds <U1 values, not real numbers$"),
    "complex.npy": (array(np.ones((4, 4), complex)), 1, "^holds complex128 values, not real numbers$"),
    "objects.npy": (array(np.array([[{}, {}]], dtype=object)), 1, "allow_pickle|Python objects"),
    "flat.npy": (array(np.zeros(9)), 1, "^an array of 1 dimensions, expected 2 or 3$"),
    "video.npy": (array(np.zeros((2, 3, 4, 5))), 3, "^an array of 4 dimensions, expected 2 or 3$"),
    "4.npy": (array(BANDS[..., :4]), 10, "^has 4 channels, expected 10$"),
    "4-for-3.npy": (array(BANDS[..., :4]), 3, "^has 4 channels, expected 3$"),
    "5-for-3.tif": (CORPUS["5.tif"][0], 3, "^has 5 channels, expected 3$"),
    "2-for-1.tif": (CORPUS["2.tif"][0], 1, "^has 2 channels, expected 1$"),
    "10-for-4.tif": (CORPUS["10.tif"][0], 4, "^has 10 channels, expected 4$"),
    "3-for-10.png": (CORPUS["rgb.png"][0], 10, "^has 3 channels, expected 10$"),
    "3-for-10.jpg": (CORPUS["rgb.jpg"][0], 10, "^has 3 channels, expected 10$"),
    "1-for-2.png": (CORPUS["l.png"][0], 2, "^has 1 channel, expected 2$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_files_are_refused_with_their_reason(tmp_path, name):
    """Never a picture that is gray below the break; the reason is one line without an address in memory."""
    write, channels, message = REFUSED[name]
    write(tmp_path / name)
    records = [record(tmp_path / name)]
    if (tmp_path / name).is_file():
        records.append({"path": name, "bytes": (tmp_path / name).read_bytes()})
    for each in records:
        with pytest.raises(UNREADABLE) as caught:
            whole_pixels(open_picture(each, channels))
        line = describe_error(caught.value)
        assert line and "\n" not in line and " at 0x" not in line and len(line) < 300
        assert re.search(message, line), line


@pytest.mark.parametrize("name", CUT_SHORT)
def test_a_cut_file_is_refused_or_whole(tmp_path, name):
    """Cut at 60 points and at each of the last 15 bytes."""
    CORPUS[name][0](tmp_path / name)
    data, channels = (tmp_path / name).read_bytes(), CORPUS[name][1]
    whole = whole_pixels(open_picture({"path": None, "bytes": data}, channels))
    refused = 0
    for length in {*np.linspace(0, len(data) - 1, 60).astype(int), *range(len(data) - 15, len(data))}:
        try:
            assert np.array_equal(whole_pixels(open_picture({"path": None, "bytes": data[:length]}, channels)), whole)
        except UNREADABLE:
            refused += 1
    assert refused >= 55


def test_a_cut_photo_is_refused_by_a_coarse_crop(tmp_path):
    data = jpeg_bytes(photo(600, 800))
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

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, who may read every file
    with pytest.raises(UNREADABLE) as caught:
        open_picture(record(tmp_path / "y.png"), 3)
    assert describe_error(caught.value) == "Permission denied"
    with pytest.raises(UNREADABLE, match="neither bytes nor a path"):
        open_picture({"path": None, "bytes": None}, 3)


def test_only_our_limit_of_pixels_applies(tmp_path, monkeypatch):
    """Pillow's own limit neither warns nor raises below ours, in any thread, and is restored afterwards."""
    for name in ("x.png", "x.jpg", "x.tif", "x.npy"):
        (array(RGB) if name == "x.npy" else saved(RGB))(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            records = [record(tmp_path / name) for name in ("x.png", "x.jpg", "x.tif", "x.npy")] * 20
            shapes = list(pool.map(lambda each: whole_pixels(open_picture(each, 3, max_pixels=117)).shape, records))
        assert set(shapes) == {(9, 13, 3)} and list(warnings.filters) == before
    assert Image.MAX_IMAGE_PIXELS == 10
    for name in ("x.png", "x.jpg", "x.tif", "x.npy"):
        with pytest.raises(UNREADABLE, match=r"9x13 = 117 pixels \(height x width\), more than the limit of 116"):
            open_picture(record(tmp_path / name), 3, max_pixels=116)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_without_tifffile(tmp_path, monkeypatch):
    CORPUS["10.tif"][0](tmp_path / "10.tif")
    CORPUS["rgb.tif"][0](tmp_path / "rgb.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UNREADABLE, match=r"^needs tifffile: pip install tifffile$"):
        open_picture(record(tmp_path / "10.tif"), 10)
    assert np.array_equal(whole_pixels(open_picture(record(tmp_path / "rgb.tif"), 3)), RGB)


def test_an_error_of_the_caller_is_raised_as_it_is(tmp_path):
    """A mistake in a view must end a run, not fill its list of skipped images."""
    Image.fromarray(RGB).save(tmp_path / "x.png")
    with pytest.raises(TypeError):
        open_picture(record(tmp_path / "x.png"), 3).crop(None, (4, 4))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_no_file_stays_open(tmp_path):
    for name in ("rgb.jpg", "rgb.png", "10.tif", "rgb.tif", "phone.mpo", "bands.npy", "animation.gif"):
        CORPUS[name][0](tmp_path / name)
    (tmp_path / "text.jpg").write_text("no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else None
        for path in tmp_path.iterdir():
            for limit in (1, 10**6):
                with contextlib.suppress(*UNREADABLE):  # a refused file must be closed too
                    picture = open_picture(record(path), CORPUS.get(path.name, (0, 3))[1], max_pixels=limit)
                    picture.crop((0, 0, 4, 4), (4, 4))
                    open_picture(record(path), CORPUS.get(path.name, (0, 3))[1])  # never cropped
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
def test_mutated_files_raise_no_other_exception(tmp_path, name):
    """With bytes changed and removed at random: opening gives a picture or raises one of `UNREADABLE`."""
    CORPUS[name][0](tmp_path / name)
    data, channels = (tmp_path / name).read_bytes(), CORPUS[name][1]
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
            assert picture.crop((0, 0, *picture.size[::-1]), (8, 8)).shape == (picture.channels, 8, 8)
        except UNREADABLE as error:
            assert "\n" not in describe_error(error)


def test_broken_files_are_unreadable(tmp_path):
    paths = [*broken_files(tmp_path), str(tmp_path / "gone.png")]
    assert len(paths) == 7
    for path in paths:
        with pytest.raises(UNREADABLE):
            read_image(record(path), 3)


def test_decompression_bombs_are_unreadable(tmp_path):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    with pytest.raises(UNREADABLE, match=r"10000 pixels .*, more than the limit of 9999"):
        open_picture(record(tmp_path / "bomb.png"), 1, max_pixels=9999)
