"""Images of equal content in pre-training and in validation are counted, from few bytes and in limited time."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import yaml
from image_files import notices

from simmim.data import dataset_from_paths, find_images, open_labeled_source
from simmim.data.duplicates import RowDigests, count_shared, report_shared
from simmim.evaluate.report import Comparison, draw_all
from simmim.training.shared_images import pretraining_images


def write(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


@pytest.fixture
def sources(tmp_path):
    """Unlabeled files, and four to validate with: two of them copies, one of a copy's size, one of its own."""
    first = write(tmp_path / "first", a=b"one", b=b"two!!", c=b"three and", d=b"", e=b"two!!")
    second = write(tmp_path / "second", x=b"one", y=b"two!!", z=b"eno", w=b"a size of its own", v=b"")
    return tuple(dataset_from_paths(find_images(folder)) for folder in (first, second))


def as_bytes(source):
    rows = [{"path": None, "bytes": Path(row["image"]["path"]).read_bytes()} for row in source]
    return datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))


def test_equal_files_are_counted(sources, monkeypatch):
    first, second = sources
    read, digest = [], RowDigests.digest
    monkeypatch.setattr(RowDigests, "digest", lambda self, row: read.append(row) or digest(self, row))
    assert count_shared(first, second) == (2, True)
    assert len(read) == 3 + 3, "of equal size alone, and each once"
    assert count_shared(first, as_bytes(second)) == count_shared(as_bytes(first), second) == (2, True)
    assert count_shared(first, second.select([1])) == (0, True)


def test_time_is_limited_and_the_limit_is_said(sources):
    first, second = sources
    assert count_shared(first, second, seconds=-1) == (0, False)
    _, lines = notices(report_shared, second, {"the pre-training images": first, "unknown": None})
    assert [line.split(":")[0] for line in lines] == ["2 of 5 validation images are also among the pre-training images"]
    assert notices(report_shared, second.select([1]), {"the pre-training images": first})[1] == []


def test_a_slow_disk(sources, monkeypatch):
    first, second = sources
    clock = iter(np.arange(0, 1000, 1.0))
    monkeypatch.setattr("simmim.data.duplicates.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    # 1 s passes at each look at the clock: five for `second`, and the sixth image of both together is too late.
    [line] = notices(report_shared, second, {"others": dataset_from_paths([row["image"]["path"] for row in first] * 3)})[1]
    assert line.startswith("at least 2 of 5 validation images are also among others")
    clock = iter(np.arange(0, 1000, 9.0))
    [line] = notices(report_shared, second, {"others": first})[1]
    assert line.startswith("whether validation images are also among others is open: 10 s were not enough")


def test_pretraining_images_of_a_run(sources, tmp_path):
    run, first = tmp_path / "run", tmp_path / "first"
    (run / "encoder").mkdir(parents=True)
    for path, expected in (
        (str(first), 5),
        ([str(first), str(tmp_path / "second")], 10),
        (f"{first}/*.png", 5),
        (str(tmp_path / "gone"), None),
        ("someone/pictures", None),
    ):
        for data in ({"path": path, "streaming": False, "column": None}, path):
            (run / "config.yaml").write_text(yaml.safe_dump({"data": data, "model": {}}))
            for init in (run, run / "encoder"):
                images = pretraining_images(str(init))
                assert (images and len(images)) == expected, (path, init)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(first), "streaming": True}, "model": {}}))
    assert pretraining_images(str(run)) is None
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(first)}, "head": {}}))
    assert pretraining_images(str(run)) is None, "a fine-tuning"
    (run / "config.yaml").write_text("[no settings")
    assert pretraining_images(str(run)) is pretraining_images(str(tmp_path / "nothing")) is None


def test_probe_and_knn_say_when_test_images_are_among_the_training_ones(tmp_path):
    """Of the images that are drawn, in parts of their own and held out of the training part."""
    for number in range(6):
        for part in ("train", "test"):
            for label in "ab":
                content = f"{label} {number if part == 'train' or number < 2 else number + 10}".encode()
                path = tmp_path / "parts" / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    (tmp_path / "one").mkdir()
    for label in "ab":
        write(tmp_path / "one" / label, **{name: b"equal of " + label.encode() for name in "pqrs"})
    for folder, text in (("parts", "4 of 12 test images are also among the training images"), ("one", "2 of 2 test images")):
        source = open_labeled_source(str(tmp_path / folder))
        comparison = Comparison(str(tmp_path / folder), "knn", None if folder == "parts" else 2, 0, 1)
        _, [line] = notices(draw_all, source, comparison)
        assert line.startswith(text)
