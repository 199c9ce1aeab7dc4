"""Masks of objects as labels state them: run lengths and polygons as COCO's, instance maps, EXIF, and what is refused."""

import json
import re

import numpy as np
import pycocotools.mask as coco
import pytest
from mask_files import CLASSES, box_of, draw_scenes, random_pixels, run_lengths, write_scenes
from PIL import Image

from simmim.data import open_picture
from simmim.finetune.detection.labels.base import ReadingOptions
from simmim.finetune.detection.labels.masks import read_mask
from simmim.finetune.detection.labels.scenes import read_boxed_scenes
from simmim.finetune.detection.masks import coco_rle, draw, pack
from simmim.messages import Notice

# --- run lengths and polygons ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "all", "noise", "columns", "rectangles"])
@pytest.mark.parametrize("size", [(7, 5), (1, 9), (9, 1), (40, 33)])
def test_run_lengths_are_those_of_pycocotools(kind, size):
    """Compressed and not, to a mask and back."""
    pixels = random_pixels(np.random.default_rng(1), size, kind)
    for compressed in (True, False):
        mask = read_mask(run_lengths(pixels, compressed), size, "here")
        assert np.array_equal(draw(mask, size), pixels)
        assert mask.area == pixels.sum() == np.unpackbits(np.frombuffer(mask.bits, np.uint8)).sum()
    assert coco_rle(mask, size) == run_lengths(pixels)
    assert pack(pixels) == mask
    if pixels.any():
        x, y, width, height = box_of(pixels)
        assert mask.box == (x, y, x + width, y + height)


def test_polygons_are_rasterized_as_by_pycocotools():
    """Of several parts, which may overlap and reach out of the image."""
    generator = np.random.default_rng(2)
    for _ in range(200):
        parts = [generator.uniform(-8, 50, 2 * generator.integers(3, 9)).tolist() for _ in range(generator.integers(1, 4))]
        expected = coco.decode(coco.merge(coco.frPyObjects(parts, 37, 41)))
        assert np.array_equal(draw(read_mask(parts, (37, 41), "here"), (37, 41)), expected.astype(bool))


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 1, 5, 5]], "polygon 0 has 4 numbers, expected x and y of 3 points or more"),
        ([[1, 1, 5, 5, 3, 2], [1, 2, 3, 4, 5, 6, 7]], "polygon 1 has 7 numbers"),
        ([[1, 1, 5, "5", 3, 2]], "polygon 0 is no list of numbers"),
        ([[1, 1, 5, float("nan"), 3, 2]], "polygon 0 has numbers that are not finite"),
        ("text", "segmentation 'text', expected polygons or run lengths"),
        ({"size": [10, 8]}, "run lengths without size or counts"),
        ({"size": [8, 10], "counts": [80]}, r"run lengths of 8x10 pixels, and the image has 10x8 \(height x width\)"),
        ({"size": [10, 8], "counts": [10, 20]}, "run lengths of 30 pixels, and the image has 10 x 8 = 80"),
        ({"size": [10, 8], "counts": [-1, 81]}, "no whole numbers from 0"),
        ({"size": [10, 8], "counts": [1.5, 78.5]}, "no whole numbers from 0"),
        ({"size": [10, 8], "counts": "05"}, "run lengths of 5 pixels"),
        ({"size": [10, 8], "counts": "zzz~~~"}, "broken run lengths"),
        ({"size": [10, 8], "counts": "a b"}, "broken run lengths"),
    ],
)
def test_broken_masks_are_refused_in_one_line(segmentation, message):
    with pytest.raises(ValueError, match=r"^file, annotation 3: ") as error:
        read_mask(segmentation, (10, 8), "file, annotation 3")
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


# --- labels ------------------------------------------------------------------------------------------------------------


def edit(file, change):
    content = json.loads(file.read_text())
    change(content["annotations"])
    file.write_text(json.dumps(content))


def test_masks_are_read_where_every_object_has_one(tmp_path):
    scenes = draw_scenes(6, 0)
    file = write_scenes(tmp_path, scenes)
    everything = read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    assert everything.has_masks and any("masks of all objects are learned" in note for note in everything.notes)
    number = 0
    for row, objects in zip(everything.train, everything.train_objects):
        shapes = scenes[int(row["image"]["path"][-6:-4]) - 1]
        for shape, mask in zip(shapes, objects.masks, strict=True):
            assert np.array_equal(draw(mask, (48, 48)), shape.pixels)
            number += 1
    assert number > 4
    for wanted in (False, None):
        if wanted is None:
            edit(file, lambda annotations: [one.update(segmentation=[]) for one in annotations])
        boxes = read_boxed_scenes(str(tmp_path), None, 0, masks=wanted)
        assert not boxes.has_masks and {one.masks for one in boxes.train_objects} == {None}
    with pytest.raises(ValueError, match="annotation 100 has no mask, as 9 of 9 objects"):
        read_boxed_scenes(str(tmp_path), None, 0, masks=True)


def test_some_objects_without_masks_are_refused(tmp_path):
    file = write_scenes(tmp_path, draw_scenes(6, 0))
    edit(file, lambda annotations: annotations[2].pop("segmentation"))
    with pytest.raises(ValueError, match=r"annotation \d+ has no mask, as 1 of 9 objects .*head.masks false"):
        read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    assert not read_boxed_scenes(str(tmp_path), None, 0, masks=False).has_masks
    edit(file, lambda annotations: annotations[2].update(iscrowd=1))
    crowded = read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    [[mask, box]] = [
        (objects.masks[number], objects.boxes[number])
        for objects in (*crowded.train_objects, *crowded.validation_objects)
        for number in np.flatnonzero(objects.ignored)
    ]
    assert mask.box == tuple(box) and mask.pixels.all(), "a crowd without a mask hides its box"


