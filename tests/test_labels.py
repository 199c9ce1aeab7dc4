"""Labeled folders: classes, the validation part, and a number of labels per class drawn by the seed."""

import random
from collections import Counter
from pathlib import Path

import pytest
from image_files import notices, write_empty

from simmim.data import find_images, open_labeled_source, read_labeled_images


def paths_and_labels(part):
    return list(zip([row["path"] for row in part["image"]], part["label"]))


def test_plain_class_folders_hold_out_a_fifth_of_each(tmp_path):
    for name, count in {"cat": 10, "dog": 5, "ant": 2, "bee": 19}.items():
        write_empty(*(tmp_path / name / f"{number}.png" for number in range(count)))
    labels = read_labeled_images(tmp_path, None, seed=0)
    assert labels.classes == ("ant", "bee", "cat", "dog")
    train, validation = paths_and_labels(labels.train), paths_and_labels(labels.validation)
    assert Counter(label for _, label in validation) == {0: 1, 1: 3, 2: 2, 3: 1}
    assert Counter(label for _, label in train) == {0: 1, 1: 16, 2: 8, 3: 4}
    assert sorted(path for path, _ in train + validation) == find_images(tmp_path)
    assert all(path.split("/")[-2] == labels.classes[label] for path, label in train + validation)


def test_labels_follow_the_seed(tmp_path):
    """Same seed, same labels; another seed, others. The validation part does not depend on the number of
    labels, and shares no image with them."""
    for name in ("a", "b", "c"):
        write_empty(*(tmp_path / name / f"{number:02d}.png" for number in range(20)))
    for count in (1, 5, 16):
        labels = read_labeled_images(tmp_path, count, seed=3)
        train, validation = paths_and_labels(labels.train), paths_and_labels(labels.validation)
        assert Counter(label for _, label in train) == {0: count, 1: count, 2: count}
        assert not set(train) & set(validation) and len(set(train)) == 3 * count
        again = read_labeled_images(tmp_path, count, seed=3)
        assert (paths_and_labels(again.train), paths_and_labels(again.validation)) == (train, validation)
        assert paths_and_labels(read_labeled_images(tmp_path, None, seed=3).validation) == validation
    other = read_labeled_images(tmp_path, 5, seed=4)
    assert paths_and_labels(other.train) != paths_and_labels(read_labeled_images(tmp_path, 5, seed=3).train)
    assert paths_and_labels(other.validation) != validation


@pytest.mark.parametrize("validation_name", ["val", "valid", "validation", "test"])
def test_train_and_validation_folders(tmp_path, validation_name):
    """With folders for both nothing is held out, and the seed decides the labels alone."""
    for name in ("x", "y"):
        write_empty(*(tmp_path / "train" / name / f"{number}.png" for number in range(6)))
        write_empty(*(tmp_path / validation_name / name / f"v{number}.png" for number in range(3)))
    labels = read_labeled_images(tmp_path, None, seed=0)
    assert labels.classes == ("x", "y") and labels.test_validates == (validation_name == "test")
    assert [path for path, _ in paths_and_labels(labels.train)] == find_images(tmp_path / "train")
    assert [path for path, _ in paths_and_labels(labels.validation)] == find_images(tmp_path / validation_name)
    some = [paths_and_labels(read_labeled_images(tmp_path, 2, seed).train) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and Counter(label for _, label in some[0]) == {0: 2, 1: 2}
    for seed in (0, 1):
        assert read_labeled_images(tmp_path, 2, seed).validation["label"][:] == [0] * 3 + [1] * 3


def test_a_class_may_lack_validation_images(tmp_path):
    """It is said, and the others are validated."""
    write_empty(
        *(tmp_path / place for place in ("train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/4.png", "val/c/5.png"))
    )
    labels, lines = notices(read_labeled_images, tmp_path, None, 0)
    assert lines == [f"no validation image of '{tmp_path}' is of b: nothing is measured of these classes"]
    assert (labels.classes, labels.validation["label"][:]) == (("a", "b", "c"), [0, 2])


def test_class_called_test_is_a_class(tmp_path):
    """Without a train folder beside it, `test` is a class like any other."""
    write_empty(*(tmp_path / name / f"{number}.png" for name in ("test", "flight") for number in range(5)))
    assert read_labeled_images(tmp_path, None, 0).classes == ("flight", "test")


def test_more_labels_than_images(tmp_path):
    """A class with fewer gives all it has, which is said once; the others' draws are those of a folder without it."""
    for name, count in (("few", 8), ("many", 80), ("more", 90)):
        write_empty(*(tmp_path / "all/train" / name / f"{number}.png" for number in range(count)))
        write_empty(tmp_path / "all/val" / name / "0.png")
    for part in ("train", "val"):
        (tmp_path / "without" / part).mkdir(parents=True)
        for name in ("many", "more"):
            (tmp_path / "without" / part / name).symlink_to(tmp_path / "all" / part / name)

    def drawn(labels, name):
        return [Path(row["image"]["path"]).name for row in labels.train if labels.classes[row["label"]] == name]

    for count in (8, 9, 50, 85):
        labels, lines = notices(read_labeled_images, tmp_path / "all", count, 4)
        assert Counter(labels.train["label"]) == {0: 8, 1: min(80, count), 2: count}
        few = {8: "", 9: "1 of 3 classes has fewer, 8", 50: "1 of 3 classes has fewer, 8"}
        text = few.get(count, "2 of 3 classes have fewer, the smallest 8")
        assert lines == ([f"{count} labels per class: {text}, and all are taken"] if text else [])
        if count > 8:
            without, _ = notices(read_labeled_images, tmp_path / "without", count, 4)
            assert [drawn(labels, name) for name in ("many", "more")] == [drawn(without, name) for name in ("many", "more")]
    with pytest.raises(ValueError, match="0 labels per class asked for: give 1 or more"):
        read_labeled_images(tmp_path / "all", 0, 0)


def test_draws_stay_what_they_are(tmp_path):
    """The rows of seed 5, as version 0.1 drew them, where every class has enough."""
    for name in ("a", "b"):
        write_empty(*(tmp_path / name / f"{number:02d}.png" for number in range(12)))
    rows, held_out = open_labeled_source(tmp_path).draw_rows(3, 5)
    generator = random.Random("labels/5")
    expected = {}
    for name, first in (("a", 0), ("b", 12)):
        expected[name] = sorted(generator.sample(range(first, first + 12), 2))
    assert held_out == expected
    for name, first in (("a", 0), ("b", 12)):
        left = [row for row in range(first, first + 12) if row not in expected[name]]
        assert rows[name] == sorted(generator.sample(left, 3))


def test_class_folders_that_cannot_work(tmp_path):
    write_empty(*(tmp_path / "one/a" / f"{number}.png" for number in range(3)))
    write_empty(tmp_path / "single/a/1.png", tmp_path / "single/b/1.png", tmp_path / "single/b/2.png")
    write_empty(tmp_path / "blank/a/1.png", tmp_path / "blank/a/2.png")
    (tmp_path / "blank/b").mkdir()
    write_empty(*(tmp_path / "other" / part / "1.png" for part in ("train/a", "train/b", "val/a", "val/c")))
    for name, message in {
        "missing": "missing' does not exist: give a folder with one subfolder per class",
        "one": "one' has 1 class folder: give at least two",
        "one/a": "a' has 0 class folders: give at least two",
        "single": "class 'a' has 1 image: give at least 2",
        "blank": "b' is empty",
        "other": "classes differ between .*: no training image of c; add some",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_labeled_images(tmp_path / name, None, 0)
