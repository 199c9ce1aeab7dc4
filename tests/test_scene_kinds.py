"""Labeled scenes of every kind of image, for segmentation and detection: channels in files of their own, pages of a file.

The same values in an OME-TIFF of five channels and in five files are the same batches, bit for bit; predict finds what
validation found.
"""

import csv
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from simmim.cli import main
from simmim.data import open_images
from simmim.data.image_names import WholeImages, list_images
from simmim.data.label_map_files import read_label_map
from simmim.data.label_map_sources import read_scenes
from simmim.data.label_maps import read_labeled_scenes
from simmim.data.scene_draws import SceneDraw
from simmim.finetune import DetectionSettings, SegmentationSettings, finetune, load_detector, load_segmenter
from simmim.finetune.dense.prediction import read_images
from simmim.finetune.detection.labels.base import ReadingOptions
from simmim.finetune.detection.labels.scenes import read_boxed_scenes
from simmim.finetune.detection.settings import BoxSettings
from simmim.finetune.detection.settings import HeadSettings as BoxHeadSettings
from simmim.finetune.registry import task_named
from simmim.finetune.segmentation.settings import HeadSettings, SceneSettings
from simmim.finetune.segmentation.sliding import most_likely_class
from simmim.finetune.settings import EncoderSettings, OptimSettings
from simmim.messages import without_notices
from simmim.reading import AUTO, Reading

SIDE_PX, COUNT, CHANNELS = 32, 10, 5
PATTERN = "{well}_s{site}_w{channel}"
BY_PATTERN = replace(AUTO, channel_files=PATTERN)
PAGES = replace(AUTO, pages="images")


@dataclass(frozen=True)
class Written:
    """A scene.

    Attributes:
        values: 12 bits, (channels, height, width).
        label_map: class ids, (height, width).
        box: of its one object, (left, top, right, bottom).
    """

    values: np.ndarray
    label_map: np.ndarray
    box: tuple[int, int, int, int]


def scene(number, channels=CHANNELS):
    """A rectangle on noise, brighter by another factor in each channel."""
    chance = np.random.default_rng(number)
    left, top = chance.integers(2, 16, 2).tolist()
    right, bottom = left + 12, top + 10
    values = chance.integers(200, 900, (channels, SIDE_PX, SIDE_PX))
    label_map = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    label_map[top:bottom, left:right] = 1
    values += label_map * np.arange(1, channels + 1)[:, None, None] * 500
    return Written(values.astype(np.uint16), label_map, (left, top, right, bottom))


SCENES = [scene(number) for number in range(COUNT)]
PLANES = [scene(100 + number, 1) for number in range(COUNT)]  # of pages


def write_ome(folder):
    """An OME-TIFF a scene; gives each scene by the name of its labels."""
    for number, one in enumerate(SCENES):
        metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP", "RFP", "Cy5", "BF"]}}
        tifffile.imwrite(folder / f"B{number}_s1.ome.tif", one.values, ome=True, photometric="minisblack", metadata=metadata)
    return {f"B{number}_s1": one for number, one in enumerate(SCENES)}


def write_channel_files(folder):
    """Five PNG files a scene."""
    for number, one in enumerate(SCENES):
        for channel, plane in enumerate(one.values, start=1):
            Image.fromarray(plane).save(folder / f"B{number}_s1_w{channel}.png")
    return {f"B{number}_s1": one for number, one in enumerate(SCENES)}


def write_pages(folder):
    """Two scenes a TIFF file, whose pages nothing explains."""
    for number in range(0, COUNT, 2):
        stack = np.concatenate([one.values for one in PLANES[number : number + 2]])
        tifffile.imwrite(folder / f"scan{number}.tif", stack, photometric="minisblack", metadata=None)
    return {f"scan{number - number % 2}.tif#page={number % 2}": one for number, one in enumerate(PLANES)}


KINDS = {
    "ome": (write_ome, {}),
    "files": (write_channel_files, {"channel_files": PATTERN}),
    "pages": (write_pages, {"pages": "images"}),
}


