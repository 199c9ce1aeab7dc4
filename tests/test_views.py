"""Random crops within their ranges; filters and fits of the evaluation view, against Pillow's own resize and transformers'
processor."""

import io
import random
from collections import Counter

import numpy as np
import pytest
import torch
from image_files import noise
from PIL import Image, ImageOps

from simmim.data import EvaluationView, RandomView, normalize, open_picture
from simmim.data.decode import Picture
from simmim.data.resizing import INTERPOLATIONS

PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
TURNED = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def photo(height, width, seed=0):
    """Smooth shading, hard edges and a little noise: where filters differ and overshoot."""
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([128 + 60 * np.sin(x / (9 + c)) * np.cos(y / (13 - c)) for c in range(3)], axis=-1)
    for _ in range(12):
        top, left = chance.integers(0, height), chance.integers(0, width)
        pixels[top : top + height // 4, left : left + width // 4] = chance.integers(0, 256, 3)
    return np.clip(pixels + chance.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)


def written(write):
    """One row of a source, its bytes from `write(file)`."""
    file = io.BytesIO()
    write(file)
    return {"path": None, "bytes": file.getvalue()}


def saved(image, kind="PNG", **options):
    return written(lambda file: image.save(file, kind, **options))


def pillow(image, size, filter, box=None):
    """Pillow's own resize: (channels, height, width)."""
    pixels = np.asarray(image.resize(size[::-1], PILLOW[filter], box=box))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def levels_off(view, expected):
    """Absolute differences in levels."""
    assert view.dtype == torch.uint8 and view.shape == expected.shape
    return np.abs(view.numpy().astype(int) - expected.astype(int))


def is_pillows(view, expected, filter):
    """Nearest to the pixel. The others within 1 level; of bicubic 1 pixel in 1,000 excepted, beside an edge: what
    overshoots is cut after either axis, and torch and Pillow do not always begin with the same."""
    off = levels_off(view, expected)
    allowed = 0 if filter == "nearest" else 1
    return (off > allowed).mean() <= (0.001 if filter == "bicubic" else 0) and off.max() <= 10


def psnr(view, expected):
    return 10 * np.log10(255**2 / max(np.mean(levels_off(view, expected).astype(float) ** 2), 1e-9))


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "image_size, size",
    [
        ((28, 28), (32, 32)),
        ((28, 28), (13, 20)),
        ((300, 400), (96, 128)),
        ((300, 400), (500, 450)),
        ((400, 300), (64, 200)),
    ],
)
def test_crops_are_pillows(filter, mode, image_size, size):
    """By torch or Pillow, smaller or larger, of whole pixels or parts of them."""
    image = Image.fromarray(photo(*image_size)).convert(mode)
    height, width = image_size
    for box in ((0, 0, width, height), (3, 5, width - 4, height - 1)):
        assert is_pillows(Picture(image).crop(box, size, filter), pillow(image.crop(box), size, filter), filter)
    box = (2.25, 1.5, width - 0.75, height - 3.1)
    view, expected = Picture(image).crop(box, size, filter), pillow(image, size, filter, box)
    if filter == "bilinear" and height > 6 * size[0]:  # averages whole pixels first
        assert psnr(view, expected) > 40
    else:
        assert np.array_equal(view.numpy(), expected)


def test_filters_differ():
    image = Picture(Image.fromarray(photo(300, 400)))
    views = [image.crop((0, 0, 400, 300), (60, 80), filter) for filter in INTERPOLATIONS]
    assert list(INTERPOLATIONS) == list(PILLOW)
    assert all((one.int() - other.int()).abs().max() > 5 for i, one in enumerate(views) for other in views[:i])
    assert torch.equal(image.crop((0, 0, 400, 300), (60, 80)), views[1]), "bilinear unless told otherwise"


def test_sharp_filters_take_no_shortcut_for_far_smaller_images():
    """Bilinear averages whole pixels first, from 8 per target pixel on; the other filters do not."""
    image = Image.fromarray(photo(700, 900))
    for filter in ("bicubic", "lanczos"):
        view = Picture(image).crop((0, 0, 900, 700), (30, 40), filter)
        assert is_pillows(view, pillow(image, (30, 40), filter), filter)


