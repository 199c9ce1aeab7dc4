"""Labeled scenes: layouts, values as they are stored, checks, the validation part, the draw of labels."""

import io
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from simmim.data.label_map_files import inspect_scenes, read_label_map
from simmim.data.label_map_sources import note_on_label_maps, read_scenes
from simmim.data.label_maps import ClassScheme, read_labeled_scenes
from simmim.data.scene_draws import draw_scenes


def png(array, mode=None, palette=None, **save):
    image = Image.fromarray(array, mode=mode)
    if palette:
        image.putpalette(palette)
    data = io.BytesIO()
    image.save(data, format="png", **save)
    return data.getvalue()


def record(data):
    return {"bytes": data, "path": None}


def scenes(folder, count=10, classes=3, size=(8, 12), seed=0):
    """Images and label maps of `size` (height, width) in folder/images and folder/masks, of 0 and one other class each."""
    generator = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = generator.integers(0, 256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.jpg")
        values = np.zeros(size, dtype=np.uint8)
        values[2:5, 3:7] = 1 + number % (classes - 1)
        Image.fromarray(values).save(folder / "masks" / f"{number:02d}.png")
    return folder


VALUES = np.arange(6, dtype=np.uint8).reshape(2, 3) % 4


@pytest.mark.parametrize(
    "data",
    [
        png(VALUES),
        png(VALUES, "P", palette=[200, 10, 10, 10, 200, 10, 10, 10, 200, 0, 0, 0]),
        png(VALUES, "P", palette=[200, 10, 10, 10, 200, 10, 10, 10, 200, 0, 0, 0], bits=2),
        png(VALUES, "P", palette=[9] * 12, bits=4, transparency=0),
        png(VALUES.astype(np.uint16)),
    ],
    ids=["gray", "palette", "two bits", "transparent palette of one color", "16 bits"],
)
def test_values_are_read_as_they_are_stored(data):
    assert np.array_equal(read_label_map(record(data)), VALUES)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_label_maps_of_few_bits_are_not_stretched(bits):
    """Written by hand: Pillow writes no gray PNG of 2 or 4 bits, and stretches what it reads of them."""
    import struct
    import zlib

    values = np.arange(16, dtype=np.uint8).reshape(2, 8) % 2**bits
    rows = b"".join(b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:].ravel()).tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(read_label_map(record(data)), values)


def test_arrays_and_deep_values(tmp_path):
    deep = np.array([[0, 300], [65535, 7]])
    np.save(tmp_path / "mask.npy", deep)
    assert np.array_equal(read_label_map({"bytes": None, "path": str(tmp_path / "mask.npy")}), deep)
    assert np.array_equal(read_label_map(record(png(deep.astype(np.uint16)))), deep)


@pytest.mark.parametrize(
    "data, message",
    [
        (png(np.zeros((4, 4, 3), np.uint8)), "colors"),
        (png(np.zeros((4, 4, 4), np.uint8)), "colors"),
        (png(VALUES)[:40], "."),
        (b"not an image", "cannot identify"),
    ],
)
def test_label_maps_that_cannot_be_read_are_refused(data, message):
    with pytest.raises((OSError, ValueError), match=message):
        read_label_map(record(data))


def test_jpeg_label_maps_are_refused(tmp_path):
    folder = scenes(tmp_path)
    (folder / "masks" / "03.png").unlink()
    Image.new("L", (12, 8)).save(folder / "masks" / "03.jpg")
    with pytest.raises(ValueError, match=r"label map .*03\.jpg cannot be read: a JPEG, whose values are not exact"):
        read_labeled_scenes(folder, None, 0)


def test_class_ids():
    scheme = ClassScheme(("a", "b", "c"), (0, 128, 7), 255)
    mask = np.array([[0, 128], [7, 255]], dtype=np.uint8)
    assert scheme.class_ids(mask).tolist() == [[0, 1], [2, 255]] and scheme.class_ids(mask).dtype == np.uint8
    many = ClassScheme(tuple(map(str, range(300))), tuple(range(300)), 999)
    assert many.class_ids(np.array([[299, 999]], dtype=np.int32)).tolist() == [[299, many.ignored_id]]
    assert many.ignored_id >= 300


def test_a_fifth_is_held_out_before_labels_are_drawn(tmp_path):
    folder = scenes(tmp_path, count=20)
    whole, few, other = (read_labeled_scenes(folder, labels, seed) for labels, seed in ((None, 0), (4, 0), (None, 1)))

    def names(data):
        return [row["path"] for row in data["image"]]

    assert len(whole.train) == 16 and len(whole.validation) == 4
    assert not set(names(whole.train)) & set(names(whole.validation))
    assert names(few.validation) == names(whole.validation) != names(other.validation)
    assert len(few.train) == 4 and set(names(few.train)) <= set(names(whole.train))
    assert names(read_labeled_scenes(folder, 4, 0).train) == names(few.train)
    assert [row["path"].replace("masks", "images").replace("png", "jpg") for row in few.train["label_map"]] == names(
        few.train
    )


