"""Where pixels land: sizes are (height, width), and each view shows the part of the picture that it says.

The pictures hold their own coordinates, so that a view tells which pixels it shows. Heights and widths always differ.
"""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data import EvaluationView, Picture, RandomView, open_picture
from simmim.data.image_statistics import thumbnail
from simmim.data.orientation import ORIENTATIONS

HEIGHT, WIDTH = 37, 61


def coordinates(height=HEIGHT, width=WIDTH):
    """(height, width, 3) uint8: y, x and their sum."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, x + y], axis=-1).astype(np.uint8)


def stored_as(upright, orientation):
    """The picture that a viewer turns to `upright`, by Pillow's own inverse operations."""
    image, transpose = Image.fromarray(upright), Image.Transpose
    inverse = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }
    return image.transpose(inverse[orientation]) if orientation != 1 else image


def encoded(image, kind, orientation=1, **options):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, kind, exif=exif, **options)
    return {"bytes": file.getvalue(), "path": None}


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return {"bytes": file.getvalue(), "path": None}


def tiff(values, **options):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", **options)
    return {"bytes": file.getvalue(), "path": None}


def pictures():
    """Each kind of picture with the (channels, height, width) that all of it must show."""
    color = coordinates()
    gray, channels = color[..., 1], color.transpose(2, 0, 1)
    five = np.concatenate([channels, channels[:2] + 3])
    deep = color[..., 0].astype(np.uint16) * WIDTH + color[..., 1]  # one value per pixel
    levels = (deep / deep.max() * 255).round().astype(np.uint8)[None]
    opaque = np.dstack([color, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    cases = {
        "in memory": (Picture(Image.fromarray(color)), channels),
        "gray": (open_picture(encoded(Image.fromarray(gray), "PNG"), None), gray[None]),
        "gray as color": (open_picture(encoded(Image.fromarray(gray), "PNG"), 3), np.stack([gray] * 3)),
        "alpha": (open_picture(encoded(Image.fromarray(opaque), "PNG"), None), channels),
        "16 bits": (open_picture(encoded(Image.fromarray(deep), "PNG"), None), levels),
        "array": (open_picture(npy(five.transpose(1, 2, 0)), None), five),
        "array in planes": (open_picture(npy(five), 5), five),
        "deep array": (open_picture(npy(np.stack([deep, deep])), 2), np.concatenate([levels, levels])),
        "bands": (open_picture(tiff(five.transpose(1, 2, 0), planarconfig="contig"), 5), five),
        "bands in planes": (open_picture(tiff(five, planarconfig="separate"), 5), five),
    }
    for orientation in (1, *ORIENTATIONS):
        for kind in ("PNG", "TIFF", "WEBP"):
            record = encoded(
                stored_as(color, orientation), kind, orientation, **({"lossless": True} if kind == "WEBP" else {})
            )
            cases[f"{kind} {orientation}"] = (open_picture(record, 3), channels)
    return cases


PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_a_crop_shows_its_box(name):
    """All of it and parts of whole pixels, exactly; twice as large by the nearest pixel, exactly."""
    picture, expected = PICTURES[name]
    assert picture.size == (HEIGHT, WIDTH) and expected.shape == (picture.channels, HEIGHT, WIDTH)
    assert picture.decoded().size == (HEIGHT, WIDTH)
    for left, top, right, bottom in ((0, 0, WIDTH, HEIGHT), (50, 3, 61, 37), (7, 20, 30, 22), (0, 36, 1, 37)):
        size = (bottom - top, right - left)
        part = expected[:, top:bottom, left:right]
        for interpolation in ("bilinear", "nearest"):
            assert np.array_equal(picture.crop((left, top, right, bottom), size, interpolation), part)
        twice = picture.crop((left, top, right, bottom), (2 * size[0], 2 * size[1]), "nearest")
        assert np.array_equal(twice, part.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("name", PICTURES)
def test_views_show_the_parts_they_say(name):
    picture, expected = PICTURES[name]
    channels = picture.channels
    # The largest central part of the view's shape: 15 pixels are left out on either side, or 6 above and below.
    assert np.array_equal(EvaluationView((37, 31))(picture), expected[:, :, 15:46])
    assert np.array_equal(EvaluationView((25, 61))(picture), expected[:, 6:31])
    assert np.array_equal(EvaluationView((37, 61), fit="squash")(picture), expected)
    assert thumbnail(picture).shape == (channels, HEIGHT, WIDTH)
    view = RandomView((20, 48), crop_scale=(0.05, 0.6), crop_ratio=(0.3, 3.0), flip=0.0)
    for seed in range(8):
        box = view.crop_box(picture.size, random.Random(seed))
        left, top, right, bottom = box
        shown = view(picture, random.Random(seed))
        assert shown.shape == (channels, 20, 48)
        assert torch.equal(shown, picture.crop(box, (20, 48)))
        same_size = RandomView((bottom - top, right - left), view.crop_scale, view.crop_ratio, flip=1.0)
        assert np.array_equal(same_size(picture, random.Random(seed)), expected[:, top:bottom, left:right][:, :, ::-1])


@pytest.mark.parametrize("orientation", [1, *ORIENTATIONS])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_turned_jpegs_show_the_same_parts(orientation, reduction):
    """Slopes, which a coarse decode keeps: the view's corners are the corners of the box."""
    height, width = 37 * 16, 61 * 16
    y, x = np.mgrid[:height, :width]
    upright = np.stack([y * 255 / height, x * 255 / width, 128 + 0 * x], axis=-1).round().astype(np.uint8)
    record = encoded(stored_as(upright, orientation), "JPEG", orientation, quality=95, subsampling=0)
    picture = open_picture(record, 3)
    assert picture.size == (height, width)
    left, top, right, bottom = 16, 80, 912, 560
    size = ((bottom - top) // (2 * reduction), (right - left) // (2 * reduction))
    shown = picture.crop((left, top, right, bottom), size).double()
    assert shown.shape == (3, *size) and picture.reduction == reduction
    rows = torch.linspace(top, bottom, 2 * size[0] + 1)[1::2, None] * 255 / height
    columns = torch.linspace(left, right, 2 * size[1] + 1)[None, 1::2] * 255 / width
    assert (shown[0] - rows).abs().max() < 4 and (shown[1] - columns).abs().max() < 4


def test_random_crops_are_drawn_as_ever():
    """The boxes of some seeds, as they were drawn when sizes were (width, height): runs of before resume unchanged."""
    cases = {
        (37, 61): [(12, 0, 54, 37), (7, 0, 49, 37), (6, 0, 55, 37), (12, 0, 58, 37)],
        (61, 37): [(0, 0, 37, 46), (0, 13, 37, 55), (0, 12, 37, 60), (0, 6, 37, 55)],
        (1203, 901): [(2, 15, 846, 941), (3, 23, 895, 1201), (0, 21, 900, 1191), (7, 216, 896, 1191)],
        (9, 200): [(94, 0, 106, 9)] * 4,
    }
    for size, boxes in cases.items():
        assert [RandomView((32, 32)).crop_box(size, random.Random(f"crop/{seed}")) for seed in range(4)] == boxes
