"""Polygons of YOLO's text: the masks and boxes of COCO's polygons, parts, EXIF, oriented boxes, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from simmim.finetune.detection.labels.scenes import read_boxed_scenes
from simmim.finetune.detection.masks import draw
from simmim.messages import Notice

CLASSES = ("cell", "grain")
SIZE = (37, 52)  # (height, width)
RECTANGLE = [4.0, 5.0, 20.0, 5.0, 20.0, 30.0, 4.0, 30.0]
ROTATED = [20.0, 4.0, 40.0, 14.0, 35.0, 24.0, 15.0, 14.0]
LEANING = [4.0, 5.0, 20.0, 8.0, 9.0, 30.0]
TRIANGLE = [4.0, 5.0, 20.0, 5.0, 12.0, 30.0]


def draw_polygons(seed, count=8, size=SIZE, margin=4.0):
    """Of `count` images the objects, (class, polygon in pixels), which reach out of the image by `margin` at most."""
    generator = np.random.default_rng(seed)
    height, width = size

    def polygon():
        points = generator.uniform(-margin, np.array([width, height]) + margin, (int(generator.integers(3, 9)), 2))
        points[0] = generator.uniform(2, (width - 2, height - 2))  # so that it never lies outside
        return points.ravel().tolist()

    return [[(CLASSES[(number + index) % 2], polygon()) for index in range(1 + number % 3)] for number in range(count)]


def write_images(folder, count, size=SIZE, orientation=1):
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number in range(count):
        Image.fromarray(np.full(size, 60 + number, dtype=np.uint8)).save(folder / f"{number:02d}.png", exif=exif)


def write_yolo(folder, scenes, part="train", size=SIZE, orientation=1, drawn_on=SIZE):
    """A polygon may be a list of parts, which are joined as by YOLO's converters."""
    write_images(folder / "images" / part, len(scenes), size, orientation)
    (folder / "data.yaml").write_text(f"names: {json.dumps(list(CLASSES))}\n")
    (folder / "labels" / part).mkdir(parents=True)
    height, width = drawn_on
    for number, objects in enumerate(scenes):
        lines = []
        for name, polygon in objects:
            points = np.reshape(join(polygon) if isinstance(polygon[0], list) else polygon, (-1, 2)) / (width, height)
            lines.append(f"{CLASSES.index(name)} {' '.join(map(repr, points.ravel().tolist()))}\n")
        (folder / "labels" / part / f"{number:02d}.txt").write_text("".join(lines))
    return folder


def join(parts):
    """Parts as one polygon: to a point of the next part and, in the end, all the way back."""
    parts = [np.reshape(part, (-1, 2)).tolist() for part in parts]
    there = [point for part in parts for point in (*part, part[0])]
    return [value for point in (*there, *(part[0] for part in parts[-2::-1])) for value in point]


def write_coco(folder, scenes, part="train", size=SIZE, orientation=1, drawn_on=SIZE):
    write_images(folder / "images" / part, len(scenes), size, orientation)
    described, annotations = [], []
    for number, objects in enumerate(scenes):
        described.append({"id": number, "file_name": f"{number:02d}.png", "height": drawn_on[0], "width": drawn_on[1]})
        for name, polygon in objects:
            parts = polygon if isinstance(polygon[0], list) else [polygon]
            points = np.concatenate([np.reshape(part, (-1, 2)) for part in parts])
            box = [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": CLASSES.index(name), "bbox": box}
                | {"segmentation": parts, "iscrowd": 0}
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"{part}.json").write_text(
        json.dumps({"images": described, "annotations": annotations, "categories": categories})
    )
    return folder


def assert_equal(found, expected):
    """Masks, boxes and classes of both parts."""
    assert found.has_masks and expected.has_masks and found.classes == expected.classes
    assert found.validation_sizes == expected.validation_sizes
    for part in ("train_objects", "validation_objects"):
        pairs = list(zip(getattr(found, part), getattr(expected, part), strict=True))
        assert pairs
        for one, other in pairs:
            assert np.array_equal(one.boxes, other.boxes) and one.boxes.dtype == other.boxes.dtype
            assert np.array_equal(one.classes, other.classes) and not one.ignored.any()
            assert one.masks == other.masks