def write_folder(folder, kind, kinds_of_labels=("masks", "labels")):
    """images/ and, of the same names, PNG label maps and YOLO's text."""
    for name in ("images", *kinds_of_labels):
        (folder / name).mkdir(parents=True)
    scenes = KINDS[kind][0](folder / "images")
    for name, one in scenes.items():
        if "masks" in kinds_of_labels:
            Image.fromarray(one.label_map).save(folder / "masks" / f"{name}.png")
        if "labels" in kinds_of_labels:
            left, top, right, bottom = (value / SIDE_PX for value in one.box)
            line = f"0 {(left + right) / 2} {(top + bottom) / 2} {right - left} {bottom - top}\n"
            (folder / "labels" / f"{name}.txt").write_text(line)
    return folder


def settings_of(task, folder, out, **of_data):
    common = {
        "out": str(out),
        "init": "none",
        "encoder": EncoderSettings(preset="nano"),
        "image_size": SIDE_PX,
        "steps": 2,
        "batch_size": 4,
        "workers": 0,
        "validations": 1,
        "precision": "32-true",
        "optim": OptimSettings(label_smoothing=0.0),
    }
    if task == "segmentation":
        return SegmentationSettings(data=SceneSettings(str(folder), **of_data), head=HeadSettings(width=16), **common)
    return DetectionSettings(data=BoxSettings(str(folder), format="yolo", **of_data), head=BoxHeadSettings(16, 1), **common)


@pytest.fixture
def quiet():
    with without_notices():
        yield


# --- the same batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_channels_in_files_of_their_own_are_the_same_batches(tmp_path, quiet, task):
    samples = {}
    for kind in ("ome", "files"):
        folder = write_folder(tmp_path / kind, kind, ("masks",) if task == "segmentation" else ("labels",))
        prepared = task_named(task).prepare(settings_of(task, folder, tmp_path / "run", **KINDS[kind][1]), "cpu")
        assert prepared.module.model.encoder.config.in_channels == CHANNELS
        assert len(prepared.train) == 8 and len(prepared.validation) == 2
        parts = ((prepared.train, 3), (prepared.validation, 1))
        samples[kind] = [part[(epoch, row)] for part, epochs in parts for epoch in range(epochs) for row in range(len(part))]
        assert prepared.train.reading == prepared.validation.reading
    for of_ome, of_files in zip(*samples.values(), strict=True):
        assert of_ome["image"].dtype == torch.float32 and of_ome["image"].nan_to_num(0).std() > 0.05
        torch.testing.assert_close(of_ome["image"], of_files["image"], rtol=0, atol=0, equal_nan=True)
        for name in ("label_map", "seed", "objects", "own_size"):
            if name in of_ome:
                torch.testing.assert_close(of_ome[name], of_files[name], rtol=0, atol=0)


# --- from a run to its predictions ---------------------------------------------------------------------------------------


def check_predicted_pixels(saved, folder, validation):
    """The images that predict passes through the model are those of validation, bit for bit."""
    source = open_images(folder / "images", reading=saved.preprocessing.reading)
    paths = [record["path"] for record in source["image"]]
    unreadable = {}
    seen = {image.name: image.pixels for image in read_images(source, paths, saved, unreadable)}
    assert len(seen) == COUNT and not unreadable
    for row in range(len(validation)):
        image = validation[(0, row)]["image"]
        assert image.dtype == torch.float32 and torch.equal(seen[validation.name_of(row)], image)


