"""What reading a folder leaves out is said: folders that cannot be read, and files that are no images."""

import os
import warnings
from dataclasses import replace
from functools import partial

import pytest
from image_files import notices, write_empty

from simmim.cli import main
from simmim.data import find_images, index_folder, open_images, read_labeled_images
from simmim.data.index import Scan, cache_folder
from simmim.finetune.detection.labels.instances import find_maps
from simmim.finetune.detection.labels.layout import annotations_by_stem
from simmim.messages import Notice, notify


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Six images in two folders, older than an index trusts at once."""
    home = tmp_path / "images"
    write_empty(*(home / part / f"{number}.png" for part in ("a", "b") for number in range(3)))
    for path in (home, home / "a", home / "b"):
        os.utime(path, (1e9, 1e9))
    return home


@pytest.fixture
def deny(monkeypatch):
    """deny(path, error): listing that folder fails. deny(None): all is readable again."""
    scandir, listdir = os.scandir, os.listdir
    denied = {}

    def refuse(real):
        def listing(path="."):
            if str(path).rstrip("/") in denied:
                raise denied[str(path).rstrip("/")]
            return real(path)

        return listing

    monkeypatch.setattr(os, "scandir", refuse(scandir))
    monkeypatch.setattr(os, "listdir", refuse(listdir))

    def deny(path, error=None):
        denied.clear()
        if path is not None:
            denied[str(path)] = error or PermissionError(13, "Permission denied", str(path))

    return deny


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, OSError(5, "Input/output error"), TimeoutError()])
def test_a_folder_that_cannot_be_read_is_named_and_there_again_the_next_time(folder, deny, error):
    deny(folder / "b", error)
    images, lines = notices(index_folder, folder)
    reason = "Permission denied" if error is None else error.strerror or "TimeoutError"
    assert len(images) == 3 and len(lines) == 1
    assert f"without 1 folder that cannot be read: {folder / 'b'} ({reason}); its images are missing now" in lines[0]
    assert not list(cache_folder().iterdir()), "no index is stored that lacks a folder"
    deny(None)
    images, lines = notices(index_folder, folder)
    assert len(images) == 6 and not lines


def test_a_complete_index_survives_a_folder_that_cannot_be_read_for_a_moment(folder, deny, monkeypatch):
    assert len(index_folder(folder)) == 6
    before = {file.name: file.read_bytes() for file in cache_folder().iterdir()}
    deny(folder / "b")
    stat = os.stat

    def failing_stat(path, *args, **kwargs):
        if str(path) == str(folder / "b"):
            raise OSError(116, "Stale file handle")
        return stat(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing_stat)
        images, lines = notices(index_folder, folder)
    assert len(images) == 3 and "Stale file handle" in lines[0]
    assert {file.name: file.read_bytes() for file in cache_folder().iterdir()} == before
    deny(None)
    monkeypatch.setattr(Scan, "__iter__", lambda self: pytest.fail("scanned again"))
    assert notices(index_folder, folder)[1] == [] and len(index_folder(folder)) == 6


def test_without_a_cache_folder_the_lost_folder_is_named_too(folder, deny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    deny(folder / "b")
    images, lines = notices(index_folder, folder)
    assert len(images) == 3 and len(lines) == 1 and str(folder / "b") in lines[0]


def test_a_link_that_leads_nowhere_is_named(folder):
    """The share that it leads to may be mounted again: its folder's time stamp would not tell."""
    (folder / "share").symlink_to(folder.parent / "not mounted")
    os.utime(folder, (1e9, 1e9))
    images, lines = notices(index_folder, folder)
    assert len(images) == 6 and f"{folder / 'share'} (No such file or directory)" in lines[0]
    write_empty(*(folder.parent / "not mounted" / f"{number}.png" for number in range(2)))
    assert notices(index_folder, folder)[1] == [] and len(index_folder(folder)) == 8


def test_a_link_to_itself_costs_no_other_image(folder):
    (folder / "a" / "self").symlink_to(folder / "a" / "self")
    images, lines = notices(index_folder, folder)
    assert len(images) == 6 and "Too many levels of symbolic links" in lines[0]


def test_labeled_folders_and_globs_name_a_lost_folder(folder, deny):
    write_empty(folder / "a" / "deep" / "x.png")
    deny(folder / "a" / "deep")
    images, lines = notices(find_images, folder)
    assert len(images) == 6 and len(lines) == 1
    labels, lines = notices(read_labeled_images, folder, None, 0)
    assert labels.classes == ("a", "b") and len(lines) == 1 and str(folder / "a" / "deep") in lines[0]
    for pattern in (f"{folder}/**/*.png", f"{folder}/*/*/*.png"):
        deny(None)
        assert notices(open_images, pattern)[1] == []
        deny(folder / "a" / "deep")
        write_empty(folder / "b" / "deep" / "y.png")
        assert [str(folder / "a" / "deep") in line for line in notices(open_images, pattern)[1]] == [True], pattern