@pytest.mark.parametrize("filter", ["bicubic", "lanczos"])
def test_jpegs_are_decoded_as_coarsely_as_a_sharp_filter_allows(filter):
    """At least 2 decoded pixels per target pixel: 1 level off on average, 3 in all but 1 % of the pixels."""
    record = saved(Image.fromarray(photo(901, 1203)), "JPEG", quality=92)
    reductions = set()
    whole = Image.open(io.BytesIO(record["bytes"])).convert("RGB")
    for size in ((224, 224), (96, 128), (60, 60), (400, 500), (901, 1203)):
        picture = open_picture(record, 3)
        view, expected = picture.crop((0, 0, 1203, 901), size, filter), pillow(whole, size, filter)
        off = levels_off(view, expected)
        assert off.mean() < 1 and np.percentile(off, 99) <= 3 and psnr(view, expected) > 44
        assert picture.reduction == 1 or min(1203 / size[1], 901 / size[0]) / picture.reduction >= 2 * 0.999
        reductions.add(picture.reduction)
    assert reductions == {1, 2, 4}


@pytest.mark.parametrize("size", [(224, 224), (60, 60), (700, 400)])
def test_nearest_takes_pixels_of_the_whole_jpeg(size):
    record = saved(Image.fromarray(photo(480, 640)), "JPEG", quality=92)
    whole = Image.open(io.BytesIO(record["bytes"])).convert("RGB")
    view = open_picture(record, 3).crop((0, 0, 640, 480), size, "nearest")
    assert np.array_equal(view.numpy(), pillow(whole, size, "nearest"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("number", TURNED)
def test_turned_pictures(kind, number):
    """As the upright picture, decoded in full, is resized; also where two pixels are equally near."""
    exif = Image.Exif()
    exif[0x0112] = number
    record = saved(Image.fromarray(photo(240, 320)), kind, exif=exif, **({"quality": 92} if kind == "JPEG" else {}))
    upright = Image.open(io.BytesIO(record["bytes"])).convert("RGB").transpose(TURNED[number])
    picture = open_picture(record, 3)
    for filter in PILLOW:
        for size in ((120, 160), (250, 230)):
            if filter == "bilinear" and kind == "JPEG" and size == (120, 160):
                continue  # decoded coarsely: tests/test_decode.py
            view = picture.crop((0, 0, *picture.size[::-1]), size, filter)
            assert is_pillows(view, pillow(upright, size, filter), filter)


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("box", [(0, 0, 90, 70), (30, 25, 60, 44), (2.25, 1.5, 60.75, 69.9), (40, 40, 44, 43)])
def test_bands_are_resized_as_colors_are(filter, box):
    """Parts of six bands, read only as far as the filter reaches: bytes against Pillow's colors, other types against its
    single bands of floats, both in full."""
    pixels = photo(70, 90)
    six = np.dstack([pixels, 255 - pixels])
    low, high = float(six.min()), float(six.max())
    stretched = ((pixels - low) * 255 / (high - low)).astype(np.float32)
    # Even sides: no pixel's center lies between two of the image's, where nearest depends on rounding.
    for size in ((16, 24), (72, 88), (6, 4)):
        floats = np.stack([pillow(Image.fromarray(band), size, filter, box)[0] for band in stretched.transpose(2, 0, 1)])
        for values in (six, six.astype(np.float32) * 3 - 100, six.astype(np.uint16) * 200):
            view = open_picture(written(lambda file, values=values: np.save(file, values)), 6).crop(box, size, filter)
            expected = pillow(Image.fromarray(pixels), size, filter, box) if values is six else floats.round().clip(0, 255)
            # Pillow's first axis follows from the size of what it is given, all of the picture or the part that was read.
            assert view.shape == (6, *size) and levels_off(view[:3], expected).max() <= (2 if values is six else 1)


def test_overshoot_ends_at_the_range():
    """Beside an edge of floats from the lowest to the highest value, where Pillow does not cut."""
    values = np.zeros((40, 40, 2), dtype=np.float32)
    values[:, 20:] = 7.5
    for filter in ("bicubic", "lanczos"):
        view = open_picture(written(lambda file: np.save(file, values)), 2).crop((0, 0, 40, 40), (40, 90), filter)
        dark, bright = view[..., :43].int(), view[..., 47:].int()
        assert dark.max() < 40 and bright.min() > 215


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize(
    "image_size, size, share, fit, box",
    [
        ((40, 60), (32, 32), 1.0, "crop", (10, 0, 50, 40)),
        ((80, 40), (32, 32), 0.5, "crop", (10, 30, 30, 50)),
        ((40, 60), (32, 32), 1.0, "squash", (0, 0, 60, 40)),
        ((80, 40), (32, 24), 0.5, "squash", (10, 20, 30, 60)),
        ((200, 300), (96, 48), 1.0, "squash", (0, 0, 300, 200)),
    ],
)
def test_fits(filter, image_size, size, share, fit, box):
    image = Image.fromarray(photo(*image_size))
    view = EvaluationView(size, share, filter, fit)(Picture(image))
    assert is_pillows(view, pillow(image.crop(box), size, filter), filter)


def test_squashed_parts_of_pixels():
    image = Image.fromarray(photo(50, 75))
    view = EvaluationView((32, 32), 0.875, "bicubic", "squash")(Picture(image))
    box = (75 / 16, 50 / 16, 75 - 75 / 16, 50 - 50 / 16)
    assert np.array_equal(view.numpy(), pillow(image, (32, 32), "bicubic", box))


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("image_size", [(375, 500), (160, 90)])
def test_squash_is_what_transformers_does(filter, image_size):
    transformers = pytest.importorskip("transformers")
    # From version 5 on the plain name wants torchvision.
    processor_class = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    processor = processor_class(
        size={"height": 224, "width": 192}, resample=PILLOW[filter], do_rescale=False, do_normalize=False
    )
    image = Image.fromarray(photo(*image_size))
    expected = np.asarray(processor(image)["pixel_values"][0])
    view = EvaluationView((224, 192), interpolation=filter, fit="squash")(open_picture(saved(image), 3))
    assert is_pillows(view, expected, filter)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"unknown interpolation 'cubic': give one of nearest, bilinear, bicubic, lanczos$"):
        EvaluationView((32, 32), interpolation="cubic")
    with pytest.raises(ValueError, match=r"unknown fit 'pad': give one of crop, squash$"):
        EvaluationView((32, 32), fit="pad")
    for share in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"share of the image is .+: give a number above 0, at most 1"):
            EvaluationView((32, 32), share)
    six = open_picture(written(lambda file: np.save(file, np.zeros((9, 9, 6), np.uint8))), 6)
    jpeg = open_picture(saved(Image.new("RGB", (9, 9)), "JPEG"), 3)
    for picture in (Picture(Image.new("L", (9, 9))), jpeg, six):
        with pytest.raises(ValueError, match="unknown interpolation 'box': give one of nearest"):
            picture.crop((0, 0, 9, 9), (4, 4), "box")