@pytest.mark.parametrize("kind", ["files", "pages"])
def test_predict_segments_what_validation_saw(tmp_path, quiet, kind):
    folder, out = write_folder(tmp_path / "scenes", kind, ("masks",)), tmp_path / "out"
    settings = settings_of("segmentation", folder, tmp_path / "run", **KINDS[kind][1])
    finetune(settings, quiet=True)
    validation = task_named("segmentation").prepare(settings, "cpu").validation
    saved = load_segmenter(tmp_path / "run")
    assert saved.preprocessing.reading == validation.reading and saved.preprocessing.reading.is_deep
    check_predicted_pixels(saved, folder, validation)
    words = ["predict", "--run", str(tmp_path / "run"), "--images", str(folder / "images"), "--out", str(out)]
    assert main(words) == 0
    predicted = list_images(folder / "images", settings.data.reading)
    assert len(predicted) == COUNT and len(list((out / "masks").iterdir())) == COUNT
    names = {
        image.address: next(name for name in image.names if (out / "masks" / f"{name}.png").is_file()) for image in predicted
    }
    for row in range(len(validation)):
        found = most_likely_class(saved.logits(validation[(0, row)]["image"][None]), (SIDE_PX, SIDE_PX))[0].numpy()
        written = out / "masks" / f"{names[validation.name_of(row)]}.png"
        np.testing.assert_array_equal(read_label_map({"bytes": None, "path": str(written)}), found)
    # What predict writes can be labels again.
    scenes = (folder / "masks").rename(tmp_path / "given") and (out / "masks").rename(folder / "masks") and folder
    assert len(read_scenes(str(scenes), reading=settings.data.reading)["train"]) == COUNT


@pytest.mark.parametrize("kind", ["files", "pages"])
def test_predict_finds_the_boxes_that_validation_found(tmp_path, quiet, kind):
    folder, out = write_folder(tmp_path / "scenes", kind, ("labels",)), tmp_path / "out"
    settings = settings_of("detection", folder, tmp_path / "run", **KINDS[kind][1])
    finetune(settings, quiet=True)
    validation = task_named("detection").prepare(settings, "cpu").validation
    saved = load_detector(tmp_path / "run")
    assert saved.preprocessing.reading == validation.reading and saved.preprocessing.reading.is_deep
    check_predicted_pixels(saved, folder, validation)
    words = ["predict", "--run", str(tmp_path / "run"), "--images", str(folder / "images"), "--out", str(out)]
    assert main(words) == 0
    described, results = (json.loads((out / name).read_text()) for name in ("images.json", "results.json"))
    whole = WholeImages(settings.data.reading)
    ids = {whole.address_of(image["file_name"]): image["id"] for image in described["images"]}
    assert len(ids) == COUNT and len(results) > COUNT
    for row in range(len(validation)):
        [found] = saved.find(validation[(0, row)]["image"][None])
        written = [one["score"] for one in results if one["image_id"] == ids[validation.name_of(row)]]
        assert written == pytest.approx(found.scores.tolist(), abs=2e-6) and len(written) > 0
    with (out / "boxes.csv").open(newline="") as text:
        paths = {row["path"] for row in csv.DictReader(text)}
    assert {whole.address_of(path) for path in paths} == ids.keys(), "the table names images as labels do"


# --- which labels are whose ----------------------------------------------------------------------------------------------


def pairs_of(source, reading):
    """Label maps' values by the image's address in its folder."""
    rows = read_scenes(str(source), reading=reading)["train"]
    return {row["image"]["path"].rpartition("/")[2]: read_label_map(row["label_map"]) for row in rows}


def test_label_maps_of_pages(tmp_path, quiet):
    """One for each page, a file of as many pages, or rows of a CSV file."""
    folder = write_folder(tmp_path / "scenes", "pages", ("masks",))
    by_page = pairs_of(folder, PAGES)
    assert len(by_page) == COUNT
    for number, one in enumerate(PLANES):
        np.testing.assert_array_equal(by_page[f"scan{number - number % 2}.tif#page={number % 2}"], one.label_map)
    with (folder / "scenes.csv").open("w") as text:
        text.write("image,mask\n")
        for number in range(COUNT):
            name = f"scan{number - number % 2}.tif#page={number % 2}"
            text.write(f"images/{name},masks/{name}.png\n")
    assert [*map(np.ndarray.tobytes, pairs_of(folder / "scenes.csv", PAGES).values())] == [
        *map(np.ndarray.tobytes, by_page.values())
    ]
    for file in (folder / "masks").iterdir():
        file.unlink()
    for number in range(0, COUNT, 2):
        stack = np.stack([one.label_map for one in PLANES[number : number + 2]])
        tifffile.imwrite(folder / "masks" / f"scan{number}.tif", stack, photometric="minisblack", metadata=None)
    (folder / "scenes.csv").write_text(
        "image,mask\n" + "".join(f"images/scan{n}.tif,masks/scan{n}.tif\n" for n in range(0, COUNT, 2))
    )
    for source in (folder, folder / "scenes.csv"):
        of_files = pairs_of(source, PAGES)
        assert of_files.keys() == by_page.keys()
        assert all(np.array_equal(of_files[name], by_page[name]) for name in by_page)


