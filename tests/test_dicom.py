"""DICOM: pydicom's own test files, each read as pydicom reads it or refused in one line."""

import io
import os
from collections import Counter

import numpy as np
import pytest

from simmim.cli import main
from simmim.data import UNREADABLE, dataset_from_paths, measure_images, open_images, open_picture
from simmim.data.decode import count_images, open_stored
from simmim.messages import Notice
from simmim.reading import AUTO

pydicom = pytest.importorskip("pydicom")
FOLDER = os.path.join(os.path.dirname(pydicom.__file__), "data", "test_files")
FILES = sorted(os.path.join(folder, name) for folder, _, names in os.walk(FOLDER) for name in names)


def record_of(path):
    return {"bytes": None, "path": str(path)}


def pydicom_values(path, frame):
    """What pydicom makes of a frame of gray or RGB, (channels, height, width)."""
    dataset = pydicom.dcmread(path)
    values = pydicom.pixels.pixel_array(dataset, index=frame)
    if values.ndim == 3:
        return np.moveaxis(values, -1, 0)
    return pydicom.pixels.apply_modality_lut(values, dataset)[None]


def test_each_file_is_read_or_refused_in_one_line():
    """The last frame of those that are read is pydicom's; of 176 files, many without a picture, 81 are read, or more where
    further codecs are installed."""
    outcomes, compared = Counter(), 0
    for path in FILES:
        try:
            count = count_images(record_of(path), AUTO)
            record = record_of(path if count == 1 else f"{path}#page={count - 1}")
            stored = open_stored(record, levels=True, reading=AUTO)
        except UNREADABLE as error:
            assert str(error) and "\n" not in str(error), path
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        dataset = pydicom.dcmread(path)
        plain = dataset.PhotometricInterpretation not in ("MONOCHROME1", "PALETTE COLOR")
        if plain and "PixelPaddingValue" not in dataset:
            expected = pydicom_values(path, count - 1)
            np.testing.assert_array_equal(stored.values, expected.astype(stored.values.dtype), err_msg=path)
            np.testing.assert_allclose(stored.values, expected, rtol=1e-6, err_msg=path)
            compared += 1
    assert outcomes["read"] >= 81 and compared >= 66 and outcomes.total() == len(FILES)


def ct(**changes):
    """A slice of a CT as a file, with elements changed."""
    dataset = pydicom.dcmread(os.path.join(FOLDER, "CT_small.dcm"))
    for name, value in changes.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue(), dataset


def test_inverted_gray_and_padding(tmp_path):
    """MONOCHROME1 is turned about the middle of what can be stored; padding is no data."""
    data, dataset = ct(PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=175)
    stored = open_stored({"bytes": data, "path": None}).values[0]
    raw = dataset.pixel_array.astype(float)
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    expected = np.where(raw == 175, np.nan, (-1 - raw) * slope + 2 * intercept - intercept)
    assert (raw == 175).any() and stored.dtype == np.float32
    np.testing.assert_allclose(stored, expected)


def test_series_from_check_to_embeddings(tmp_path, capsys):
    """Slices in Hounsfield units by one range; frames of a file are images of their own."""
    for number in range(6):
        data, dataset = ct(RescaleIntercept=str(-1024 + 10 * number))
        (tmp_path / f"{number}.dcm").write_bytes(data)
    images = dataset_from_paths(sorted(map(str, tmp_path.glob("*.dcm"))))
    measured = measure_images(images, reading=AUTO)
    low, high = measured.reading.range[0]
    units = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    assert units.min() - 200 < low < units.min() + 50 and high > np.percentile(units, 99)
    picture = open_picture(images[5]["image"], 1, reading=measured.reading)
    shares = picture.crop((0, 0, 128, 128), (128, 128))[0].numpy()
    np.testing.assert_allclose(shares, ((units - low) / (high - low)).clip(0, 1), atol=1e-6)
    run = tmp_path / "run"
    toy = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'
    words = ("--preset", "nano", "--model.encoder", toy, "--image-size", "32", "--epochs", "1", "--batch-size", "6")
    command = [
        "pretrain",
        "--data",
        str(tmp_path / "*.dcm"),
        "--out",
        str(run),
        *words,
        "--workers",
        "0",
        "--data.turns",
        "true",
    ]
    assert main(command) == 0
    vectors = str(tmp_path / "vectors.parquet")
    assert main(["embed", "--run", str(run), "--images", str(tmp_path / "*.dcm"), "--out", vectors, "--workers", "0"]) == 0
    capsys.readouterr()
    assert main(["check-data", str(tmp_path / "*.dcm"), "--workers", "0"]) == 0
    assert "DICOM 6" in capsys.readouterr().out


def test_frames_are_images():
    path = next(path for path in FILES if os.path.basename(path) == "examples_ybr_color.dcm" or "rtdose.dcm" in path)
    with pytest.warns(Notice, match="^1 file holds [0-9]+ images"):
        images = open_images(path, reading=AUTO)
    assert len(images) == int(pydicom.dcmread(path).NumberOfFrames)
    last = open_stored(images[len(images) - 1]["image"], levels=True, reading=AUTO)
    np.testing.assert_allclose(last.values, pydicom_values(path, len(images) - 1), rtol=1e-6)


def test_without_pydicom(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"a DICOM file: pip install 'simmim-toolkit\[dicom\]'"):
        open_stored(record_of(os.path.join(FOLDER, "CT_small.dcm")))