@pytest.mark.filterwarnings("ignore::simmim.messages.Notice")
@pytest.mark.parametrize("parts", [("train",), ("train", "val")])
def test_masks_and_boxes_are_those_of_coco(parts, tmp_path):
    """Also where they reach out of the image, which is counted alike."""
    for number, part in enumerate(parts):
        write_yolo(tmp_path / "yolo", draw_polygons(number), part)
        write_coco(tmp_path / "coco", draw_polygons(number), part)
    counted, found = [], []
    for format in ("yolo", "coco"):
        with pytest.warns(Notice, match="clipped where they reach out of their images") as told:
            found.append(read_boxed_scenes(str(tmp_path / format), None, 3, masks=None))
        counted.append([str(one.message).partition(" of ")[0] for one in told])
    assert_equal(*found)
    assert counted[0] == counted[1]
    assert any("masks of all objects are learned" in note for note in found[0].notes)
    boxes = read_boxed_scenes(str(tmp_path / "yolo"), None, 3, masks=False)
    assert not boxes.has_masks
    for one, other in zip(boxes.train_objects, found[0].train_objects, strict=True):
        assert one.masks is None and np.array_equal(one.boxes, other.boxes)


def test_labels_draw_the_same_images_of_both_formats(tmp_path):
    scenes = draw_polygons(2, 12, margin=0)
    write_yolo(tmp_path / "yolo", scenes)
    write_coco(tmp_path / "coco", scenes)
    found = [read_boxed_scenes(str(tmp_path / format), 3, 1, masks=None) for format in ("yolo", "coco")]
    assert_equal(*found)
    assert len(found[0].train_objects) == 3


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_masks_of_turned_images(orientation, drawn_on, tmp_path):
    """Shares are of the picture that polygons were drawn on, and masks those of the upright one."""
    size = SIZE[::-1] if drawn_on == "upright" and orientation >= 5 else SIZE
    scenes = [[*objects, ("grain", LEANING)] for objects in draw_polygons(orientation, size=size, margin=0)]
    for format, write in (("yolo", write_yolo), ("coco", write_coco)):
        write(tmp_path / format, scenes, orientation=orientation, drawn_on=size)
    with pytest.raises(ValueError, match="states no size, and EXIF turns the image"):
        read_boxed_scenes(str(tmp_path / "yolo"), None, 0, masks=None)
    found = [read_boxed_scenes(str(tmp_path / format), None, 0, exif=drawn_on, masks=None) for format in ("yolo", "coco")]
    assert_equal(*found)
    upright = SIZE[::-1] if orientation >= 5 else SIZE
    assert set(found[0].validation_sizes) == {upright}
    for objects in found[0].train_objects:
        assert np.abs(np.subtract(objects.masks[-1].box, objects.boxes[-1])).max() < 2  # corners have few pixels


def test_parts_that_are_joined_by_bridges_are_apart(tmp_path):
    """An object behind another one, as converters write it: three parts, whose bridges have no pixels."""
    parts = [
        [3.0, 3.0, 14.0, 4.0, 12.0, 20.0],
        [22.5, 6.0, 30.0, 9.0, 29.0, 33.0, 21.0, 30.0],
        [36.0, 2.0, 49.0, 12.5, 38.0, 25.0],
    ]
    scenes = [[(CLASSES[number % 2], parts[: 2 + number % 2])] for number in range(8)]
    write_yolo(tmp_path / "yolo", scenes)
    write_coco(tmp_path / "coco", scenes)
    found = [read_boxed_scenes(str(tmp_path / format), None, 0, masks=None) for format in ("yolo", "coco")]
    assert_equal(*found)
    for objects in found[0].train_objects:
        assert not draw(objects.masks[0], SIZE)[:, 16:20].any()