def test_pages_of_a_file_train_or_validate(tmp_path, quiet):
    """In the fifth that is held out, in parts of the training scenes and in cross-validation, of both tasks."""
    folder = write_folder(tmp_path / "scenes", "pages")
    draws = [SceneDraw(), SceneDraw(fold=(0, 2)), SceneDraw(pool=(0, 2)), SceneDraw(validation_seed=3)]
    for seed in range(4):
        for draw in draws:
            segmented = read_labeled_scenes(folder, None, seed, draw=draw, reading=PAGES)
            boxed = read_boxed_scenes(str(folder), None, seed, ReadingOptions(reading=PAGES), "yolo", draw=draw)
            for scenes in (segmented, boxed):
                train, validation = (
                    {record["path"].split("#")[0] for record in part["image"]} for part in (scenes.train, scenes.validation)
                )
                assert train and validation and not train & validation
                assert all(len(objects.boxes) == 1 for objects in (*boxed.train_objects, *boxed.validation_objects))
                assert len(scenes.train) == 2 * len(train) and len(scenes.validation) == 2 * len(validation)


def test_pages_are_channels(tmp_path, quiet):
    """One label map for all."""
    (tmp_path / "images").mkdir(), (tmp_path / "masks").mkdir()
    for number, one in enumerate(SCENES):
        tifffile.imwrite(tmp_path / "images" / f"{number}.tif", one.values, photometric="minisblack", metadata=None)
        Image.fromarray(one.label_map).save(tmp_path / "masks" / f"{number}.png")
    prepared = task_named("segmentation").prepare(
        settings_of("segmentation", tmp_path, tmp_path / "run", pages="channels"), "cpu"
    )
    assert prepared.train[(0, 0)]["image"].shape == (CHANNELS, SIDE_PX, SIDE_PX) and len(prepared.train) == 8
    (tmp_path / "masks" / "3.png").unlink()
    stack = np.stack([SCENES[3].label_map] * CHANNELS)
    tifffile.imwrite(tmp_path / "masks" / "3.tif", stack, photometric="minisblack", metadata=None)
    with pytest.raises(
        ValueError, match=r"label map .*3\.tif cannot be read: holds 5 pages for one image: give one page, or"
    ):
        read_labeled_scenes(tmp_path, None, 0, reading=Reading(pages="channels"))
    assert len(read_labeled_scenes(tmp_path, None, 0, reading=Reading(pages="first")).train) == 8, "the first of each"


