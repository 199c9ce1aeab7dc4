"""Every kind of source gives the same images; indices notice changes; labels from folders, CSV, Parquet and datasets."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from simmim.data import find_images, index_folder, open_images, open_picture, open_source, read_labeled_images
from simmim.data.index import Scan, cache_folder
from simmim.data.readers import READERS, Reader

COUNT = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture_bytes(value):
    """A picture of 4 × 6 px, all of one value."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for value in range(COUNT):
        path = tmp_path / "images" / f"part {value % 3}" / f"{value:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(value))
    return tmp_path / "images"


def values(images):
    """The pictures' values, in order."""
    return [int(open_picture(row["image"], 3).crop((0, 0, 6, 4), (4, 6))[0, 0, 0]) for row in images]


IN_FOLDER_ORDER = [value for part in range(3) for value in range(part, COUNT, 3)]


def as_parquet(path):
    rows = [{"bytes": picture_bytes(value), "path": None} for value in range(COUNT)]
    data = datasets.Dataset.from_dict({"number": list(range(COUNT)), "photo": rows})
    data.cast_column("photo", datasets.Image()).to_parquet(path)


def as_tars(home, shards=3):
    home.mkdir()
    for shard in range(shards):
        with tarfile.open(home / f"shard-{shard}.tar", "w") as tar:
            for value in range(shard * COUNT // shards, (shard + 1) * COUNT // shards):
                for ending, data in (("png", picture_bytes(value)), ("cls", str(value % 2).encode())):
                    member = tarfile.TarInfo(f"{value:03d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def test_the_index_is_in_the_order_of_the_paths(folder):
    assert values(index_folder(folder)) == IN_FOLDER_ORDER
    paths = [row["image"]["path"] for row in index_folder(folder)]
    assert paths == sorted(paths) == find_images(folder)


def test_files_sort_with_folders_as_paths_do(tmp_path):
    for name in ("a.png", "a/b.png", "a-.png", "B.png", "a/c/d.png", "ä.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(Scan(tmp_path)) == sorted(str(path) for path in tmp_path.rglob("*.png"))


def age(folder, seconds=10):
    """Set the time stamps of all folders back; an index does not trust folders that changed just before."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        status = path.stat()
        os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


def test_a_cached_index_is_used_until_the_folder_changes(folder, monkeypatch):
    age(folder)
    first = index_folder(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Scan, "__iter__", lambda self: pytest.fail("scanned again"))
        assert values(index_folder(folder)) == values(first)
    (folder / "part 1" / "new.png").write_bytes(picture_bytes(77))
    assert sorted(values(index_folder(folder))) == [*range(COUNT), 77]
    (folder / "part 0" / "00.png").unlink()
    assert 0 not in values(index_folder(folder))
    (folder / "new folder").mkdir()
    (folder / "new folder" / "x.png").write_bytes(picture_bytes(88))
    assert 88 in values(index_folder(folder))


def test_a_folder_that_just_changed_is_scanned_again(folder):
    """A file added in the same tick of the clock as the scan does not change the folder's time stamp."""
    index_folder(folder)
    before = (folder / "part 0").stat()
    (folder / "part 0" / "late.png").write_bytes(picture_bytes(99))
    os.utime(folder / "part 0", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert 99 in values(index_folder(folder))


def test_a_damaged_index_is_built_again(folder):
    age(folder)
    index_folder(folder)
    [arrow] = cache_folder().glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert values(index_folder(folder)) == IN_FOLDER_ORDER


def test_without_a_cache_folder_the_index_lives_in_memory(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert values(index_folder(folder)) == IN_FOLDER_ORDER


def test_a_loop_of_links_is_entered_once(folder):
    (folder / "part 0" / "up").symlink_to(folder, target_is_directory=True)
    assert sorted(values(index_folder(folder))) == list(range(COUNT))


def test_every_kind_of_source_gives_the_same_images(folder, tmp_path, monkeypatch):
    as_parquet(tmp_path / "set.parquet")
    as_tars(tmp_path / "tars")
    open_images(tmp_path / "set.parquet").save_to_disk(tmp_path / "saved")
    listed = "\n".join(["# paths", *(os.path.relpath(path, tmp_path) for path in find_images(folder)), ""])
    (tmp_path / "list.txt").write_text(listed)
    everything = list(range(COUNT))
    for source in (
        folder,
        tmp_path / "list.txt",
        f"{folder}/*/*.png",
        f"{folder}/**/*.png",
        tmp_path / "set.parquet",
        tmp_path / "tars",
        f"{tmp_path}/tars/shard-?.tar",
        tmp_path / "saved",
        [f"{folder}/part 0", f"{folder}/part 1", f"{folder}/part 2"],
    ):
        source = source if isinstance(source, list) else str(source)
        assert sorted(values(open_images(source))) == everything, source
        stream = open_source(source, streaming=True)
        assert stream.num_images == COUNT, source
        assert sorted(values(stream.images)) == everything, source
        assert sorted(values(stream.head)) == everything, source
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: datasets.load_from_disk(str(tmp_path / "saved")))
    assert sorted(values(open_images("someone/their-pictures"))) == everything


def test_columns_are_detected_named_or_listed(tmp_path):
    as_parquet(tmp_path / "set.parquet")
    path = str(tmp_path / "set.parquet")
    assert sorted(values(open_images(path, "photo"))) == list(range(COUNT))
    with pytest.raises(ValueError, match="no column 'foto': its columns are number, photo"):
        open_images(path, "foto")
    datasets.Dataset.from_dict({"number": [1], "text": ["a"]}).to_parquet(tmp_path / "words.parquet")
    with pytest.raises(ValueError, match="no column of images: its columns are number, text"):
        open_images(str(tmp_path / "words.parquet"))


def test_the_hub_without_network_is_an_error_with_a_remedy(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/pictures' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"someone/pictures.*Couldn't reach.*save_to_disk"):
        open_images("someone/pictures")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "does not exist: give a folder of images, a glob"),
        ("*.png", None, "no file matches"),
        ("notes.md", b"text", "nothing that images can be read from"),
        ("list.txt", b"\n# nothing\n", "lists no images"),
        ("list.txt", b"\xff\xfe\x00", "no text file of paths"),
        ("torn.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("torn.tar", b"no tar", "cannot be read as"),
    ],
)
def test_invalid_sources_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_images(str(tmp_path / name))


def test_a_file_name_that_is_no_valid_text_is_named(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(picture_bytes(1))
    with pytest.raises(ValueError, match=r"udcff\.png' is not valid UTF-8: rename"):
        index_folder(tmp_path)


def test_labels_from_csv_parquet_and_splits_are_those_of_the_folders(tmp_path):
    for value in range(20):
        path = tmp_path / "folders" / ("odd" if value % 2 else "even") / f"{value:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(value))
    rows = [(path, path.parent.name) for path in sorted((tmp_path / "folders").rglob("*.png"))]
    lines = [f"{path.relative_to(tmp_path)},{label}" for path, label in rows]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class", *lines]))
    (tmp_path / "spreadsheet.csv").write_text("\n".join(["\ufefffile;class", *(line.replace(",", ";") for line in lines)]))
    data = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": Path(path).read_bytes(), "path": None} for path, _ in rows],
            "label": [["even", "odd"].index(label) for _, label in rows],
        }
    )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    data = data.cast(features)
    data.to_parquet(tmp_path / "labels.parquet")
    data.save_to_disk(tmp_path / "saved")
    expected = None
    for source in ("folders", "labels.csv", "spreadsheet.csv", "labels.parquet", "saved"):
        labels = read_labeled_images(tmp_path / source, labels_per_class=3, seed=7)
        assert labels.classes == ("even", "odd")
        assert [value % 2 for value in values(labels.train)] == labels.train["label"]
        assert [value % 2 for value in values(labels.validation)] == labels.validation["label"]
        got = values(labels.train), values(labels.validation)
        assert len(got[0]) == 6
        assert len(got[1]) == 4
        assert not set(got[0]) & set(got[1])
        expected = expected or got
        assert got == expected, "the same seed chooses the same images, wherever they come from"
    datasets.DatasetDict(train=data.select(range(16)), test=data.select(range(16, 20))).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="all images have the label 'odd'"):
        read_labeled_images(tmp_path / "splits", None, seed=0)


def test_labels_that_cannot_work(tmp_path):
    (tmp_path / "x.png").write_bytes(picture_bytes(1))
    for content, message in (
        ("path,label\nx.png,a\nx.png,b\nx.png,b\n", "class 'a' has 1 image"),
        ("path,label\nx.png,a\nx.png,a\n", "all images have the label 'a'"),
        ("path,kind\nx.png,a\n", "its columns are path, kind; give data.label_column"),
        ("path,label\nx.png,\n", "line 2 has no label"),
    ):
        (tmp_path / "labels.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_labeled_images(tmp_path / "labels.csv", None, seed=0)


class ZipReader(Reader):
    """A toy kind of source: a zip of PNG files whose names begin with their label."""

    description = "a zip of PNG files"

    def detect(self, location):
        return list(location.entries) if location.path.endswith(".zip") and location.exists else None

    def read(self, files):
        with zipfile.ZipFile(files[0]) as archive:
            rows = [
                {"picture": {"bytes": archive.read(name), "path": name}, "label": name.split("-")[0]}
                for name in sorted(archive.namelist())
            ]
        features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("string")})
        return datasets.Dataset.from_list(rows, features=features)


