"""Boxes read from files: one set in every format, EXIF, ignored objects, and what is refused."""

import json
import re

import numpy as np
import pytest
from box_files import CLASSES, SCENES, WRITERS, Scene, write_coco, write_csv, write_voc, write_yolo
from PIL import Image

from simmim.data import open_picture
from simmim.data.label_map_sources import read_scenes
from simmim.data.label_sources import read_labels
from simmim.finetune.detection.labels.base import ReadingOptions, convert_box
from simmim.finetune.detection.labels.registry import READERS, find_reader
from simmim.finetune.detection.labels.scenes import choose_classes, inspect, read_boxed_scenes, read_header, smallest_class
from simmim.messages import Notice


def read(path, exif="auto", **options):
    """Every scene of "train" by its file's name: classes, boxes, ignored."""
    raw = find_reader(str(path)).read(str(path), ReadingOptions(**options))
    classes = choose_classes(raw, (), str(path))
    found = inspect(raw.parts["train"], classes, exif)
    return classes, {one.raw.image["path"].rpartition("/")[2]: one for one in found}


@pytest.mark.filterwarnings("ignore::simmim.messages.Notice")
@pytest.mark.parametrize("format", WRITERS)
def test_one_set_has_identical_boxes_in_every_format(format, tmp_path):
    path = WRITERS[format](tmp_path)
    classes, scenes = read(path, box_format="xywh" if format == "columns" else None)
    assert classes == CLASSES and len(scenes) == len(SCENES)
    for scene in SCENES:
        one = scenes[f"{scene.name}.png"]
        expected = np.array([found[1:] for found in scene.objects], dtype=np.float32).reshape(-1, 4)
        assert one.objects.boxes.dtype == np.float32 and np.array_equal(one.objects.boxes, expected), scene.name
        assert one.objects.classes.tolist() == [CLASSES.index(found[0]) for found in scene.objects]
        assert not one.objects.ignored.any() and one.size == scene.size and one.num_clipped == 0


@pytest.mark.parametrize("format, file", [("coco", "annotations/train.json"), ("csv", "boxes.csv")])
def test_a_file_of_labels_needs_no_format(format, file, tmp_path):
    """Whatever the case of its ending."""
    WRITERS[format](tmp_path)
    whole = tmp_path / file
    upper = whole.with_suffix(whole.suffix.upper())
    for path in (whole, upper):
        whole.rename(path)
        whole = path
        assert len(read(path)[1]) == len(SCENES)


def test_the_class_with_the_smallest_objects(tmp_path):
    """By the median over boxes of the side of a square of equal area, in shares of the image's shorter side."""
    write_coco(tmp_path)
    classes, scenes = read(tmp_path)
    smallest = smallest_class(list(scenes.values()), classes)
    assert smallest.name == "dog" and smallest.share == pytest.approx(np.sqrt(1 * 22) / 32)
    assert smallest.short_side_px == 32


def test_csv_of_a_spreadsheet_with_decimal_commas(tmp_path):
    """Semicolons or tabs are between its fields then. Where commas are, one in a number is none."""
    scenes = [Scene("a", (32, 64), (("dog", 3.5, 5.25, 20, 30),)), Scene("b", (16, 16), ())]
    file = write_csv(tmp_path, scenes)
    expected = [read(file)[1][f"{name}.png"].objects for name in "ab"]
    plain = file.read_text()
    for separator in ";\t":
        file.write_text(plain.replace(",", separator).replace(".5", ",5").replace(".25", ",25"))
        for name, objects in zip("ab", expected):
            assert read(file)[1][f"{name}.png"].objects.boxes.tolist() == objects.boxes.tolist()
    file.write_text(plain.replace("3.5", '"3,5"'))
    with pytest.raises(ValueError, match=r"line 2: box .*, expected four numbers"):
        read(file)


