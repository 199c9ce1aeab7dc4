"""Parts of labeled sources: usual names in any case, what is unclear is refused, what is left aside is said."""

import datasets
import pytest
from image_files import notices, write_empty

from simmim.data import read_labeled_images
from simmim.data.label_map_sources import read_scenes
from simmim.data.readers import HubReader


def write_classes(folder, *parts, images=5):
    for part in parts:
        write_empty(*(folder / part / name / f"{number}.png" for name in ("cat", "dog") for number in range(images)))
    return folder


def read(path):
    labels, lines = notices(read_labeled_images, path, None, 0)
    return len(labels.train), len(labels.validation), labels.classes, lines


@pytest.mark.parametrize("train", ["train", "training", "Training", "TRAIN"])
@pytest.mark.parametrize("validation", ["val", "Valid", "validation", "dev", "eval"])
def test_usual_names_of_class_folders(tmp_path, train, validation):
    write_classes(tmp_path, train)
    write_classes(tmp_path, validation, images=2)
    assert read(tmp_path) == (10, 4, ("cat", "dog"), [])


@pytest.mark.parametrize("test", ["test", "Testing"])
def test_training_beside_test_are_no_classes(tmp_path, test):
    write_classes(tmp_path, "training")
    write_classes(tmp_path, test, images=2)
    assert read(tmp_path) == (10, 4, ("cat", "dog"), [])


def test_what_is_left_aside_is_named(tmp_path):
    write_classes(tmp_path, "train", "val", "test", "extra")
    (tmp_path / "notes").mkdir()
    *counts, lines = read(tmp_path)
    assert counts == [10, 10, ("cat", "dog")]
    aside = f"extra (10 images) and test (10 images) of '{tmp_path}' are left aside: train is trained on and val validates"
    assert lines == [aside]


def test_a_training_part_alone_has_a_fifth_held_out(tmp_path):
    assert read(write_classes(tmp_path, "train")) == (8, 2, ("cat", "dog"), [])


def test_classes_may_have_such_names(tmp_path):
    for names in (("train", "car"), ("test", "flight", "validation")):
        folder = tmp_path / names[0]
        write_empty(*(folder / name / f"{number}.png" for name in names for number in range(5)))
        labels, lines = notices(read_labeled_images, folder, None, 0)
        assert (set(labels.classes), lines) == (set(names), [])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("train", "Training", "val"), "has Training and train, which both mean training: merge or rename one"),
        (("train", "val", "valid"), "has val and valid, which both mean validation"),
        (("val", "test"), "has test and val and nothing to train on: expected train .* rename one"),
        (("train", "unlabeled"), "has train and unlabeled, and train may be a class or a part: give '.*/train' if"),
    ],
)
def test_unclear_folders_are_refused(tmp_path, parts, message):
    write_classes(tmp_path, *parts)
    with pytest.raises(ValueError, match=message):
        read_labeled_images(tmp_path, None, 0)


def test_parts_below_classes_are_refused(tmp_path):
    """Their images would be mixed, and test images trained on."""
    write_empty(*(tmp_path / name / part / "0.png" for name in ("cat", "dog") for part in ("train", "test", "more")))
    with pytest.raises(ValueError, match=r"class folder '.*/cat' has train and test, which would be mixed: put parts above"):
        read_labeled_images(tmp_path, None, 0)


def test_classes_that_look_like_parts_are_told(tmp_path):
    """By equal folders in all of them; no notice where one has others, or images of its own."""
    write_classes(tmp_path, "train_images", "test_images")
    size, held_out, classes, (line,) = read(tmp_path)
    assert (size, held_out, classes) == (16, 4, ("test_images", "train_images"))
    assert "test_images; train_images, hold the same folders, cat; dog: if these are the classes and those are parts" in line
    write_empty(tmp_path / "test_images" / "0.png")
    assert not read(tmp_path)[-1]
    (tmp_path / "test_images" / "0.png").unlink()
    write_empty(tmp_path / "train_images" / "bird" / "0.png")
    assert not read(tmp_path)[-1]


def write_csv(file, parts, column="split"):
    """Five rows of each class and part."""
    rows = [f"{label}{number}.png,{label},{part}" for part in parts for label in "ab" for number in range(5)]
    file.write_text("\n".join([f"path,label,{column}", *rows]))
    return file


def test_a_csv_file_with_a_column_of_parts(tmp_path):
    *counts, lines = read(write_csv(tmp_path / "labels.csv", ("Train", "dev", "test"), "subset"))
    assert counts == [10, 10, ("a", "b")]
    assert lines == [f"test (10 images) of '{tmp_path}/labels.csv' is left aside: Train is trained on and dev validates"]
    assert read(write_csv(tmp_path / "labels.csv", ("train",))) == (8, 2, ("a", "b"), [])
    assert read(write_csv(tmp_path / "labels.csv", ("1", "2"), "camera")) == (16, 4, ("a", "b"), [])
    for parts, message in (
        (("train", "0"), "line 12 has the split '0': expected train .*; or rename the column"),
        (("train", ""), "line 12 has the split ''"),
        (("val", "test"), "has the parts val, test, and none to train on: expected train"),
        (("train", "training"), "has train and training, which both mean training"),
    ):
        with pytest.raises(ValueError, match=message):
            read_labeled_images(write_csv(tmp_path / "labels.csv", parts), None, 0)