def test_boxes_written_as_polygons_are_boxes(tmp_path):
    def as_boxes(annotations):
        for one in annotations:
            x, y, width, height = one["bbox"]
            one["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]

    edit(write_scenes(tmp_path, draw_scenes(6, 0)), as_boxes)
    assert not read_boxed_scenes(str(tmp_path), None, 0, masks=None).has_masks
    assert read_boxed_scenes(str(tmp_path), None, 0, masks=True).has_masks


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_masks_are_those_of_the_upright_picture(orientation, drawn_on, tmp_path):
    """Every bright pixel, and no other."""
    file = write_scenes(tmp_path, draw_scenes(4, 3, (32, 48)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in (tmp_path / "images" / "train").iterdir():
        stored = Image.open(image)
        if drawn_on == "upright":
            inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's operations that undo the turn
            stored = stored.transpose(inverse[orientation]) if orientation > 1 else stored
        stored.save(image, exif=exif)
    scenes = read_boxed_scenes(str(tmp_path), None, 0, exif=drawn_on, masks=None)
    for row, objects in zip(scenes.train, scenes.train_objects):
        picture = open_picture({"bytes": None, "path": row["image"]["path"]}, 1)
        pixels = picture.crop((0, 0, *picture.size[::-1]), picture.size)[0].numpy()
        found = np.any([draw(mask, picture.size) for mask in objects.masks], axis=0)
        assert np.array_equal(found, pixels > 100)
        for mask, box in zip(objects.masks, objects.boxes):
            assert mask.box == tuple(box)
    assert file.is_file()


# --- instance maps -----------------------------------------------------------------------------------------------------


def write_instance_maps(folder, scenes, part="", by_class=False, ending="png", first=300):
    """Images and maps of one part; objects are numbered from `first` on, with gaps."""
    images = folder / "images" / part
    images.mkdir(parents=True, exist_ok=True)
    for number, shapes in enumerate(scenes):
        pixels = np.zeros(shapes[0].pixels.shape, dtype=np.uint8)
        maps = {}
        for index, shape in enumerate(shapes):
            pixels[shape.pixels] = 200
            values = maps.setdefault(shape.name if by_class else "", np.zeros(pixels.shape, dtype=np.uint16))
            values[shape.pixels] = first + 7 * index
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
        for name, values in maps.items():
            home = folder / "instances" / name / part
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(home / f"{number:02d}.{ending}")
    return folder


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_instance_maps_are_masks_of_each_number(ending, by_class, parts, tmp_path):
    """16 bits, with parts and without, of one class or a folder a class."""
    scenes = draw_scenes(8, 4)
    for part in parts:
        write_instance_maps(tmp_path, scenes, part, by_class, ending)
    found = read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    assert found.classes == (CLASSES if by_class else ("object",)) and found.has_masks
    assert any("labels are instance maps" in note for note in found.notes)
    everything = list(zip(found.train, found.train_objects))
    everything += [] if len(parts) > 1 else list(zip(found.validation, found.validation_objects))
    assert len(everything) == 8
    for row, objects in everything:
        shapes = scenes[int(row["image"]["path"][-6:-4])]
        pairs = {found.classes[label] + str(mask.box): mask for label, mask in zip(objects.classes, objects.masks)}
        assert len(pairs) == len(shapes)
        for shape in shapes:
            x, y, width, height = box_of(shape.pixels)
            name = (shape.name if by_class else "object") + str((float(x), float(y), float(x + width), float(y + height)))
            assert np.array_equal(draw(pairs[name], shape.pixels.shape), shape.pixels)
    named = read_boxed_scenes(str(tmp_path), None, 0, ReadingOptions(classes=CLASSES if by_class else ("cell",)))
    assert named.classes == (CLASSES if by_class else ("cell",)) and not named.has_masks


def test_instance_maps_that_are_wrong_are_refused_or_told(tmp_path):
    folder = write_instance_maps(tmp_path, draw_scenes(6, 4), first=1)
    one = folder / "instances" / "00.png"
    values = np.array(Image.open(one))
    (folder / "instances" / "99.png").write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"99\.png has no image"):
        read_boxed_scenes(str(folder), None, 0)
    (folder / "instances" / "99.png").unlink()
    Image.fromarray(values[:-1]).save(one)
    with pytest.raises(ValueError, match=r"00\.png states 47x48 pixels, and the image has 48x48"):
        read_boxed_scenes(str(folder), None, 0)
    one.write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"instance map .*00\.png cannot be read"):
        read_boxed_scenes(str(folder), None, 0)
    one.unlink()
    with pytest.warns(Notice, match="1 of 6 images .* have no instance map and count as images without objects"):
        read_boxed_scenes(str(folder), None, 0)
    for file in (folder / "instances").iterdir():
        Image.fromarray(((np.array(Image.open(file)) > 0) * 255).astype(np.uint8)).save(file)
    with pytest.warns(Notice, match="holds the one number 255: are they masks of a class"):
        read_boxed_scenes(str(folder), None, 0)