def test_rectangles_are_boxes_and_rotated_ones_are_masks(tmp_path):
    """Four corners may be an oriented box, which the run says where masks are learned."""
    for name, polygon in (("upright", RECTANGLE), ("rotated", ROTATED), ("triangle", TRIANGLE)):
        write_yolo(tmp_path / name, [[(CLASSES[number % 2], polygon)] for number in range(8)])
    found = {
        name: read_boxed_scenes(str(tmp_path / name), None, 0, masks=None) for name in ("upright", "rotated", "triangle")
    }
    assert {name: one.has_masks for name, one in found.items()} == {"upright": False, "rotated": True, "triangle": True}
    assert found["upright"].train_objects[0].boxes.tolist() == [[4, 5, 20, 30]]
    assert found["rotated"].train_objects[0].boxes.tolist() == [[15, 4, 40, 24]]
    area = found["rotated"].train_objects[0].masks[0].area
    assert area == pytest.approx(250, abs=15)  # 22.4 by 11.2 pixels
    told = {name: [note for note in one.notes if "oriented boxes" in note] for name, one in found.items()}
    assert [len(told[name]) for name in ("upright", "rotated", "triangle")] == [0, 1, 0]
    boxes = read_boxed_scenes(str(tmp_path / "rotated"), None, 0, masks=False)
    assert not boxes.has_masks and not any("oriented" in note for note in boxes.notes)


def test_boxes_among_polygons_are_refused(tmp_path):
    """As annotations without a mask are."""
    write_yolo(tmp_path, [[(CLASSES[number % 2], TRIANGLE)] for number in range(8)])
    file = tmp_path / "labels" / "train" / "03.txt"
    file.write_text(file.read_text() + "1 0.5 0.5 0.25 0.25\n")
    with pytest.raises(ValueError, match=r"03\.txt, line 2 has no mask, as 1 of 9 objects .*head\.masks false"):
        read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    boxes = read_boxed_scenes(str(tmp_path), None, 0, masks=False)
    assert not boxes.has_masks and sum(len(one.boxes) for one in (*boxes.train_objects, *boxes.validation_objects)) == 9


WORDS = "words, expected a class and four numbers"


@pytest.mark.parametrize("masks", [None, False])
@pytest.mark.parametrize(
    "line, message",
    [
        ("0 0.1 0.2", f"3 {WORDS}, or x and y of 3 points or more of a polygon"),
        ("0 0.1 0.2 0.3 0.4 0.5", f"6 {WORDS}, or x and y"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", f"8 {WORDS}, or x and y"),
        ("0 0.1 0.2 0.3 0.4 0.5 nan", "'nan' in a polygon, expected finite numbers"),
        ("0 0.1 -inf 0.3 0.4 0.5 0.6", "'-inf' in a polygon, expected finite numbers"),
        ("0 0.1 0.2 x 0.4 0.5 0.6", "'x' in a polygon, expected numbers"),
        ("0 10 20 30 20 30 35", "is in pixels, expected shares of width and height"),
        ("0 0.1 0.2 0.1 0.4 0.1 0.6", "has no area: correct or remove it"),
        ("0 1.1 1.1 1.2 1.1 1.2 1.2", "lies outside its image of 37x52 pixels"),
    ],
)
def test_wrong_lines_are_refused(line, message, masks, tmp_path):
    """In one line that names file and line, whether masks are read or not."""
    write_yolo(tmp_path, [[(CLASSES[number % 2], TRIANGLE)] for number in range(8)])
    file = tmp_path / "labels" / "train" / "03.txt"
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(ValueError) as error:
        read_boxed_scenes(str(tmp_path), None, 0, masks=masks)
    assert str(error.value).startswith(f"{file}, line 2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_keypoints_are_no_polygons(tmp_path):
    """A box and pairs of numbers are as many words as a polygon; data.yaml tells them apart."""
    write_yolo(tmp_path, [[(CLASSES[number % 2], TRIANGLE)] for number in range(8)])
    for number in range(8):
        (tmp_path / "labels" / "train" / f"{number:02d}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 0.25\n")
    (tmp_path / "data.yaml").write_text(f"names: {json.dumps(list(CLASSES))}\nkpt_shape: [2, 2]\n")
    assert not read_boxed_scenes(str(tmp_path), None, 0, masks=None).has_masks
    file = tmp_path / "labels" / "train" / "03.txt"
    file.write_text("1 0.5 0.5 0.25 0.25 0.4 0.4 0.6 0.6\n")
    with pytest.raises(
        ValueError, match=rf"03\.txt, line 1: 9 {WORDS}: data\.yaml has kpt_shape, and keypoints are not read"
    ):
        read_boxed_scenes(str(tmp_path), None, 0, masks=None)