def test_formats_of_four_numbers():
    for name, values in (
        ("xyxy", (10, 20, 30, 60)),
        ("xywh", (10, 20, 20, 40)),
        ("cxcywh", (20, 40, 20, 40)),
        ("voc", (11, 21, 30, 60)),
        ("xyxy-shares", (0.1, 0.4, 0.3, 1.2)),
        ("xywh-shares", (0.1, 0.4, 0.2, 0.8)),
        ("cxcywh-shares", (0.2, 0.8, 0.2, 0.8)),
    ):
        assert convert_box(values, name, (50, 100), "file") == pytest.approx((10, 20, 30, 60)), name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_boxes_are_those_of_the_upright_picture(orientation, drawn_on, tmp_path):
    """Whether the tool that wrote them turned the picture or not, a box has the bright pixels inside."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((24, 40), dtype=np.uint8)
    pixels[3:9, 5:25] = 255
    file = tmp_path / "images" / "a.png"
    file.parent.mkdir()
    Image.fromarray(pixels).save(file, exif=exif)
    size, found = read_header({"bytes": None, "path": str(file)})
    assert found == orientation
    upright = open_picture({"bytes": None, "path": str(file)}, 1).crop((0, 0, size[1], size[0]), size)[0].numpy()
    seen, shape = (upright, size) if drawn_on == "upright" else (pixels, (24, 40))
    rows, columns = np.nonzero(seen)
    box = tuple(map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
    rows, columns = np.nonzero(upright)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    # Where the sizes are equal, the user says which picture is meant.
    swapped = orientation >= 5
    write_voc(tmp_path / "x", [Scene("a", shape, (("cat", *box),))])
    file.replace(tmp_path / "x" / "JPEGImages" / "a.png")
    if not swapped and orientation > 1:
        with pytest.raises(ValueError, match=r"a size that fits both, and EXIF turns .* give data\.exif upright or stored"):
            read(tmp_path / "x")
    if orientation > 1:
        lines = f"path,class,xmin,ymin,xmax,ymax\nJPEGImages/a.png,cat,{','.join(map(str, box))}\n"
        (tmp_path / "x" / "boxes.csv").write_text(lines)
        with pytest.raises(ValueError, match="states no size, and EXIF turns the image"):
            read(tmp_path / "x" / "boxes.csv")
    _, scenes = read(tmp_path / "x", exif="auto" if swapped or orientation == 1 else drawn_on)
    assert scenes["a.png"].objects.boxes.tolist() == [expected]
    write_yolo(tmp_path / "y", [Scene("a", shape, (("cat", *box),))])  # shares of the picture that is meant
    (tmp_path / "x" / "JPEGImages" / "a.png").replace(tmp_path / "y" / "images" / "a.png")
    assert read(tmp_path / "y", exif=drawn_on)[1]["a.png"].objects.boxes.ravel().tolist() == pytest.approx(expected)


def test_crowds_and_difficult_objects_are_ignored(tmp_path):
    write_coco(tmp_path / "coco")
    file = tmp_path / "coco" / COCO
    content = json.loads(file.read_text())
    content["annotations"][1]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    write_voc(tmp_path / "voc")
    xml = tmp_path / "voc" / "Annotations" / "a.xml"
    first, rest = xml.read_text().split("</object>", 1)
    xml.write_text(first + "</object>" + rest.replace("<difficult>0", "<difficult>1"))
    for folder in ("coco", "voc"):
        assert read(tmp_path / folder)[1]["a.png"].objects.ignored.tolist() == [False, True]


def test_boxes_that_reach_out_are_clipped_and_counted(tmp_path):
    path = write_csv(tmp_path)
    path.write_text(path.read_text().replace("dog,3,5,20,30", "dog,-4,5,70,30"))
    with pytest.warns(Notice, match="clipped where they reach out of their images: 1 box of"):
        scenes = read_boxed_scenes(str(path), None, seed=1)
    boxes = np.concatenate([one.boxes for one in scenes.train_objects + scenes.validation_objects])
    assert [0, 5, 64, 30] in boxes.tolist()


def many(count):
    """Scenes of both classes, of which every fifth has a dog alone."""
    cat, dog = ("cat", 1, 1, 9, 9), ("dog", 4, 4, 15, 12)
    return [Scene(f"{number:03d}", (16, 16), (dog,) if number % 5 else (cat, dog)) for number in range(count)]


def test_labels_are_drawn_with_every_class_and_a_fifth_is_held_out(tmp_path):
    path = str(write_csv(tmp_path, many(30)))
    drawn = [read_boxed_scenes(path, 3, seed) for seed in (0, 0, 1)]
    names = [[row["image"]["path"] for row in scenes.train] for scenes in drawn]
    assert names[0] == names[1] != names[2]
    for scenes in drawn:
        assert (len(scenes.train), len(scenes.validation)) == (3, 6)
        assert {number for one in scenes.train_objects for number in one.classes.tolist()} == {0, 1}
        assert scenes.validation_sizes == ((16, 16),) * 6 and scenes.classes == CLASSES
        assert not {row["image"]["path"] for row in scenes.train} & {row["image"]["path"] for row in scenes.validation}
    assert any("fewer than 5 training boxes of cat" in note for note in drawn[0].notes)


def test_parts_by_folders_lists_and_columns(tmp_path):
    """Each format's own way to say what is to train on and what to validate with."""
    for part, scenes in (("train", many(4)), ("val", many(9)[4:])):
        write_coco(tmp_path / "coco", scenes, f"images/{part}", f"annotations/instances_{part}2017.json")
        write_yolo(tmp_path / "yolo" / part, scenes)
    (tmp_path / "yolo" / "train" / "data.yaml").replace(tmp_path / "yolo" / "data.yaml")
    write_voc(tmp_path / "voc", many(9))
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"{number:03d}\n" for number in range(4)))
    (lists / "val.txt").write_text("".join(f"{number:03d}\n" for number in range(4, 9)))
    (lists / "cat_train.txt").write_text("000 1\n")
    file = write_csv(tmp_path / "csv", many(9))
    head, *rows = file.read_text().splitlines()
    parts = ["train" if row < "pictures/004" else "val" for row in rows]
    file.write_text("\n".join([f"{head},split", *(f"{row},{part}" for row, part in zip(rows, parts))]) + "\n")
    for path in (tmp_path / "coco", tmp_path / "yolo", tmp_path / "voc", file):
        scenes = read_boxed_scenes(str(path), None, seed=0)
        assert [row["image"]["path"][-7:-4] for row in scenes.train] == ["000", "001", "002", "003"], path
        assert len(scenes.validation) == 5, path