def rows(count):
    images = [{"bytes": b"", "path": f"{number}.png"} for number in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": images, "label": [number % 2 for number in range(count)]}, features=features)


def test_splits_of_datasets(tmp_path):
    def saved(**sizes):
        folder = tmp_path / "-".join(sizes)
        datasets.DatasetDict({name: rows(count) for name, count in sizes.items()}).save_to_disk(folder)
        return folder

    assert read(saved(training=10, dev=4)) == (10, 4, ("a", "b"), [])
    *counts, lines = read(saved(train=10, validation=4, test=6, unsupervised=8))
    assert counts == [10, 4, ("a", "b")]
    assert len(lines) == 1 and lines[0].startswith("test (6 images) and unsupervised (8 images) of ")
    assert read(saved(everything=10)) == (8, 2, ("a", "b"), [])
    assert "has the part test alone: it is trained on" in read(saved(test=10))[-1][0]
    with pytest.raises(ValueError, match="has the parts one, two, and none to train on"):
        read(saved(one=10, two=10))
    with pytest.raises(ValueError, match="has the parts validation, test, and none to train on"):
        read(saved(validation=10, test=10))


def test_parquet_files_tell_their_part_by_name(tmp_path):
    """As the data sets of the hub: train.parquet, validation.parquet and test.parquet in a folder."""
    for name, count in (("train-00000-of-00002", 4), ("train-00001-of-00002", 6), ("Validation", 4), ("test", 6)):
        rows(count).to_parquet(tmp_path / f"{name}.parquet")
    *counts, lines = read(tmp_path)
    assert counts == [10, 4, ("a", "b")]
    assert lines == [f"test (6 images) of '{tmp_path}' is left aside: train is trained on and validation validates"]
    rows(4).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(ValueError, match=r"'more.parquet' lies beside .*, and its name does not tell its part"):
        read(tmp_path)
    for number, file in enumerate(sorted(tmp_path.iterdir())):
        file.rename(tmp_path / f"{number}.parquet")
    assert read(tmp_path)[:2] == (20, 4), "names that tell nothing are one part"


def test_a_hub_dataset_whose_validation_part_fails_is_an_error(monkeypatch):
    """It must not be trained on without it, as if it had none."""

    def load_dataset(name, split=None, **_):
        if split is None:
            raise OSError("validation-00000.parquet is torn")
        return rows(10)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"validation-00000\.parquet is torn"):
        HubReader().read_splits(["someone/pictures"])


def write_scenes(folder, *images, masks=True):
    for path in images:
        names = [f"{number}.png" for number in range(3)]
        write_empty(*(folder / path / name for name in names))
        if masks:
            write_empty(*(folder / path.replace("images", "masks") / name for name in names))
    return folder


@pytest.mark.parametrize("layout", ["{}/images", "images/{}"])
def test_parts_of_scenes(tmp_path, layout):
    def parts(*names):
        return [layout.format(name) for name in names]

    scenes, lines = notices(read_scenes, str(write_scenes(tmp_path / "1", *parts("Training", "dev"))))
    assert {name: len(part) for name, part in scenes.items()} == {"train": 3, "validation": 3} and lines == []
    scenes, lines = notices(read_scenes, str(write_scenes(tmp_path / "2", *parts("train", "test"))))
    assert set(scenes) == {"train", "test"} and lines == []
    folder = write_scenes(tmp_path / "3", *parts("train", "val"))
    write_scenes(folder, *parts("test"), masks=False)
    scenes, lines = notices(read_scenes, str(folder))
    assert lines == [f"test (3 images) of '{folder}' is left aside: train is trained on and val validates"]
    with pytest.raises(ValueError, match="has train and training, which both mean training"):
        read_scenes(str(write_scenes(tmp_path / "4", *parts("train", "training"))))
    with pytest.raises(ValueError, match="has test and val and nothing to train on"):
        read_scenes(str(write_scenes(tmp_path / "5", *parts("test", "val"))))


def test_a_csv_file_of_scenes_with_a_column_of_parts(tmp_path):
    write_scenes(tmp_path, "images")
    lines = [f"images/{number}.png,masks/{number}.png,{part}" for number, part in enumerate(("train", "train", "test"))]
    (tmp_path / "scenes.csv").write_text("\n".join(["image,mask,split", *lines]))
    scenes, lines = notices(read_scenes, str(tmp_path / "scenes.csv"))
    assert {name: len(part) for name, part in scenes.items()} == {"train": 2, "test": 1}
    assert lines == []