def test_labels_name_one_of_an_image_s_files(tmp_path, quiet):
    """As file_name of COCO, path of a CSV file, image of a CSV file of label maps, and by the name of a label map."""
    folder = write_folder(tmp_path / "scenes", "files")
    images = open_images(folder / "images", reading=BY_PATTERN)
    addresses = [record["path"] for record in images["image"]]
    options = ReadingOptions(reading=BY_PATTERN)
    names = [f"B{number}_s1_w{1 + number % CHANNELS}.png" for number in range(COUNT)]
    boxes = [one.box for one in SCENES]
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for number, (x1, y1, x2, y2) in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "0"}],
    }
    (tmp_path / "scenes" / "train.json").write_text(json.dumps(content))
    (tmp_path / "scenes" / "boxes.csv").write_text(
        "path,class,xmin,ymin,xmax,ymax\n"
        + "".join(f"images/{name},0,{x1},{y1},{x2},{y2}\n" for name, (x1, y1, x2, y2) in zip(names, boxes))
    )
    for path, format in ((folder, "yolo"), (folder / "train.json", "coco"), (folder / "boxes.csv", "csv")):
        scenes = read_boxed_scenes(str(path), None, 0, options, format)
        found = dict(zip((record["path"] for record in scenes.train["image"]), scenes.train_objects))
        found |= dict(zip((record["path"] for record in scenes.validation["image"]), scenes.validation_objects))
        assert sorted(found) == sorted(addresses)
        for address, box in zip(addresses, boxes):
            np.testing.assert_allclose(found[address].boxes, [box], atol=1e-4)
    expected = pairs_of(folder, BY_PATTERN)
    (folder / "scenes.csv").write_text(
        "image,mask\n" + "".join(f"images/{name},masks/B{number}_s1.png\n" for number, name in enumerate(names))
    )
    by_table = pairs_of(folder / "scenes.csv", BY_PATTERN)
    for number, name in enumerate(names):
        (folder / "masks" / f"B{number}_s1.png").rename(folder / "masks" / name)
    by_name = pairs_of(folder, BY_PATTERN)
    for found in (by_table, by_name):
        assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


def test_channels_are_folders(tmp_path, quiet):
    """Of the folder's name the label map has nothing."""
    for channel in ("dapi", "gfp"):
        (tmp_path / "images" / channel).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(SCENES[number].values[0]).save(tmp_path / "images" / channel / f"{number}.png")
    (tmp_path / "masks").mkdir()
    for number in range(2):
        Image.fromarray(SCENES[number].label_map).save(tmp_path / "masks" / f"{number}.png")
    rows = read_scenes(str(tmp_path), reading=Reading(channel_files="{channel}/{field}"))["train"]
    assert [row["image"]["path"].rpartition("#")[2] for row in rows] == ["channels=dapi,gfp"] * 2
    assert [row["label_map"]["path"].rpartition("/")[2] for row in rows] == ["0.png", "1.png"]


# --- what is unclear -----------------------------------------------------------------------------------------------------


def both_named(folder):
    (folder / "masks" / "B3_s1_w2.png").write_bytes((folder / "masks" / "B3_s1.png").read_bytes())


def no_label_map(folder):
    (folder / "masks" / "B3_s1.png").unlink()


def no_channel(folder):
    (folder / "images" / "B3_s1_w2.png").unlink()


def no_image(folder):
    (folder / "masks" / "B99_s1.png").write_bytes((folder / "masks" / "B3_s1.png").read_bytes())


def two_rows(folder):
    (folder / "scenes.csv").write_text(
        "image,mask\nimages/B3_s1_w1.png,masks/B3_s1.png\nimages/B3_s1_w2.png,masks/B3_s1.png\n"
    )


def unknown_file(folder):
    (folder / "images" / "other.png").write_bytes((folder / "images" / "B3_s1_w1.png").read_bytes())
    (folder / "scenes.csv").write_text("image,mask\nimages/other.png,masks/B3_s1.png\n")


def other_pages(folder):
    for page in range(2):
        (folder / "masks" / f"scan4.tif#page={page}.png").unlink()
    stack = np.stack([PLANES[4].label_map] * 3)
    tifffile.imwrite(folder / "masks" / "scan4.tif", stack, photometric="minisblack", metadata=None)


def one_for_two(folder):
    for page in range(2):
        (folder / "masks" / f"scan4.tif#page={page}.png").unlink()
    Image.fromarray(PLANES[4].label_map).save(folder / "masks" / "scan4.png")


def a_page_without(folder):
    (folder / "masks" / "scan4.tif#page=1.png").unlink()


def no_such_page(folder):
    (folder / "scenes.csv").write_text("image,mask\nimages/scan4.tif#page=2,masks/scan4.tif#page=1.png\n")


def any_page(folder):
    (folder / "scenes.csv").write_text("image,mask\nimages/scan4.tif,masks/scan4.png\n")
    (folder / "masks" / "scan4.png").write_bytes((folder / "masks" / "scan4.tif#page=1.png").read_bytes())