def test_every_class_is_among_the_drawn():
    scheme = ClassScheme(("0", "1", "2"), (0, 1, 2), 255)
    found = inspect_scenes(datasets.Dataset.from_list([{"image": record(png(VALUES)), "label_map": record(png(VALUES))}]))
    common, rare = found[0].__class__("c", None, {0: 5, 1: 5}), found[0].__class__("r", None, {0: 5, 2: 1})
    many = [common] * 30 + [rare]
    for seed in range(5):
        assert 30 in draw_scenes(many, range(31), 3, scheme.values, random.Random(seed))
    others = {tuple(draw_scenes(many, range(31), 3, scheme.values, random.Random(seed))) for seed in range(5)}
    assert len(others) > 1
    with pytest.raises(ValueError, match="too few to have all 3 classes: give 2 or more"):
        draw_scenes(many, range(31), 1, scheme.values, random.Random(0))
    with pytest.raises(ValueError, match="give 1 to 31"):
        draw_scenes(many, range(31), 40, scheme.values, random.Random(0))


@pytest.mark.parametrize("layout", ["parts", "inside", "csv", "saved", "parquet"])
def test_layouts_give_the_same(tmp_path, layout):
    folder = scenes(tmp_path / "plain", count=6, classes=3)
    pairs = read_scenes(str(folder))["train"]
    if layout == "parts":
        for part, seed in (("train", 0), ("val", 1)):
            scenes(tmp_path / "data" / part, 6, seed=seed)
        data = tmp_path / "data"
    elif layout == "inside":
        for part in ("train", "val"):
            for kind in ("images", "masks"):
                (tmp_path / "data" / kind / part).mkdir(parents=True)
                for file in (folder / kind).iterdir():
                    (tmp_path / "data" / kind / part / file.name).write_bytes(file.read_bytes())
        data = tmp_path / "data"
    elif layout == "csv":
        data = tmp_path / "pairs.csv"
        lines = [f"plain/images/{n:02d}.jpg,plain/masks/{n:02d}.png" for n in range(6)]
        data.write_text("\n".join(["image,mask", *lines]))
    else:
        rows = [
            {
                "picture": {"bytes": Path(a["path"]).read_bytes(), "path": None},
                "annotation": {"bytes": Path(b["path"]).read_bytes(), "path": None},
            }
            for a, b in zip(pairs["image"], pairs["label_map"])
        ]
        features = datasets.Features({"picture": datasets.Image(), "annotation": datasets.Image()})
        table = datasets.Dataset.from_list(rows, features=features)
        data = tmp_path / ("saved" if layout == "saved" else "data.parquet")
        if layout == "saved":
            datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(data)
        else:
            table.to_parquet(data)
    found = read_labeled_scenes(data, None, 0)
    divided = layout in ("csv", "parquet")
    assert (len(found.train), len(found.validation)) == ((5, 1) if divided else (6, 6))
    assert found.scheme.classes == ("0", "1", "2")
    read = [read_label_map(one) for one in read_scenes(str(data))["train"]["label_map"]]
    assert all(np.array_equal(a, read_label_map(b)) for a, b in zip(read, pairs["label_map"]))
    assert found.pixels == tuple(
        int(sum((read_label_map(one) == value).sum() for one in found.train["label_map"])) for value in range(3)
    )


def test_label_maps_among_images_are_noticed(tmp_path):
    """When pre-training on a folder of scenes; labels that are no pictures are not meant."""
    folder = scenes(tmp_path / "scenes", count=2)
    parts = scenes(tmp_path / "parts" / "train", count=2).parent
    boxes = tmp_path / "boxes"
    for name in ("images", "labels"):
        (boxes / name).mkdir(parents=True)
    (boxes / "labels" / "0.txt").write_text("0 0.5 0.5 1 1")
    assert note_on_label_maps(["hub/id", str(folder)]) == (
        f"{folder / 'masks'} holds label maps, which count as images here like all else in {folder}: "
        f"give {folder / 'images'} to leave them out"
    )
    assert str(parts / "train" / "images") in note_on_label_maps(str(parts))
    for path in (folder / "images", boxes, tmp_path / "absent", "photos/*.jpg"):
        assert note_on_label_maps(str(path)) == ""


def test_class_names_and_values(tmp_path):
    folder = scenes(tmp_path)
    (folder / "classes.txt").write_text("ground\nhouse\ntree\n")
    assert read_labeled_scenes(folder, None, 0).scheme == ClassScheme(("ground", "house", "tree"), (0, 1, 2), 255)
    assert read_labeled_scenes(folder, None, 0, ignore_index=0, classes=("house", "tree")).scheme.values == (1, 2)
    assert read_labeled_scenes(folder, None, 0, classes=("c", "b", "a"), values=(2, 1, 0)).scheme.values == (2, 1, 0)
    (folder / "classes.txt").unlink()
    found = read_labeled_scenes(folder, None, 0)
    assert found.scheme.classes == ("0", "1", "2") and "3 values" in found.notes[0]
    assert read_labeled_scenes(folder, None, 0, ignore_index=0).scheme.classes == ("1", "2")