@pytest.mark.parametrize("format, labels", [("yolo", "labels"), ("voc", "Annotations")])
def test_annotations_may_all_lie_in_folders_of_folders(format, labels, tmp_path):
    """As the images do; a hidden file, as some systems leave beside each, is none."""
    path = WRITERS[format](tmp_path)
    images = next(path / name for name in ("images", "JPEGImages") if (path / name).is_dir())
    for folder in (images, path / labels):
        files = sorted(folder.iterdir())
        (folder / "site" / "first").mkdir(parents=True)
        for file in files:
            file.rename(folder / "site" / "first" / file.name)
    (path / labels / "site" / f"._{file.name}").write_bytes(b"")
    classes, scenes = read(path)
    assert classes == CLASSES and {name: len(found.objects.boxes) for name, found in scenes.items()} == {
        f"{scene.name}.png": len(scene.objects) for scene in SCENES
    }


def test_lists_of_voc_without_one_to_train_on(tmp_path):
    """What is tested or validated with is never trained on, and an empty list does not mean all images."""
    write_voc(tmp_path, many(9))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("".join(f"{number:03d}\n" for number in range(6)))
    (lists / "test.txt").write_text("006\n007\n")
    scenes = read_boxed_scenes(str(tmp_path), None, seed=0)
    assert len(scenes.train) == 6 and len(scenes.validation) == 2 and scenes.test_validates
    (lists / "val.txt").write_text("004\n005\n")
    with pytest.warns(Notice, match="test .* left aside"):
        scenes = read_boxed_scenes(str(tmp_path), None, seed=0)
    assert len(scenes.train) == 4 and len(scenes.validation) == 2 and not scenes.test_validates
    (lists / "val.txt").write_text("")
    with pytest.raises(ValueError, match="has no image to validate with"), pytest.warns(Notice):
        read_boxed_scenes(str(tmp_path), None, seed=0)


@pytest.mark.parametrize(
    "format, file, separated", [("coco", "annotations/train.json", "images"), ("csv", "boxes.csv", "pictures")]
)
def test_paths_written_on_windows(format, file, separated, tmp_path):
    WRITERS[format](tmp_path)
    text = (tmp_path / file).read_text()
    if format == "csv":
        text = text.replace("pictures/", "pictures\\")
    else:
        text = text.replace('"file_name": "', '"file_name": "images\\\\')
    (tmp_path / file).write_text(text)
    assert f"{separated}\\" in text and set(read(tmp_path / file)[1]) == {f"{scene.name}.png" for scene in SCENES}


