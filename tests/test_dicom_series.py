"""Folders of whole slides in DICOM: the finest level is the slide, other levels are left aside, labels are never read."""

import os

import numpy as np
import pytest
from image_files import notices, photo

pytest.importorskip("pydicom")

from dicom_files import write_dicom_series, write_dicom_slide

from simmim.cli import main
from simmim.data import UNREADABLE, find_images, index_folder, open_images
from simmim.data import index as index_module
from simmim.data.decode import count_images, open_picture, open_windows
from simmim.data.dicom_series import find_aside
from simmim.reading import AUTO, Reading

TOLD = "left aside: 2 coarser levels, 1 label, 1 overview, 1 thumbnail"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def series(tmp_path):
    """The files of one slide, older than an index trusts at once."""
    folder = write_dicom_series(tmp_path / "slide", photo(128, 160))
    os.utime(folder, (1e9, 1e9))
    return folder


def names_of(source):
    return [os.path.basename(record["path"]) for record in source["image"]]


def test_a_series_is_one_slide_as_openslide_reads_it(series):
    openslide = pytest.importorskip("openslide")
    found = find_aside([str(path) for path in sorted(series.iterdir())])
    slide = openslide.OpenSlide(str(series / "label.dcm"))  # OpenSlide takes any file for all
    beside = {os.path.basename(path): kind for path, kind in found.items()}
    assert {kind for kind in beside.values() if kind != "coarser level"} == {
        {"macro": "overview"}.get(name, name) for name in slide.associated_images
    }
    assert [name for name, kind in beside.items() if kind == "coarser level"] == ["2.dcm", "4.dcm"]
    image = open_windows({"bytes": None, "path": str(series / "1.dcm")}, reading=AUTO)
    assert image.levels[0] == slide.dimensions[::-1]
    region = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    np.testing.assert_array_equal(image.read(0, (0, 0, 160, 128)).values, region.transpose(2, 0, 1))
    image.close()


def test_a_folder_says_what_it_leaves_aside(series, tmp_path):
    for _ in range(2):  # the second time from the kept index
        index, told = notices(index_folder, series)
        assert names_of(index) == ["1.dcm"] and sum(TOLD in line for line in told) == 1
    paths, told = notices(find_images, tmp_path)
    assert [os.path.basename(path) for path in paths] == ["1.dcm"] and sum(TOLD in line for line in told) == 1


@pytest.mark.parametrize("pattern", ["*.dcm", "*"])
def test_a_glob_says_it_too(series, pattern):
    images, told = notices(open_images, str(series / pattern))
    assert names_of(images) == ["1.dcm"] and sum(TOLD in line for line in told) == 1


def test_a_coarser_level_that_is_asked_for_is_read(series):
    assert names_of(open_images(str(series / "4.dcm"))) == ["4.dcm"]
    assert names_of(open_images(str(series / "[24].dcm"))) == ["2.dcm"]


def test_check_data_tells_it(series, capsys):
    assert main(["check-data", str(series), "--workers", "0", "--tile", "32"]) == 0
    printed = capsys.readouterr()
    assert TOLD in printed.out + printed.err and "1 image," in printed.out and "20 an epoch" in printed.out


def test_what_is_no_level_of_another_stays(tmp_path):
    """Other series, optical paths in files of their own, and another part of the glass at the same size of a pixel."""
    write_dicom_series(tmp_path / "a", photo(128, 160), reductions=(1,), beside=(), SeriesInstanceUID="1.2.3")
    same = {"SeriesInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    write_dicom_slide(tmp_path / "a" / "path.dcm", [photo(128, 160)], **same)
    write_dicom_slide(tmp_path / "a" / "region.dcm", [photo(64, 80)], **same)
    write_dicom_slide(tmp_path / "a" / "shape.dcm", [photo(64, 40)], mm_per_px=0.001, **same)
    write_dicom_slide(tmp_path / "a" / "series.dcm", [photo(64, 80)], mm_per_px=0.001, SeriesInstanceUID="1.2.5")
    write_dicom_slide(tmp_path / "a" / "level.dcm", [photo(43, 53)], mm_per_px=0.0015, **same)
    aside = find_aside([str(path) for path in (tmp_path / "a").iterdir()])
    assert aside == {str(tmp_path / "a" / "level.dcm"): "coarser level"}


@pytest.mark.parametrize("kind", ["LABEL", "OVERVIEW", "THUMBNAIL", "LOCALIZER"])
def test_labels_are_never_read(tmp_path, kind):
    """Whatever names them: a list, a Parquet file, their own path."""
    path = write_dicom_slide(tmp_path / "a.dcm", [photo(32, 32)], ImageType=["ORIGINAL", "PRIMARY", kind, "NONE"])
    for record in ({"bytes": None, "path": str(path)}, {"bytes": path.read_bytes(), "path": "a.dcm"}):
        for reading in (AUTO, Reading(pages="images"), Reading(pages="first")):
            for opened in (lambda *how: open_picture(how[0], 3, reading=how[1]), count_images):
                with pytest.raises(UNREADABLE, match="of a DICOM slide, which is never read") as caught:
                    opened(record, reading)
                assert "\n" not in str(caught.value)
            with pytest.raises(UNREADABLE, match="which is never read"):
                open_windows(record, reading=reading)


def test_a_slide_whose_picture_has_the_label_in_it_is_not_read(tmp_path):
    path = write_dicom_slide(tmp_path / "a.dcm", [photo(32, 32)], SpecimenLabelInImage="YES")
    with pytest.raises(UNREADABLE, match=r"the label of a DICOM slide, .*SpecimenLabelInImage YES"):
        open_picture({"bytes": None, "path": str(path)}, 3)
    assert find_aside([str(path)]) == {str(path): "label"}


def test_a_folder_of_labels_alone_is_refused(tmp_path, capsys):
    write_dicom_series(tmp_path / "slide", photo(32, 32), reductions=())
    assert main(["check-data", str(tmp_path / "slide"), "--workers", "0"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "holds no slide, but what lies beside DICOM slides: 1 label, 1 overview, 1 thumbnail" in lines[-1]


def test_an_index_of_before_pydicom_was_installed_is_made_anew(series, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(index_module, "find_aside", lambda paths: {})
        without.setattr(index_module, "find_spec", lambda name: None)
        assert len(index_folder(series)) == 6
    assert names_of(index_folder(series)) == ["1.dcm"]
