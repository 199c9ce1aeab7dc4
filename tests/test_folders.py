"""Folders of images: which files are found, in which order, and which folders are refused."""

import os

import pytest
from image_files import write_empty

from simmim.data import find_images


def test_all_images_below_a_folder_are_found(tmp_path):
    """Nested, upper case, odd names, uncommon extensions; sorted by path; nothing hidden and nothing else."""
    images = ["b.png", "a/z.JPG", "a/deep/er/x.tiff", "ä ö %2F.jpeg", "a.b.webp", "new\nline.pgm", "-f.bmp", "#.jfif"]
    write_empty(*(tmp_path / name for name in images))
    hidden = [".hidden.png", ".folder/x.png", "a/.thumbs/y.jpg"]
    write_empty(*(tmp_path / name for name in [*hidden, "notes.txt", "png", "x.png.part", "a/z.json"]))
    assert find_images(tmp_path) == sorted(str(tmp_path / name) for name in images)
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_links_are_followed_once(tmp_path):
    """A loop ends, a folder reached twice counts once, a linked file and a folder elsewhere count, a dead link does not
    stop the search."""
    write_empty(tmp_path / "set/a/1.png", tmp_path / "elsewhere/2.png")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/self").symlink_to(".")
    (tmp_path / "set/again").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/dead").symlink_to(tmp_path / "nowhere")
    found = find_images(tmp_path / "set")
    assert sorted(os.path.basename(path) for path in found) == ["1.png", "2.png"]
    assert found == sorted(found)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    write_empty(tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images("~") == [str(tmp_path / "x.png")]


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write_empty(*(tmp_path / name for name in ("text/a.txt", "text/deep/b.csv", "hidden/.x.png", "file.png")))
    for name, message in {
        "missing": "missing' does not exist: give a folder that holds images",
        "empty": "empty' is empty: give one with images .avif, bif, bmp, btf, czi, dcm, gif, heic, .* nested",
        "hidden": "hidden' is empty",
        "text": "text' holds 2 files but no image: give one with images",
        "file.png": "file.png' is a file: give a folder that holds images",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_images(tmp_path / name)