@pytest.mark.filterwarnings("ignore::simmim.messages.Notice")
def test_names_beside_the_labels_of_each_part(tmp_path):
    """As labelImg writes them. A class that is named later is in one list alone; other numbers are refused."""
    for part, names in (("train", "cat\ndog\n"), ("val", "cat\n")):
        folder = write_yolo(tmp_path / part, many(4))
        (folder / "data.yaml").unlink()
        (folder / "labels" / "classes.txt").write_text(names)
    assert read_boxed_scenes(str(tmp_path), None, seed=0).classes == CLASSES
    (folder / "labels" / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match=r"classes differ between .*: 0 is 'cat' and 'dog'; number them alike"):
        read_boxed_scenes(str(tmp_path), None, seed=0)


def test_a_list_of_names_is_no_label(tmp_path):
    """Scenes of another task lie beside such a list, too."""
    path = write_yolo(tmp_path)
    (path / "classes.txt").write_text("cat\ndog\n")
    assert READERS["yolo"].detect(str(path))
    for file in (path / "labels").iterdir():
        file.unlink()
    assert not READERS["yolo"].detect(str(path))


def test_polygons_of_yolo_become_the_boxes_around_them(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels" / "b.txt").write_text("0 0.25 0.5 0.5 0.25 0.75 0.75\n")
    with pytest.warns(Notice, match="1 of 4 images in .* have no label file"):
        _, scenes = read(tmp_path)
    assert scenes["b.png"].objects.boxes.tolist() == [[8, 16, 24, 48]]


# --- refused -----------------------------------------------------------------------------------------------------------

# Format, file to change, what is replaced by what there, options, and the message.
COCO = "annotations/train.json"
REFUSED = [
    ("voc", "Annotations/b.xml", None, "", {}, r"image .*b\.png has no annotation: expected .*b\.xml"),
    ("voc", "Annotations/b.xml", "<xmin>2<", "<xmin>4<", {}, r"b\.xml, line 2: box 4 3 3 4 \(voc\) has no area"),
    ("voc", "Annotations/b.xml", "<width>32<", "<width>33<", {}, r"b\.xml states 64x33 pixels, and the image has 64x32"),
    (
        "voc",
        "Annotations/a.xml",
        "cat",
        "cow",
        {"classes": CLASSES},
        r"line 7: unknown class 'cow'.* known: cat, dog",
    ),
    ("voc", "Annotations/a.xml", "</annotation>", "", {}, r"a\.xml, line \d+: no XML"),
    ("voc", "Annotations/a.xml", "<name>dog", "<name>", {}, r"a\.xml, line 2: an object without a name"),
    ("voc", "JPEGImages/b.png", None, "", {}, r"b\.xml has no image: expected .*b\.jpg"),
    (
        "coco",
        COCO,
        '"category_id": 8',
        '"category_id": 5',
        {},
        "annotation 0: category_id 5 has no name",
    ),
    (
        "coco",
        COCO,
        "[1, 2, 2, 2]",
        "[1, 2, 2, 0]",
        {},
        r"annotation 100: box 1 2 2 0 \(xywh\) has no area",
    ),
    ("coco", COCO, "[1, 2, 2, 2]", "[0.1, 0.2, 0.2, 0.2]", {}, "annotation 100: box .* is in shares"),
    ("coco", COCO, "[1, 2, 2, 2]", "[90, 2, 2, 2]", {}, r"lies outside its image of 64x32 pixels"),
    ("coco", COCO, "[1, 2, 2, 2]", "[1, 2, 2]", {}, "expected four numbers"),
    ("coco", COCO, "[1, 2, 2, 2]", "[1, 2, NaN, 2]", {}, "expected four finite numbers"),
    ("coco", COCO, '"b.png"', '"z.png"', {}, r"there is no image 'z\.png' in "),
    ("coco", COCO, '"image_id": 1', '"image_id": 9', {}, "image_id 9 is no image of the file"),
    ("coco", COCO, '"id": 3, "file_name"', '"id": 1, "file_name"', {}, "image id 1 occurs twice"),
    ("coco", COCO, '"d.png"', '"a.png"', {}, r"images 0 and 3 are both .*a\.png: give it one id"),
    ("coco", COCO, '"categories": [', '"categories": {', {}, r"train\.json, line 1: no JSON"),
    ("yolo", "labels/a.txt", "1 ", "2 ", {}, r"a\.txt, line 1: class 2 has no name: known are 0 to 1"),
    ("yolo", "labels/a.txt", "0.1796875", "11.5", {}, r"a\.txt, line 1: box .* is in pixels, expected shares"),
    ("yolo", "labels/b.txt", "0 0.0625", "0.0625", {}, r"b\.txt, line 1: class '0\.0625', expected a whole number"),
    ("yolo", "images/b.png", None, "", {}, r"b\.txt has no image"),
    ("csv", "boxes.csv", "cat,1,2,3,4", "cat,1,2,1,4", {}, r"boxes\.csv, line 4: box 1 2 1 4 \(xyxy\) has no area"),
    ("csv", "boxes.csv", "cat,1,2,3,4", "cat,.1,.2,.3,.4", {}, r"boxes\.csv, line 4: box .* is in shares"),
    ("csv", "boxes.csv", "cat,1,2,3,4", ",1,2,3,4", {}, r"boxes\.csv, line 4 has a box and no class"),
    ("csv", "boxes.csv", "pictures/b", "pictures/z", {}, r"boxes\.csv, line 4: there is no image"),
    ("csv", "boxes.csv", "xmin", "left", {}, "has no columns xmin, ymin, xmax, ymax: its columns are path, class, left"),
    ("columns", None, "", "", {}, r"give data\.box_format, one of xyxy, xywh"),
    ("columns", None, "", "", {"box_format": "xyxy", "classes": ("cat",)}, "unknown class 'dog'"),
]


@pytest.mark.filterwarnings("ignore::simmim.messages.Notice")
@pytest.mark.parametrize("format, file, old, new, options, message", REFUSED)
def test_wrong_labels_are_refused(format, file, old, new, options, message, tmp_path):
    path = WRITERS[format](tmp_path)
    if old is None:
        (tmp_path / file).unlink()
    elif file:
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_boxed_scenes(str(path), None, 0, ReadingOptions(**options))


def test_other_tasks_point_to_detection(tmp_path):
    """The names of folders say little: labels/ may hold boxes or label maps, and both may lie side by side."""
    write_yolo(tmp_path)
    with pytest.raises(ValueError, match=r"labels holds boxes and no label maps: use simmim finetune detection"):
        read_scenes(str(tmp_path))
    with pytest.raises(ValueError, match=r"which are no classes: .* or use simmim finetune detection"):
        read_labels(str(tmp_path), None, None)
    (tmp_path / "labels").rename(tmp_path / "annotations")
    (tmp_path / "annotations" / "train.json").write_text("{}")
    (tmp_path / "labels").mkdir()
    for scene in SCENES:
        Image.new("L", scene.size[::-1]).save(tmp_path / "labels" / f"{scene.name}.png")
    assert len(read_scenes(str(tmp_path))["train"]) == len(SCENES)


def test_sets_without_boxes_and_folders_of_other_kinds_are_refused(tmp_path):
    empty = write_csv(tmp_path / "csv", [Scene(name, (16, 16), ()) for name in "abc"])
    with pytest.raises(ValueError, match="has no box in 3 images"):
        read_boxed_scenes(str(empty), None, 0)
    for folder in ("images", "labels"):
        (tmp_path / "maps" / folder).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "maps" / folder / "a.png")
    (tmp_path / "nothing" / "images").mkdir(parents=True)
    (tmp_path / "nothing" / "labels").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "nothing" / "images" / "a.png")
    with pytest.raises(ValueError, match=r"nothing/labels is empty: put the boxes of the images there"):
        read_boxed_scenes(str(tmp_path / "nothing"), None, 0)
    with pytest.raises(ValueError, match=r"labels holds label maps and no boxes: use simmim finetune segmentation"):
        find_reader(str(tmp_path / "maps"))
    with pytest.raises(ValueError, match="'typo' does not exist"):
        find_reader("typo")
    with pytest.raises(ValueError, match="holds no boxes as YOLO text"):
        find_reader(str(empty), "yolo")
    with pytest.raises(ValueError, match=r"data\.format is 'coko'; did you mean 'coco'"):
        find_reader(str(empty), "coko")
    write_yolo(tmp_path / "both")
    write_coco(tmp_path / "both")
    with pytest.raises(ValueError, match=re.escape("holds boxes in 2 formats: give data.format as coco or yolo")):
        find_reader(str(tmp_path / "both"))
    assert find_reader(str(tmp_path / "both"), "yolo") is READERS["yolo"]
