"""Resizing in compiled C: Pillow's pixels to the last bit, or not used."""

import numpy as np
import pytest
from PIL import Image

from simmim import c_library
from simmim.data import resampling, resizing
from simmim.data.resampling import get_resampler
from simmim.data.resizing import resize_box

BILINEAR = Image.Resampling.BILINEAR


@pytest.fixture
def resampler():
    """Tests need a C compiler, as those of the encoder's kernels do."""
    made = get_resampler()
    assert made is not None
    return made


def noise(generator, height, width, bands):
    """Pixels of full contrast, by which a wrong weight shows."""
    pixels = generator.integers(0, 256, (height, width, 3) if bands == 3 else (height, width), np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if generator.random() < 0.3 else pixels


def boxes_and_sizes(generator, height, width):
    """A box in quarters of pixels or anywhere, or the whole image, and the size that it becomes."""
    left, right = np.sort(generator.uniform(0, width, 2))
    top, bottom = np.sort(generator.uniform(0, height, 2))
    kind = generator.integers(4)
    if kind == 0:
        left, top, right, bottom = (np.round(edge * 4) / 4 for edge in (left, top, right, bottom))
    if kind == 1 or right - left < 0.5 or bottom - top < 0.5:
        left, top, right, bottom = 0, 0, width, height
    size = tuple(int(side) for side in generator.integers(1, 200, 2))
    return (float(left), float(top), float(right), float(bottom)), (height, width) if generator.integers(8) == 0 else size


def by_pillow(pixels, box, size):
    made = np.array(Image.fromarray(pixels).resize(size[::-1], BILINEAR, box=box))
    return made[None] if made.ndim == 2 else made.transpose(2, 0, 1)


def test_pixels_are_pillows_to_the_last_bit(resampler):
    """Shrunk, enlarged, in either order of the axes, at the edges and inside."""
    generator, orders = np.random.default_rng(0), set()
    for _ in range(400):
        height, width, bands = *generator.integers(1, 300, 2), generator.choice([1, 3])
        pixels = noise(generator, height, width, bands)
        box, size = boxes_and_sizes(generator, height, width)
        made = resampler(pixels, box, size, (0, 0), (height, width))
        assert np.array_equal(made, by_pillow(pixels, box, size)), (pixels.shape, box, size)
        orders.add(size[0] < height and height - size[0] > 2 * (width - size[1]))
    assert orders == {False, True}


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_processors_with_other_instructions_make_the_same_pixels(processor, tmp_path):
    """Registers of 16, 32 and 64 bytes, as far as this processor has them."""
    needed = {"x86-64": "sse2", "x86-64-v2": "sse4_1", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}[processor]
    if needed not in c_library.processor_features().split():
        pytest.skip(f"this processor has no {needed}")
    flags, file = [*resampling.FLAGS, f"-march={processor}"], tmp_path / "resample.so"
    if not c_library.compile_library(c_library.find_compiler(), flags, [resampling.SOURCE], file):
        pytest.skip(f"this compiler knows no {processor}")
    made = resampling.Resampler(file)
    assert made.is_pillows()
    generator = np.random.default_rng(4)
    for _ in range(60):
        height, width, bands = *generator.integers(1, 200, 2), generator.choice([1, 3])
        pixels = noise(generator, height, width, bands)
        box, size = boxes_and_sizes(generator, height, width)
        assert np.array_equal(made(pixels, box, size, (0, 0), (height, width)), by_pillow(pixels, box, size))


def test_a_part_that_the_filter_looks_at_is_enough(monkeypatch):
    """Of a large image a small box is read, and its pixels are those of the whole; rows may be parts of longer ones."""
    generator = np.random.default_rng(1)
    seen = []
    original = resampling.Resampler.__call__
    monkeypatch.setattr(
        resampling.Resampler,
        "__call__",
        lambda self, pixels, *rest: seen.append(pixels.size) or original(self, pixels, *rest),
    )
    for bands in (1, 3):
        pixels = noise(generator, 900, 700, bands)
        image = Image.fromarray(pixels)
        for box in ((100.25, 200.5, 300.5, 420.75), (0.0, 0.0, 250.5, 300.25), (449.75, 610.25, 700.0, 900.0)):
            expected = by_pillow(pixels, box, (96, 90))
            assert np.array_equal(resize_box(image, box, (96, 90), "bilinear"), expected)
            assert seen.pop() < pixels.size / 4
            assert np.array_equal(resize_box(pixels, box, (96, 90), "bilinear"), expected)
            wider = np.concatenate([pixels, pixels], axis=1)[:, :700]
            assert not wider.flags.c_contiguous
            assert np.array_equal(resize_box(wider, box, (96, 90), "bilinear"), expected)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize(
    "box", [(10.0, 20.0, 250.0, 380.0), (10.5, 20.25, 250.0, 380.75), (0.0, 0.0, 20.5, 20.0), (0.0, 0.0, 300.0, 400.0)]
)
@pytest.mark.parametrize("size", [(64, 48), (20, 12), (300, 200)])
def test_ways_agree_whatever_is_compiled(name, box, size, monkeypatch):
    """The same pixels of an image and of its array, with the compiled code and without."""
    pixels = noise(np.random.default_rng(2), 400, 300, 3)
    made = [resize_box(image, box, size, name) for image in (Image.fromarray(pixels), pixels)]
    monkeypatch.setattr(resizing, "get_resampler", lambda: None)
    made += [resize_box(image, box, size, name) for image in (Image.fromarray(pixels), pixels)]
    assert all(np.array_equal(one, made[0]) for one in made)
    assert made[0].shape == (3, *size)


def test_code_that_does_not_make_pillows_pixels_is_not_used(tmp_path, monkeypatch):
    """As a compiler that is wrong, or another Pillow, may do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "resample.c"
    broken.write_text(resampling.SOURCE.read_text().replace("#define HALF (1 << (BITS - 1))", "#define HALF 0"))
    assert get_resampler.__wrapped__() is not None
    monkeypatch.setattr(resampling, "SOURCE", broken)
    assert get_resampler.__wrapped__() is None
    assert len(list((tmp_path / "simmim" / "kernels").glob("resample-*.so"))) == 2


def test_a_pillow_that_never_goes_along_columns_first(monkeypatch, tmp_path):
    """Older ones do not; the order is found by what the installed one makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = get_resampler.__wrapped__()
    tall = noise(np.random.default_rng(3), 96, 40, 1)
    orders = [
        resampling.Resampler(found.file, first)(tall, (0, 0, 40, 96), (30, 38), (0, 0), (96, 40)) for first in (True, False)
    ]
    assert not np.array_equal(*orders)  # so that the check can tell
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *args, box: by_rows(found.file, image, size, box))
    assert resampling.choose_order(found.file).columns_first is False


def by_rows(file, image, size, box):
    """A stand-in for an older Pillow's `resize`."""
    pixels = np.array(image)
    made = resampling.Resampler(file, False)(pixels, box, size[::-1], (0, 0), pixels.shape[:2])
    return Image.fromarray(made[0] if len(made) == 1 else np.ascontiguousarray(made.transpose(1, 2, 0)))


@pytest.mark.parametrize("why", ["no compiler", "switched off", "it fails"])
def test_without_a_compiler_pillow_resizes(why, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if why == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    elif why == "switched off":
        monkeypatch.setenv(c_library.SWITCH, "0")
    else:
        monkeypatch.setenv("CC", "false")
    assert get_resampler.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_that_was_cut_short_is_made_anew(tmp_path, monkeypatch):
    """Of nothing, as a machine that lost its power may leave it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [*resampling.FLAGS, c_library.processor_flag()]
    file = c_library.library_file("resample", c_library.find_compiler(), flags, [resampling.SOURCE])
    file.write_bytes(b"")
    assert get_resampler.__wrapped__().file == file and file.stat().st_size
