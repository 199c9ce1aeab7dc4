"""Crops of pictures: against full decoding, of turned pictures, of several bands, of boxes that rounding has moved."""

import io
import random

import numpy as np
import pytest
import torch
from image_corpus import RGB
from image_files import EXACT, jpeg_bytes, oriented, photo, psnr, record
from PIL import Image

from simmim.data import Picture, open_picture
from simmim.data.orientation import ORIENTATIONS, stored_box


def plain_crop(data, box, size):
    """The plain way: all pixels decoded, cropped, resized."""
    with Image.open(io.BytesIO(data)) as image:
        view = image.convert("RGB").crop(box).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(view).transpose(2, 0, 1)


def test_coarse_decoding_against_full_decoding():
    """Never fewer than 1.25 decoded pixels per target pixel, never twice as many as that needs, and 38 dB in any case."""
    data = jpeg_bytes(photo(901, 1203))
    reductions = set()
    picture, chance = open_picture({"path": None, "bytes": data}, 3), random.Random(0)
    assert picture.size == (901, 1203)
    for size in ((192, 192), (96, 128), (64, 64), (400, 300), (900, 900)):
        for _ in range(4):
            width, height = chance.randint(300, 1203), chance.randint(300, 901)
            left, top = chance.randint(0, 1203 - width), chance.randint(0, 901 - height)
            box = (left, top, left + width, top + height)
            view = picture.crop(box, size)
            assert psnr(view, plain_crop(data, box, size)) > 38
            kept = min(width / size[1], height / size[0]) / picture.reduction
            assert picture.reduction == 1 or kept >= 1.25 * 0.999
            assert picture.reduction == 8 or kept < 2.5 * 1.02
            reductions.add(picture.reduction)
    assert reductions == {1, 2, 4, 8}


def test_crops_of_one_picture_do_not_depend_on_each_other():
    data = jpeg_bytes(photo(480, 640))
    picture = open_picture({"path": None, "bytes": data}, 3)
    boxes = [(0, 0, 640, 480), (10, 20, 300, 200), (0, 0, 640, 480)]
    for box in boxes:
        fresh = open_picture({"path": None, "bytes": data}, 3)
        assert torch.equal(picture.crop(box, (48, 48)), fresh.crop(box, (48, 48)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("number", range(1, 9))
def test_crops_of_turned_pictures_are_those_of_the_upright(tmp_path, kind, number):
    upright = photo(480, 640, seed=number)
    oriented(upright, 1, format=kind, **EXACT)(tmp_path / "upright")
    oriented(upright, number, format=kind, **EXACT)(tmp_path / "turned")
    turned, original = open_picture(record(tmp_path / "turned"), 3), open_picture(record(tmp_path / "upright"), 3)
    assert turned.size == original.size == (480, 640)
    crops = (((64, 32, 320, 448), (48, 64)), ((0, 0, 640, 480), (60, 80)), ((500.5, 3.25, 640, 100), (64, 40)))
    for box, size in crops:
        view, expected = turned.crop(box, size), original.crop(box, size)
        # A turned JPEG is another file: its coefficients are rounded elsewhere.
        assert (view.int() - expected.int()).abs().max() <= (1 if kind == "PNG" else 6)
        assert kind == "PNG" or psnr(view, expected.numpy()) > 42


@pytest.mark.parametrize("number", ORIENTATIONS)
def test_boxes_in_stored_pixels(number):
    """The box of each upright pixel holds that pixel in the stored picture."""
    stored = np.arange(15).reshape(3, 5)
    upright = np.asarray(Image.fromarray(stored.astype(np.uint8)).transpose(ORIENTATIONS[number].transpose))
    for top, left in np.ndindex(upright.shape):
        x0, y0, x1, y1 = stored_box((left, top, left + 1, top + 1), upright.shape, number)
        assert stored[y0:y1, x0:x1].tolist() == [[upright[top, left]]]


@pytest.mark.parametrize("box", [(0, 0, 90, 70), (3, 5, 77, 66), (2.25, 1.5, 60.75, 69.9), (40, 40, 44, 43)])
@pytest.mark.parametrize("size", [(16, 24), (70, 90), (100, 10)])
def test_bands_are_resized_as_colors_are(box, size):
    """Against Pillow's colors; bands of several types, and boxes between pixels."""
    pixels = photo(70, 90)
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
def test_crops_of_pictures_in_memory_are_pillows(size):
    pixels = photo(130, 160)
    for box in ((0, 0, 160, 130), (10, 20, 150, 95)):
        expected = np.asarray(Image.fromarray(pixels).crop(box).resize(size[::-1], Image.Resampling.BILINEAR))
        view = Picture(Image.fromarray(pixels)).crop(box, size)
        if size == (6, 5):  # from 8 pixels per target pixel on, whole pixels are averaged first
            assert psnr(view, expected.transpose(2, 0, 1)) > 34
        else:
            assert np.abs(view.permute(1, 2, 0).numpy() - expected.astype(int)).max() <= 1


def test_boxes_that_rounding_put_outside(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    picture = open_picture(record(tmp_path / "x.png"), 3)
    assert torch.equal(picture.crop((-1e-9, 0, 13 + 1e-9, 9.0000001), (9, 13)), picture.crop((0, 0, 13, 9), (9, 13)))
    for box in ((5, 5, 5, 6), (-3, 0, 4, 4), (0, 0, 20, 9), (8, 0, 2, 9)):
        with pytest.raises(ValueError, match="no box of a picture of 9x13 pixels"):
            picture.crop(box, (4, 4))