@pytest.mark.parametrize("labels, ending", [("labels", ".txt"), ("instances", ".png"), ("Annotations", ".xml")])
@pytest.mark.parametrize("lost", ["folder", "link"])
def test_images_whose_annotations_cannot_be_read_are_no_backgrounds(tmp_path, deny, labels, ending, lost):
    write_empty(*(tmp_path / "images" / name for name in ("0.png", "deep/1.png")))
    write_empty(*(tmp_path / labels / name for name in (f"0{ending}", f"deep/1{ending}")))
    deep = tmp_path / labels / "deep"
    if lost == "folder":
        deny(deep)
    else:  # to a share that is not mounted
        deep.rename(tmp_path / "share")
        deep.symlink_to(tmp_path / "not mounted")
    if labels == "instances":
        read = partial(find_maps, tmp_path / labels)
    else:
        read = partial(annotations_by_stem, tmp_path / labels, ending)
    with pytest.raises(ValueError, match=rf"annotations in '{deep}' cannot be read \(.*\), and their images would count as"):
        read()
    deny(None)
    if lost == "link":
        (tmp_path / "share").rename(tmp_path / "not mounted")
    assert [*read()] == ["0", "deep/1"]


def test_a_top_folder_that_cannot_be_read_is_an_error(folder, deny, capsys):
    deny(folder)
    for read in (index_folder, find_images, lambda path: open_images(str(path))):
        with pytest.raises(ValueError, match=r"cannot be read \(.*Permission denied\)"):
            read(folder)
    assert main(["check-data", str(folder)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("simmim: ") and str(folder) in line and "Permission denied" in line


def test_a_run_that_goes_on_with_other_images_says_so(folder, deny, tmp_path, power_cut):
    import numpy as np
    from PIL import Image

    from simmim.pretrain import DataSettings, PretrainSettings, SimMIMSettings, pretrain
    from simmim.pretrain.model import read_settings

    for number, path in enumerate(find_images(folder)):
        Image.fromarray(np.full((32, 32), number, np.uint8)).save(path)
    encoder = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    model = SimMIMSettings(mask_unit=8, encoder=encoder)
    common = {"preset": "nano", "epochs": 4.0, "batch_size": 2, "model": model, "save_every_steps": 1, "workers": 0}
    settings = PretrainSettings(data=DataSettings(str(folder)), out=str(tmp_path / "run"), **common)
    with power_cut(after_step=2):
        pretrain(settings)
    settings = replace(read_settings(tmp_path / "run"), resume=True)  # as the command does
    deny(folder / "b")
    os.utime(folder / "a")  # so that the index is built again
    with pytest.warns(Notice, match="goes on with other images than before: 6 then, 3 now"), power_cut(after_step=3):
        pretrain(settings)
    deny(None)
    os.utime(folder / "a")
    with pytest.warns(Notice, match="other images than before: 3 then, 6 now"), power_cut(after_step=4):
        pretrain(settings)
    (folder / "a" / "0.png").rename(folder / "a" / "00.png")
    with pytest.warns(Notice, match="other images than before: 6 then and now, with other names"), power_cut(after_step=5):
        pretrain(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        pretrain(settings)


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_of_other_endings_are_counted_by_ending(folder):
    write_empty(*(folder / "a" / f"{number}.TXT" for number in range(1200)))
    write_empty(*(folder / "b" / f"{number}.xyz" for number in range(3)), folder / "no ending of its own")
    expected = f"1,204 files in '{folder}' are not read: .txt 1,200, .xyz 3, no ending 1"
    assert notices(index_folder, folder)[1] == [expected]
    for path in (folder, folder / "a", folder / "b"):
        os.utime(path, (1e9, 1e9))
    index_folder(folder)
    assert notices(index_folder, folder)[1] == [expected], "a stored index says so too"
    assert notices(find_images, folder)[1] == [expected]


def test_labels_and_globs_count_them_once(folder):
    write_empty(folder / "a" / "x.xml", folder / "b" / "y.xml")
    assert notices(read_labeled_images, folder, None, 0)[1] == [f"2 files in '{folder}' are not read: .xml 2"]
    assert notices(open_images, f"{folder}/*/*")[1] == [f"2 files in '{folder}/*/*' are not read: .xml 2"]


def test_files_that_lie_beside_images_by_habit_are_no_news(folder):
    names = ("Thumbs.db", "desktop.ini", ".DS_Store", ".hidden.txt", "labels.csv", "README.md", "LICENSE", "classes.txt")
    write_empty(*(folder / "a" / name for name in names))
    assert notices(index_folder, folder)[1] == []


# --- notices ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_each_notice_once_as_a_line(monkeypatch, capsys):
    from simmim.cli import images

    def run(words):
        for _ in range(3):
            notify("three  files\nare not read; strict: true stops")
        warnings.warn("another kind", UserWarning, stacklevel=1)

    monkeypatch.setattr(images, "run_check_data", run)
    with pytest.warns(UserWarning, match="another kind"):
        assert main(["check-data"]) == 0
    assert capsys.readouterr().err == "simmim: note: three files are not read; --strict stops\n"