# --- random crops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [(100, 100), (90, 160), (97, 61)])
def test_random_crops_keep_to_their_ranges(image_size):
    """All inside; area and ratio within the ranges but for rounding to whole pixels; the ranges are used up."""
    scale, ratio = (0.3, 0.8), (0.8, 1.25)
    view, generator = RandomView((32, 32), scale, ratio), random.Random(0)
    boxes = np.array([view.crop_box(image_size, generator) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= image_size[1]).all() and (bottom <= image_size[0]).all()
    widths, heights = right - left, bottom - top
    assert (widths > 0).all() and (heights > 0).all()
    areas, ratios = widths * heights / np.prod(image_size), widths / heights
    slack = 1 / min(widths.min(), heights.min())
    assert areas.min() > scale[0] * (1 - slack) and areas.max() < scale[1] * (1 + slack)
    assert ratios.min() > ratio[0] * (1 - slack) and ratios.max() < ratio[1] * (1 + slack)
    if image_size[0] == image_size[1]:
        assert areas.min() < 0.32 and areas.max() > 0.75 and ratios.min() < 0.83 and ratios.max() > 1.2
        assert abs(np.log(ratios).mean()) < 0.01, "a ratio and its inverse are as likely"
        offset = left / np.maximum(image_size[1] - widths, 1)
        assert abs(offset.mean() - 0.5) < 0.03 and offset.min() == 0 and offset.max() == 1


def test_ratio_is_width_over_height():
    view, generator = RandomView((32, 32), (0.1, 0.2), (2.0, 3.0)), random.Random(0)
    boxes = np.array([view.crop_box((200, 200), generator) for _ in range(200)])
    ratios = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert ratios.min() > 1.95 and ratios.max() < 3.1


def test_random_crop_of_extreme_shapes():
    """Where no crop fits: the largest that the ratios allow, centered; a lone row or pixel is a crop too."""
    view = RandomView((8, 8), crop_scale=(0.9, 1.0), crop_ratio=(0.5, 2.0))
    assert view.crop_box((100, 1000), random.Random(0)) == (400, 0, 600, 100)
    assert view.crop_box((1000, 100), random.Random(0)) == (0, 400, 100, 600)
    assert view.crop_box((1, 1), random.Random(0)) == (0, 0, 1, 1)
    for size in ((300, 1), (1, 300)):
        left, top, right, bottom = view.crop_box(size, random.Random(0))
        assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
        assert view(Picture(Image.new("L", size[::-1])), random.Random(0)).shape == (1, 8, 8)


def as_view(image):
    """(channels, height, width), as a view gives it."""
    return torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1)