def test_a_new_kind_of_source_is_a_reader_and_a_line(tmp_path, monkeypatch):
    """Images, streams and labels of it are read, and the error messages name it."""
    path = str(tmp_path / "set.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for value in range(COUNT):
            archive.writestr(f"{'odd' if value % 2 else 'even'}-{value:02d}.png", picture_bytes(value))
    with pytest.raises(ValueError, match="nothing that images can be read from"):
        open_images(path)
    monkeypatch.setitem(READERS, "zip", ZipReader())
    everything = list(range(COUNT))
    assert sorted(values(open_images(path))) == sorted(values(open_images([path]))) == everything
    stream = open_source(path, streaming=True)
    assert stream.num_images == COUNT and sorted(values(stream.images)) == everything
    labels = read_labeled_images(path, labels_per_class=None, seed=0)
    assert labels.classes == ("even", "odd")
    assert [value % 2 for value in values(labels.train)] == labels.train["label"]
    with pytest.raises(ValueError, match=r"does not exist: give a folder of images, .* or a zip of PNG files$"):
        open_images(str(tmp_path / "gone"))


def test_the_most_special_reader_reads(folder, tmp_path, monkeypatch):
    """A folder that a new reader detects is no longer read as a folder of images."""

    class Marked(ZipReader):
        def detect(self, location):
            return [location.path] if location.is_folder and (Path(location.path) / "marker").exists() else None

        def read(self, files):
            return index_folder(files[0]).select([0])

    monkeypatch.setitem(READERS, "marked", Marked())
    assert len(open_images(str(folder))) == COUNT
    (folder / "marker").touch()
    assert len(open_images(str(folder))) == 1