def test_binary_label_maps_of_0_and_255(tmp_path):
    folder = scenes(tmp_path)
    for file in (folder / "masks").iterdir():
        Image.fromarray((np.array(Image.open(file)) > 0).astype(np.uint8) * 255).save(file)
    with pytest.raises(ValueError, match=r"only class '0' besides the ignored value 255.*data\.ignore_index -1"):
        read_labeled_scenes(folder, None, 0)
    assert read_labeled_scenes(folder, None, 0, ignore_index=-1).scheme.values == (0, 255)


def broken(folder, damage):
    """Damage the labeled folder; returns what the message must say."""
    label_map = folder / "masks" / "04.png"
    if damage == "unknown value":
        (folder / "classes.txt").write_text("a\nb\nc\n")
        values = np.array(Image.open(label_map))
        values[0, :3] = (9, 255, 12)
        Image.fromarray(values).save(label_map)
        return r"04\.png holds the values 9, 12, expected 0 to 2, the values of 3 classes, or 255 to ignore"
    if damage == "classes file too short":
        (folder / "classes.txt").write_text("a\nb\n")
        return r"masks/01\.png holds the value 2, expected 0 to 1, the values of 2 classes.*classes\.txt"
    if damage == "other size":
        Image.new("L", (12, 9)).save(label_map)
        return r"label map .*04\.png is 9x12 pixels and its image .*04\.jpg 8x12 \(height x width\)"
    if damage == "no label map":
        label_map.unlink()
        (folder / "masks" / "05.png").unlink()
        return r"image .*04\.jpg has no label map \(nor 1 others\): expected .*masks/04\.png"
    if damage == "no image":
        (folder / "images" / "04.jpg").unlink()
        return r"label map .*04\.png has no image: expected"
    if damage == "two images":
        Image.new("RGB", (12, 8)).save(folder / "images" / "04.png")
        return r"04\.jpg and .*04\.png differ only by their extensions"
    if damage == "no images":
        for file in (folder / "images").iterdir():
            file.unlink()
        return "images' is empty"
    if damage == "no folders":
        (folder / "masks").rename(folder / "something")
        return "no folders of images and label maps, but images, something"
    if damage == "untrained class":
        (folder / "classes.txt").write_text("a\nb\nc\nd\n")
        return "class 'd' has no pixel in the 8 training label maps"
    if damage == "torn label map":
        label_map.write_bytes(label_map.read_bytes()[:30])
        return r"label map .*04\.png cannot be read"
    assert damage == "one class"
    (folder / "classes.txt").write_text("a\n")
    return "at least two classes"


@pytest.mark.parametrize(
    "damage",
    [
        "unknown value",
        "classes file too short",
        "other size",
        "no label map",
        "no image",
        "two images",
        "no images",
        "no folders",
        "untrained class",
        "torn label map",
        "one class",
    ],
)
def test_wrong_labels_are_refused_with_file_and_value(tmp_path, damage):
    message = broken(scenes(tmp_path), damage)
    with pytest.raises(ValueError, match=message) as error:
        read_labeled_scenes(tmp_path, None, 0)
    assert "\n" not in str(error.value)


def test_parts_with_other_classes_are_refused(tmp_path):
    scenes(tmp_path / "train", classes=3)
    scenes(tmp_path / "val", classes=4)
    with pytest.raises(ValueError, match=r"classes differ between the training and the validation label maps: '3' of .*val"):
        read_labeled_scenes(tmp_path, None, 0)
    scenes(tmp_path / "train", classes=4)
    (tmp_path / "train" / "classes.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "val" / "classes.txt").write_text("a\nb\nc\ne\n")
    with pytest.raises(ValueError, match=r"classes differ between .*only in one of them: d, e"):
        read_labeled_scenes(tmp_path, None, 0)


def test_a_class_without_validation_pixels_is_noted(tmp_path):
    scenes(tmp_path / "train", classes=4)
    scenes(tmp_path / "val", classes=3)
    assert "no validation pixel of 3" in read_labeled_scenes(tmp_path, None, 0).notes[-1]


def test_an_unreadable_image_is_left_to_training(tmp_path):
    """A broken image is replaced when its turn comes, as everywhere; a broken label map is an error."""
    folder = scenes(tmp_path)
    (folder / "images" / "04.jpg").write_bytes(b"torn")
    assert len(read_labeled_scenes(folder, None, 0).train) == 8


def test_turned_images_are_measured_upright(tmp_path):
    folder = scenes(tmp_path, size=(12, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(folder / "images" / "04.jpg", exif=exif)
    assert len(read_labeled_scenes(folder, None, 0).train) == 8
