"""What a sample of a source's images shows: sizes, channels, mean and deviation."""

import numpy as np
import pytest
from image_corpus import BANDS, CORPUS, GRAY, RGB
from image_files import array, broken_files, noise, oriented, photo, record, tiff
from PIL import Image

from simmim.data import dataset_from_paths, measure_images, open_picture
from simmim.data.image_statistics import thumbnail


def statistics_of(folder, **arguments):
    return measure_images(dataset_from_paths(sorted(map(str, folder.iterdir()))), **arguments)


def test_channels_and_their_statistics(tmp_path):
    bands = [noise(20 + number, 30, 6, seed=number) // (number + 1) for number in range(3)]
    for number, values in enumerate(bands):
        write = array(values) if number else tiff(values, photometric="minisblack", planarconfig="contig")
        write(tmp_path / f"{number}.tif")
    measured = statistics_of(tmp_path)
    values = np.concatenate([each.reshape(-1, 6) for each in bands]) / 255
    assert (measured.channels, measured.sizes) == (6, ((20, 30), (21, 30), (22, 30)))
    assert measured.mean == pytest.approx(values.mean(axis=0), abs=6e-4)
    assert measured.std == pytest.approx(values.std(axis=0), abs=6e-4)
    assert measured.decoded_mib == pytest.approx(6 * 30 * 63 / 2**20)
    assert statistics_of(tmp_path, channels=6) == measured
    with pytest.raises(ValueError, match=r"none of 3 .*0\.tif: has 6 channels, expected 3"):
        statistics_of(tmp_path, channels=3)


def test_statistics_names_files_that_differ_in_channels(tmp_path):
    array(BANDS)(tmp_path / "a.npy")
    CORPUS["rgb.png"][0](tmp_path / "b.png")
    CORPUS["l.png"][0](tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"^images differ in channels: .*c\.png has 1 \(1 image\), .*a\.npy has 10 \(1"):
        statistics_of(tmp_path)
    assert statistics_of(tmp_path, channels=3).sizes == ((9, 13), (9, 13))
    (tmp_path / "a.npy").unlink()
    measured = statistics_of(tmp_path)
    values = np.concatenate([RGB.reshape(-1, 3), GRAY.reshape(-1, 1).repeat(3, 1)]) / 255
    assert measured.channels == 3 and measured.mean == pytest.approx(values.mean(axis=0), abs=6e-4)


def test_photos_are_decoded_coarsely(tmp_path):
    pixels = photo(1200, 1600)
    oriented(pixels, 6, quality=90)(tmp_path / "x.jpg")
    measured = statistics_of(tmp_path)
    assert measured.sizes == ((1200, 1600),) and measured.short_side_px == 1200
    picture = open_picture(record(tmp_path / "x.jpg"), 3)
    thumbnail(picture)
    assert picture.reduction == 8


def test_statistics_of_small_images(tmp_path):
    """Up to 64 px nothing is scaled down, and the statistics are those of all pixels."""
    sizes = [(20, 30), (64, 40), (50, 10)]
    arrays = [noise(*size, 3, seed=index) // (index + 1) for index, size in enumerate(sizes)]
    for index, pixels in enumerate(arrays):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    measured = statistics_of(tmp_path)
    pixels = np.concatenate([array.reshape(-1, 3) for array in arrays]) / 255
    assert (measured.channels, measured.short_side_px) == (3, 20)
    assert measured.mean == pytest.approx(pixels.mean(axis=0), abs=6e-4)
    assert measured.std == pytest.approx(pixels.std(axis=0), abs=6e-4)
    assert measured.decoded_mib == pytest.approx(len(pixels) * 3 / 2**20)


def test_statistics_tells_gray_from_color(tmp_path):
    gray = noise(28, 28)
    Image.fromarray(gray).save(tmp_path / "0.png")
    Image.fromarray(gray > 127).save(tmp_path / "1.png")
    Image.fromarray(np.dstack([gray, np.full_like(gray, 255)]), "LA").save(tmp_path / "2.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "3.png")
    Image.fromarray(gray.astype(np.float32)).save(tmp_path / "4.tif")
    assert statistics_of(tmp_path).channels == 1 and len(statistics_of(tmp_path).mean) == 1
    assert statistics_of(tmp_path, channels=3).channels == 3 and len(statistics_of(tmp_path, channels=3).std) == 3
    Image.fromarray(noise(28, 28, 3)).save(tmp_path / "5.png")
    assert statistics_of(tmp_path).channels == 3
    assert statistics_of(tmp_path, channels=1).channels == 1


def test_statistics_of_gray_images(tmp_path):
    arrays = [noise(28, 28, seed=seed) // 3 for seed in range(4)]
    for index, pixels in enumerate(arrays):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    measured = statistics_of(tmp_path)
    assert measured.mean == pytest.approx((np.stack(arrays).mean() / 255,), abs=6e-4)
    assert measured.std == pytest.approx((np.stack(arrays).std() / 255,), abs=6e-4)
    assert measured.decoded_mib == pytest.approx(4 * 28 * 28 / 2**20)
    Image.new("L", (28, 28)).save(tmp_path / "flat.png")
    for index in range(4):
        (tmp_path / f"{index}.png").unlink()
    assert statistics_of(tmp_path).std == (0.01,), "a deviation to divide by is never 0"


def test_statistics_passes_over_broken_images(tmp_path):
    broken_files(tmp_path / "set")
    (tmp_path / "set" / "folder.png").rmdir()
    with pytest.raises(ValueError, match=r"none of 5 sampled images can be read; the first, .*cut.jpg: "):
        statistics_of(tmp_path / "set")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "set" / "good.png")
    measured = statistics_of(tmp_path / "set")
    assert (measured.short_side_px, measured.mean) == (30, (1.0, 0.0, 0.0))


def test_statistics_takes_an_even_sample(tmp_path):
    """The first and last are in it; the share of all memory is extrapolated."""
    for index in range(20):
        height, value = (90, 255) if index in (0, 19) else (10, 0)
        Image.new("L", (10, height), value).save(tmp_path / f"{index:02d}.png")
    measured = statistics_of(tmp_path, num_samples=2)
    assert measured.mean == (1.0,) and measured.short_side_px == 10
    assert measured.decoded_mib == pytest.approx(20 * 900 / 2**20)
