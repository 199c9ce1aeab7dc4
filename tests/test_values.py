"""Values deeper than 8 bits: one range a channel for the collection, kept to the device; no data is told."""

import io
import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.formats.huggingface import processor_config
from simmim.cli import main
from simmim.data import dataset_from_paths, measure_images, normalize, open_picture, valid_pixels
from simmim.data.deep import as_shares
from simmim.data.value_ranges import settle_reading
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.messages import Notice
from simmim.methods.pixels import PixelDecoder, masked_l1, sliding_statistics
from simmim.pretrain.settings import DataSettings
from simmim.reading import AUTO, Reading

TOY = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'


def record_of(path):
    return {"bytes": None, "path": str(path)}


def crop_of(path, reading, channels=None):
    """The whole picture at its own size, as an array."""
    picture = open_picture(record_of(path), channels, reading=reading)
    height, width = picture.size
    return picture.crop((0, 0, width, height), (height, width)).numpy()


def scene(seed, size=(40, 48), bands=1, level=900):
    """Smooth 12-bit values with noise, (height, width, bands) uint16."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(rows / (3 + band)) + np.cos(columns / (5 + seed % 3)) for band in range(bands)]
    return (level * (2.5 + np.stack(waves, -1)) + random.normal(0, 20, (*size, bands))).astype(np.uint16)


def source_of(folder):
    return dataset_from_paths(sorted(map(str, folder.iterdir())))


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_crops_are_the_stored_values_by_the_range(tmp_path, kind, planar):
    """Equal to tifffile's own values, to float32's last digit, in every type and layout."""
    values = scene(0, bands=5).astype(kind)
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar)
    read = tifffile.imread(tmp_path / "a.tif")
    ranges = [(100 * band, 6000 + band) for band in range(5)]
    expected = [
        ((read if planar == "contig" else read.transpose(1, 2, 0))[..., band].astype(float) - low) / (high - low)
        for band, (low, high) in enumerate(ranges)
    ]
    np.testing.assert_allclose(crop_of(tmp_path / "a.tif", Reading(ranges)), np.clip(expected, 0, 1), atol=1e-7)


@pytest.mark.parametrize("name", ["16.png", "16.tif", "f.tif", "a.npy"])
def test_gray_files_of_all_decoders(tmp_path, name):
    values = scene(1)[..., 0]
    if name == "a.npy":
        np.save(tmp_path / name, values)
    else:
        Image.fromarray(values.astype(np.float32) if name == "f.tif" else values).save(tmp_path / name)
    expected = ((values.astype(float) - 500) / 5500).clip(0, 1)
    shares = crop_of(tmp_path / name, Reading([[500, 6000]]))
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares, expected[None], atol=1e-7)
    np.testing.assert_array_equal(crop_of(tmp_path / name, Reading([[500, 6000]] * 3), 3), shares.repeat(3, axis=0))


def test_color_is_read_as_gray_by_its_weights(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", scene(2, bands=3), photometric="rgb")
    weights = np.array((0.299, 0.587, 0.114))
    expected = (scene(2, bands=3) / 65535) @ weights
    np.testing.assert_allclose(crop_of(tmp_path / "a.tif", Reading([[0, 65535]]), 1)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "transform, function", [("none", lambda x: x), ("sqrt", np.sqrt), ("log", np.log1p), ("asinh", np.arcsinh)]
)
def test_transforms(transform, function):
    values, scale = np.linspace(0, 50, 401), 1000 if transform in ("log", "asinh") else 1
    expected = function(scale * (values - 10).clip(0, 30) / 30) / function(np.float64(scale))
    np.testing.assert_allclose(as_shares(values, 10, 40, transform), expected, atol=1e-6)
    # The table of uint16 is the same function.
    many = np.arange(2**16 + 4, dtype=np.uint16).reshape(2, -1)
    np.testing.assert_array_equal(as_shares(many, 10, 999, transform), as_shares(many.astype(np.int64), 10, 999, transform))


def test_a_brighter_copy_stays_brighter(tmp_path):
    """Ten times as bright, ten times the values above black, in one collection; stretched by image they were the same."""
    for number in range(4):
        values = scene(number, level=200)[..., 0]
        Image.fromarray(values).save(tmp_path / f"{number}a.png")
        Image.fromarray(values * 10).save(tmp_path / f"{number}b.png")
    measured = measure_images(source_of(tmp_path), reading=AUTO)
    low, high = measured.reading.range[0]
    dim, bright = (crop_of(tmp_path / f"2{letter}.png", measured.reading) for letter in "ab")
    inside = (dim > 0) & (bright < 1)
    assert inside.mean() > 0.9
    ratio = (bright[inside] * (high - low) + low) / (dim[inside] * (high - low) + low)
    np.testing.assert_allclose(ratio, 10, rtol=1e-3)


def test_a_hot_pixel_moves_nothing_else(tmp_path):
    """No other pixel by more than a thousandth of the range, in a collection of eight images."""
    for number in range(8):
        Image.fromarray(scene(number)[..., 0]).save(tmp_path / f"{number}.png")
    before = measure_images(source_of(tmp_path), reading=AUTO).reading
    shares = crop_of(tmp_path / "3.png", before)
    values = scene(3)[..., 0]
    values[20, 20] = 65535
    Image.fromarray(values).save(tmp_path / "3.png")
    after = measure_images(source_of(tmp_path), reading=AUTO).reading
    difference = np.abs(crop_of(tmp_path / "3.png", after) - shares)[0]
    assert difference[20, 20] > 0.1
    difference[20, 20] = 0
    assert difference.max() <= 1e-3
    # Shrunk, it is one white pixel of those averaged, not 16 times the range.
    picture = open_picture(record_of(tmp_path / "3.png"), 1, reading=after)
    shrunk = picture.crop((0, 0, 48, 40), (5, 6)).numpy()[0] - shares[0].reshape(5, 8, 6, 8).mean(axis=(1, 3))
    assert np.abs(shrunk).max() < 0.25


def test_channels_have_ranges_of_their_own(tmp_path):
    """A dim channel beside a bright one keeps its contrast; a constant one has a range too."""
    for number in range(3):
        bands = scene(number, bands=3)
        bands[..., 1] //= 50
        bands[..., 2] = 7
        tifffile.imwrite(tmp_path / f"{number}.tif", bands, photometric="minisblack", planarconfig="contig")
    measured = measure_images(source_of(tmp_path), reading=AUTO)
    (_, bright), (_, dim), constant = measured.reading.range
    assert 30 < bright / dim < 80 and constant == (7, 8)
    assert measured.std[1] > 0.1 and measured.mean[2] == 0
    assert all(sum(histogram) == pytest.approx(1) for histogram in measured.histograms)


def test_eight_bit_images_stay_levels(tmp_path):
    """By default; and a deep image among them does not darken the others."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert measure_images(source_of(tmp_path), reading=AUTO).reading.range == "image"
    assert measure_images(source_of(tmp_path), reading=Reading("type")).reading == Reading("type")
    Image.fromarray(pixels.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.warns(Notice, match=r"^1 of 4 images looked at is deeper than 8 bits"):
        assert measure_images(source_of(tmp_path), reading=AUTO).reading.range == "image"
    by_type = (pixels[None] * (256 / 65535) * 255).round()
    np.testing.assert_array_equal(crop_of(tmp_path / "deep.png", Reading("type")), by_type)
    # With a transform or numbers 8-bit images become shares too.
    shares = crop_of(tmp_path / "0.png", Reading([[0, 255]], "sqrt"))
    np.testing.assert_allclose(shares[0], np.sqrt(pixels / 255), atol=1e-6)


def test_type_takes_the_whole_range_and_types_that_differ_are_told(tmp_path):
    np.save(tmp_path / "a.npy", scene(0)[..., 0].astype(np.int16))
    records = {0: record_of(tmp_path / "a.npy")}
    assert settle_reading(Reading("type"), records, None).range == ((-32768, 32767),)
    np.save(tmp_path / "b.npy", scene(0)[..., 0])
    with pytest.warns(Notice, match="1 image of int16, 1 image of uint16"):
        assert settle_reading(Reading("type"), {**records, 1: record_of(tmp_path / "b.npy")}, 1).range == ((-32768, 65535),)


def test_counts_that_differ_are_told_apart_and_counted(tmp_path):
    for number, bands in enumerate((3, 5, 5)):
        np.save(tmp_path / f"{number}.npy", scene(number, bands=bands))
    with pytest.raises(ValueError, match=r"0\.npy has 3 \(1 image\), .*1\.npy has 5 \(2 images\)"):
        measure_images(source_of(tmp_path), reading=AUTO)


# --- no data -----------------------------------------------------------------------------------------------------------


def test_no_data_is_neither_read_nor_resized(tmp_path):
    """Pixels beside a hole are averages of those that have data; the hole stays a hole, and counts in no statistic."""
    values = np.full((32, 32), 10, np.float32)
    values[:, 16:] = np.nan
    values[0, :8] = 20
    np.save(tmp_path / "a.npy", values)
    measured = measure_images(source_of(tmp_path), reading=Reading([[0, 40]]))
    assert measured.missing == (0.5,)
    assert measured.mean[0] == pytest.approx(np.nanmean(values) / 40, abs=1e-4)
    assert measured.std[0] == pytest.approx(np.nanstd(values) / 40, abs=1e-4)
    shrunk = open_picture(record_of(tmp_path / "a.npy"), None, reading=Reading([[0, 40]])).crop((0, 0, 32, 32), (6, 6))
    assert shrunk[0, 2:].isnan().sum() == 4 * 3 and not shrunk[0, :, :3].isnan().any()
    np.testing.assert_allclose(shrunk[0, 2:, :3], 0.25, atol=1e-6)
    assert torch.equal(normalize(shrunk[None], (0.25,), (0.1,))[0, 0, 2:], torch.zeros(4, 6))
    assert torch.equal(valid_pixels(shrunk), ~shrunk.isnan()) and valid_pixels(shrunk.to(torch.uint8)) is None


def test_the_loss_is_over_pixels_with_data_alone():
    """Against the definition, whatever stands where there is none, on both ways of computing it."""
    generator = torch.Generator().manual_seed(0)
    config = SwinV2Config(8, (1, 1), (1, 1), window_size=4, in_channels=2)
    decoder = PixelDecoder(SwinV2(config))
    stride, patch = config.strides[-1], config.patch_size
    features = torch.randn(3, config.channels[-1], 4, 4, generator=generator)
    targets = torch.randn(3, 2, 4 * stride, 4 * stride, generator=generator)
    valid = torch.rand(targets.shape, generator=generator) < 0.7
    mask = (torch.rand(3, 4, 4, generator=generator) < 0.5).repeat_interleave(stride // patch, 1)
    mask = mask.repeat_interleave(stride // patch, 2)
    prediction = decoder.predict(features, tuple(targets.shape[-2:]))
    counted = valid & mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    expected = (prediction - targets).abs()[counted].mean()
    targets[~valid] = 1e6
    for given in (None, prediction):
        torch.testing.assert_close(decoder.loss(features, targets, mask, given, valid), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked_l1(prediction, targets, mask, patch, valid), expected, rtol=1e-5, atol=1e-6)


def test_targets_are_normalized_by_pixels_with_data_alone():
    """Sliding mean and deviation against a loop."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 1, 9, 11, generator=generator)
    valid = torch.rand(images.shape, generator=generator) < 0.6
    mean, deviation = sliding_statistics(images, 5, valid)
    for row in range(9):
        for column in range(11):
            rows, columns = slice(max(row - 2, 0), row + 3), slice(max(column - 2, 0), column + 3)
            near = images[0, 0, rows, columns][valid[0, 0, rows, columns]].double()
            assert mean[0, 0, row, column].item() == pytest.approx(near.mean().item(), abs=1e-6)
            assert deviation[0, 0, row, column].item() == pytest.approx((near.var() + 1e-6).sqrt().item(), abs=1e-5)


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, line",
    [
        (("--data.range", "wide"), "data.range is 'wide': give auto, type, image, or [low, high] of each channel"),
        (("--data.range", "[[9, 3]]"), "with low < high"),
        (("--data.range", "[[0, 9], [0, 9]]"), "data.range has 2 ranges and the images have 1 channel, as"),
        (("--data.transform", "cube"), "unknown data.transform 'cube': give one of none, log, sqrt, asinh"),
        (("--data.range", "image", "--data.transform", "log"), "data.transform needs one range for all images"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, capsys, words, line):
    (tmp_path / "images").mkdir()
    Image.fromarray(scene(0)[..., 0]).save(tmp_path / "images" / "0.png")
    assert main(["pretrain", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert line in lines[-1] and "Traceback" not in "".join(lines)


def test_runs_of_version_0_1_go_on_as_they_were():
    """Without the setting, images are stretched each by its own values."""
    assert DataSettings("x").range == "auto" and DataSettings(**DataSettings.earlier, path="x").reading == Reading()
    assert DataSettings("x").with_reading(Reading([[1, 2]], "log")).reading == Reading([[1, 2]], "log")


# --- end to end --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Twelve images of five 16-bit channels, in two classes that differ by brightness alone."""
    folder = tmp_path_factory.mktemp("deep")
    for number in range(12):
        values = scene(number, bands=5) // (1 + 3 * (number % 2))
        file = io.BytesIO()
        tifffile.imwrite(file, values, photometric="minisblack", planarconfig="contig")
        for place in (folder / "unlabeled", folder / "labeled" / ("bright", "dim")[number % 2]):
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.tif").write_bytes(file.getvalue())
    return folder


@pytest.fixture(scope="module")
def run(collection):
    """An encoder pre-trained on them."""
    words = ("--preset", "nano", "--model.encoder", TOY, "--image-size", "32", "--epochs", "1", "--batch-size", "6")
    out = collection / "run"
    assert main(["pretrain", "--data", str(collection / "unlabeled"), "--out", str(out), *words, "--workers", "0"]) == 0
    return out


def test_one_range_holds_from_pretraining_to_prediction(collection, run, capsys):
    stored = json.loads((run / "encoder" / "config.json").read_text(encoding="utf-8"))["preprocessing"]["reading"]
    assert len(stored["range"]) == 5
    assert main(["pretrain", "--out", str(run), "--resume"]) == 0
    words = ("--init", str(run), "--epochs", "2", "--batch-size", "6", "--workers", "0", "--seed", "0")
    classifier = collection / "classifier"
    data = ("--data", str(collection / "labeled"), "--out", str(classifier))
    assert main(["finetune", "classification", *data, *words]) == 0
    of_classifier = json.loads((classifier / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert of_classifier["preprocessing"]["reading"] == stored
    images = str(collection / "unlabeled")
    for command in (
        ("predict", "--run", str(classifier), "--images", images, "--out", str(collection / "classes.csv")),
        ("embed", "--run", str(run), "--images", images, "--out", str(collection / "vectors.parquet"), "--workers", "0"),
        ("reconstruct", "--run", str(run), "--images", images, "--out", str(collection / "seen.png"), "--count", "2"),
        ("knn", "--run", str(run), "--data", str(collection / "labeled"), "--workers", "0", "--k", "3"),
        ("check-data", images, "--workers", "0"),
    ):
        assert main(list(command)) == 0, command
    printed = capsys.readouterr().out
    low, high = stored["range"][4]
    assert f"4  {low:,.6g} to {high:,.6g}" in printed and "uint16 × 5 12" in printed


def test_an_onnx_file_says_how_its_images_are_read(collection, run):
    onnx = pytest.importorskip("onnx")
    assert main(["export", "--run", str(run), "--format", "onnx", "--out", str(collection / "onnx")]) == 0
    model = onnx.load(str(collection / "onnx" / "model.onnx"))
    metadata = {item.key: json.loads(item.value) for item in model.metadata_props}
    stored = json.loads((run / "encoder" / "config.json").read_text(encoding="utf-8"))["preprocessing"]
    assert metadata["preprocessing"] == stored and len(stored["reading"]["range"]) == 5
    assert "values " in (collection / "onnx" / "README.md").read_text(encoding="utf-8")


def test_a_transformers_processor_takes_shares(collection, run, tmp_path, capsys):
    """It divides nothing by 255, and the export says what it takes; values are normalized as here."""
    assert main(["export", "--run", str(run), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    printed = capsys.readouterr().out
    assert "transformers' processor only normalizes: give it images of 32×32 px whose values are shares" in printed
    written = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert (written["do_rescale"], written["do_resize"]) == (False, False)
    transformers = pytest.importorskip("transformers")
    preprocessing = Preprocessing((32, 32), (0.2, 0.3, 0.4), (0.1, 0.2, 0.3), reading=Reading([[0, 4095]] * 3))
    config = processor_config(preprocessing)
    processor = getattr(transformers, config.pop("image_processor_type"))(**config)
    shares = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = processor(shares.numpy(), input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given, normalize(shares, preprocessing.mean, preprocessing.std), atol=1e-6, rtol=1e-6)
