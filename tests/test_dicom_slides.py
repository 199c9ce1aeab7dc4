"""Whole slides in DICOM: tiles of a file are one picture, as OpenSlide reads them, or the file is refused in one line."""

import numpy as np
import pytest
from image_files import photo

pytest.importorskip("pydicom")

from dicom_files import write_dicom_slide

from simmim.cli import main
from simmim.data import UNREADABLE
from simmim.data.decode import count_images, open_stored, open_windows
from simmim.reading import AUTO, Reading

BOX = (10, 5, 83, 66)


def record_of(path):
    return {"bytes": None, "path": str(path)}


def read(path, box=BOX, reading=AUTO):
    image = open_windows(record_of(path), reading=reading)
    try:
        return image.read(0, box)
    finally:
        image.close()


@pytest.mark.parametrize("jpeg, offsets", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("missing", [None, (1, 7)])
def test_a_slide_is_read_as_openslide_reads_it(tmp_path, jpeg, offsets, missing):
    """White where nothing was scanned."""
    openslide = pytest.importorskip("openslide")
    pixels = photo(70, 90)
    path = write_dicom_slide(tmp_path / "a.dcm", [pixels], jpeg=jpeg, offsets=offsets, missing=missing)
    left, top, right, bottom = BOX
    region = np.asarray(openslide.OpenSlide(str(path)).read_region((left, top), 0, (right - left, bottom - top)))
    expected = np.where(region[..., 3:] == 255, region[..., :3], 255)
    np.testing.assert_array_equal(read(path).values, expected.transpose(2, 0, 1))
    assert (region[..., 3] == 0).any() == (missing is not None)
    if not jpeg and missing is None:
        np.testing.assert_array_equal(expected, pixels[top:bottom, left:right])
    whole = open_stored(record_of(path), levels=True, reading=AUTO).values
    np.testing.assert_array_equal(whole[:, top:bottom, left:right], read(path).values)
    image = open_windows(record_of(path), reading=AUTO)
    assert image.levels == ((70, 90),) and image.pixel_size == 0.5
    image.close()


@pytest.mark.parametrize("missing", [None, (3,)])
def test_optical_paths_are_channels(tmp_path, missing):
    paths = [np.random.default_rng(number).integers(0, 60000, (40, 50)).astype(np.uint16) for number in range(3)]
    path = write_dicom_slide(tmp_path / "a.dcm", paths, missing=missing)
    expected = np.stack(paths)[:, 5:40, 10:50]
    if missing:
        expected[:, :11, 38:] = 0  # tile 3 of the first row begins at column 48
    values = read(path, (10, 5, 50, 40)).values
    assert values.dtype == np.uint16
    np.testing.assert_array_equal(values, expected)


def test_it_is_one_image_unless_tiles_are_asked_for(tmp_path):
    path = write_dicom_slide(tmp_path / "a.dcm", [photo(70, 90)])
    assert count_images(record_of(path), AUTO) == 1 and count_images(record_of(path), Reading(pages="images")) == 30
    tile = open_stored(record_of(f"{path}#page=7"), levels=True, reading=Reading(pages="images")).values
    np.testing.assert_array_equal(tile, photo(70, 90)[16:32, 16:32].transpose(2, 0, 1))


def test_check_data_counts_its_tiles(tmp_path, capsys):
    path = write_dicom_slide(tmp_path / "a.dcm", [photo(96, 128)])
    assert main(["check-data", str(path), "--workers", "0", "--tile", "32"]) == 0
    told = capsys.readouterr().out
    assert "1 image," in told and "DICOM 1" in told and "12 an epoch" in told and "1 slide" in told


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"TotalPixelMatrixFocalPlanes": 3}, "a DICOM slide of 3 planes of focus: give data.pages images"),
        ({"NumberOfFrames": 29}, "a DICOM slide of 29 tiles, expected 5 × 6 for each optical path"),
        ({"ConcatenationUID": "1.2.3"}, "a part of a DICOM slide, whose other tiles are in further files"),
        ({"DimensionOrganizationType": "TILED_SPARSE"}, "does not tell where its tiles lie"),
        ({"missing": (), "NumberOfOpticalPaths": 2}, "several tiles in one place"),
    ],
)
def test_what_is_not_read_is_told_in_a_line(tmp_path, changes, line):
    path = write_dicom_slide(tmp_path / "a.dcm", [photo(70, 90)], **changes)
    with pytest.raises(UNREADABLE, match=line) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UNREADABLE, match="more than the limit of 100: read it by tiles"):
        open_stored(record_of(path), max_pixels=100, levels=True, reading=AUTO)