def within_1(view, expected):
    """Torch and Pillow round their one filter differently in places."""
    return view.shape == expected.shape and (view.int() - expected.int()).abs().max() <= 1


def test_random_view_is_the_crop_resized_and_sometimes_mirrored():
    image = Image.fromarray(noise(40, 60, 3))
    picture, view = Picture(image), RandomView((16, 24))
    mirrored = 0
    for seed in range(200):
        box = view.crop_box((40, 60), random.Random(seed))
        plain = image.crop(box).resize((24, 16), Image.Resampling.BILINEAR)
        result = view(picture, random.Random(seed))
        if not within_1(result, as_view(plain)):
            assert within_1(result, as_view(ImageOps.mirror(plain)))
            mirrored += 1
    assert 70 < mirrored < 130
    assert torch.equal(view(picture, random.Random(199)), result)
    for flip in (0.0, 1.0):
        for seed in range(5):
            crop = image.crop(view.crop_box((40, 60), random.Random(seed))).resize((24, 16), 2)
            expected = as_view(ImageOps.mirror(crop) if flip else crop)
            assert within_1(RandomView((16, 24), flip=flip)(picture, random.Random(seed)), expected)


def test_whole_image_crop_changes_nothing():
    image = Image.fromarray(noise(24, 24, 3))
    view = RandomView((24, 24), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    assert torch.equal(view(Picture(image), random.Random(0)), as_view(image))


@pytest.mark.parametrize(
    "image_size, size, share, box",
    [
        ((32, 32), (32, 32), 1.0, (0, 0, 32, 32)),
        ((40, 60), (32, 32), 1.0, (10, 0, 50, 40)),
        ((40, 60), (20, 60), 1.0, (0, 10, 60, 30)),
        ((80, 40), (32, 32), 0.5, (10, 30, 30, 50)),
        ((64, 64), (56, 56), 0.875, (4, 4, 60, 60)),
    ],
)
def test_center_view(image_size, size, share, box):
    image = Image.fromarray(noise(*image_size, 3))
    expected = image.crop(box).resize(size[::-1], Image.Resampling.BILINEAR)
    assert within_1(EvaluationView(size, share)(Picture(image)), as_view(expected))


def test_tensors_and_normalizing():
    rgb, gray = noise(4, 6, 3), noise(4, 6)
    for pixels in (rgb, gray):
        tensor = Picture(Image.fromarray(pixels)).crop((0, 0, 6, 4), (4, 6))
        assert torch.equal(tensor, torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1))
    images, mean, std = noise(5, 3, 4, 6), (0.1, 0.5, 0.9), (0.2, 1.0, 3.0)
    expected = (images / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    result = normalize(torch.from_numpy(images), mean, std)
    assert result.dtype == torch.float32 and np.abs(result.numpy() - expected).max() < 1e-6


def test_turns_are_the_eight_of_a_square():
    """Flips and quarter turns reach all eight, each as often; without turns nothing else that is drawn changes."""
    image = Image.fromarray(np.arange(16 * 24, dtype=np.uint8).reshape(16, 24) % 251)
    picture, whole = Picture(image), {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    seen = Counter()
    for seed in range(400):
        view = RandomView((16, 24), **whole, turns=True)(picture, random.Random(seed))
        plain = RandomView((16, 24), **whole)(picture, random.Random(seed))
        assert view.shape == (1, 16, 24)
        turned = [picture.crop((0, 0, 24, 16), (24, 16) if quarters % 2 else (16, 24)) for quarters in range(4)]
        options = {
            (mirrored, quarters): (part.flip(-1) if mirrored else part).rot90(quarters, (-2, -1))
            for quarters, part in enumerate(turned)
            for mirrored in (False, True)
        }
        [(mirrored, quarters)] = [key for key, option in options.items() if torch.equal(view, option)]
        assert torch.equal(plain, options[mirrored, 0])
        seen[mirrored, quarters] += 1
    assert len(seen) == 8 and min(seen.values()) > 25