@pytest.mark.parametrize(
    ("kind", "harm", "message"),
    [
        ("files", both_named, r"the label maps 'B3_s1' and 'B3_s1_w2' are both of the image .*B3_s1_w1\.png\|.*: keep one"),
        ("files", no_label_map, r"image .*B3_s1_w1\.png\|.* has no label map: expected .*/masks/B3_s1\.png"),
        ("files", no_channel, r"1 of 10 images lacks some of the channels 1, 2, 3, 4, 5; the first, 'B3 1', has no 2"),
        ("files", no_image, r"label map .*B99_s1\.png has no image: expected .*/images/B99_s1\.jpg"),
        ("files", two_rows, r"the labels have .*B3_s1_w1\.png' and .*B3_s1_w2\.png', which are channels of one image: keep"),
        ("files", unknown_file, r"data\.channel_files .* does not match .*other\.png', which the labels name"),
        (
            "pages",
            other_pages,
            r"label map .*scan4\.tif holds 3 pages and .*scan4\.tif 2, each an image: give one with as many",
        ),
        (
            "pages",
            one_for_two,
            r"label map .*scan4\.png holds 1 page and .*scan4\.tif 2, each an image: give one with as many",
        ),
        (
            "pages",
            a_page_without,
            r"scan4\.tif#page=1 has no label map: expected .*scan4\.tif#page=1\.png, or .*scan4\.tif with",
        ),
        ("pages", no_such_page, r"scan4\.tif#page=2: the file holds 2 images, and pages are counted from 0"),
        ("pages", any_page, r"label map .*scan4\.png holds 1 page and .*scan4\.tif 2, each an image"),
    ],
)
def test_what_is_unclear_is_refused_in_a_line(tmp_path, quiet, kind, harm, message):
    folder = write_folder(tmp_path / "scenes", kind, ("masks",))
    harm(folder)
    source = folder / "scenes.csv" if (folder / "scenes.csv").exists() else folder
    with pytest.raises(ValueError, match=message) as error:
        read_labeled_scenes(source, None, 0, reading=BY_PATTERN if kind == "files" else PAGES)
    assert "\n" not in str(error.value)


def test_annotations_of_all_pages_are_refused(tmp_path, quiet):
    folder = write_folder(tmp_path / "scenes", "pages", ("labels",))
    (folder / "labels" / "scan4.tif#page=1.txt").rename(folder / "labels" / "scan4.txt")
    with pytest.raises(
        ValueError, match=r"the annotations 'scan4' are of .*scan4\.tif, whose pages are images: name them scan4"
    ):
        read_boxed_scenes(str(folder), None, 0, ReadingOptions(reading=PAGES), "yolo")
    (folder / "boxes.csv").write_text("path,class,xmin,ymin,xmax,ymax\nimages/scan4.tif,cell,1,2,3,4\n")
    with pytest.raises(ValueError, match=r"scan4\.tif holds 2 images, its pages, and its labels do not tell which"):
        read_boxed_scenes(str(folder / "boxes.csv"), None, 0, ReadingOptions(reading=PAGES))


def test_rows_with_columns_are_one_image_each(tmp_path, quiet):
    import pyarrow
    import pyarrow.parquet

    folder = write_folder(tmp_path / "scenes", "pages", ("masks",))
    images = [{"bytes": (folder / "images" / f"scan{number}.tif").read_bytes(), "path": None} for number in (0, 2)]
    masks = [{"bytes": (folder / "masks" / "scan0.tif#page=0.png").read_bytes(), "path": "a.png"}] * 2
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "mask": masks}), tmp_path / "scenes.parquet")
    with pytest.raises(ValueError, match=r"row 0 of .* holds 2 images, its pages, and labels of one: give each page a row"):
        read_scenes(str(tmp_path / "scenes.parquet"), reading=PAGES)
    with pytest.raises(ValueError, match=r"data\.channel_files is of files: each row of .* has an image of its own"):
        read_scenes(str(tmp_path / "scenes.parquet"), reading=BY_PATTERN)
