"""COCO's JSON: one file a part, with images, annotations and categories. Roboflow writes it beside the images."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simmim.data.image_names import WholeImages, file_of
from simmim.data.label_sources import subfolders
from simmim.data.parts import assign_parts, assign_splits
from simmim.finetune.detection.labels.base import (
    BoxReader,
    RawLabels,
    RawObject,
    RawScene,
    ReadingOptions,
    four_numbers,
    record_of,
)
from simmim.finetune.detection.labels.layout import IMAGE_FOLDERS, files_in, read_text
from simmim.finetune.detection.labels.masks import states_mask
from simmim.messages import name_some

ROBOFLOW = "_annotations.coco.json"
FOLDERS = ("annotations", "Annotations", "labels")
LISTS = ("images", "annotations", "categories")


class CocoReader(BoxReader):
    """A JSON file, or a folder with one for each part."""

    title = "COCO JSON"
    layout = "annotations/train.json and annotations/val.json beside images/, or train/_annotations.coco.json"

    def detect(self, path: str) -> bool:
        folder = Path(path).expanduser()
        return (folder.is_file() and folder.suffix.lower() == ".json") or bool(find_files(folder))

    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        source = Path(path).expanduser()
        files = {"train": source} if source.is_file() else used_files(source)
        contents = {use: load(file) for use, file in files.items()}
        names = [category_names(content, files[use]) for use, content in contents.items()]
        classes = merge_names(names, list(files.values()))
        whole = WholeImages(options.reading)
        parts = {use: read_scenes(content, files[use], source, whole) for use, content in contents.items()}
        return RawLabels(parts, classes)


def find_files(folder: Path) -> dict[str, Path]:
    """JSON files of labels by the name of their part."""
    found = {name: folder / name / ROBOFLOW for name in subfolders(folder) if (folder / name / ROBOFLOW).is_file()}
    if found:
        return found
    if (folder / ROBOFLOW).is_file():
        return {"train": folder / ROBOFLOW}
    for place in (*(folder / name for name in FOLDERS), folder):
        found = {part_name(file): file for file in files_in(place, ".json") if is_labels(file)}
        if found:
            return found
    # PART/labels.json, as some tools write it.
    return {name: file for name in subfolders(folder) for file in files_in(folder / name, ".json")[:1] if is_labels(file)}


def is_labels(file: Path) -> bool:
    """Whether a JSON file is COCO's of boxes: it has the lists, and is not named as COCO's of keypoints and the like."""
    if file.stem.startswith(("person_keypoints", "panoptic", "stuff")) or not file.stat().st_size:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(content.find(f'"{name}"'.encode()) >= 0 for name in LISTS)


def part_name(file: Path) -> str:
    """The part that a file's name tells: instances_train2017.json is train."""
    return re.sub(r"^(instances|annotations|labels|coco)[_-]|[_-](annotations|instances|labels|coco)|\d{4}$", "", file.stem)


def used_files(folder: Path) -> dict[str, Path]:
    """The files by the keys of `Parts.used`."""
    found = find_files(folder)
    if len(found) > 1 and assign_parts(found, str(folder)) is None:
        raise ValueError(
            f"{str(folder)!r} has the files {name_some(file.name for file in found.values())}, and none to train on: name "
            "one train.json, or give one of the files"
        )
    parts = assign_splits(dict.fromkeys(found, 0), str(folder))
    parts.report(str(folder), {name: len(load(found[name])["images"]) for name in parts.left_aside})
    return {use: found[name] for use, name in parts.used.items()}


def load(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists of a file.

    Raises:
        ValueError: for a file that is no JSON, or lacks one of the lists.
    """
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: no JSON ({error.msg})") from error
    for name in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{file} has no list {name!r}: give COCO's {', '.join(LISTS)}")
    return content


def category_names(content: Mapping[str, list], file: Path) -> dict[int, str]:
    """Names by id, in the order of the ids. Of a file by Roboflow without the group that only heads the others.

    Raises:
        ValueError: for a category without a name, and an id that occurs twice.
    """
    used = {annotation.get("category_id") for annotation in content["annotations"]}
    heads = {category.get("supercategory") for category in content["categories"]}
    names: dict[int, str] = {}
    for number, category in enumerate(content["categories"]):
        if "id" not in category or not category.get("name"):
            raise ValueError(f"{file}: category {number} has no id or no name")
        if category["id"] in names:
            raise ValueError(f"{file}: category id {category['id']} occurs twice")
        if category["id"] in used or not (category["name"] in heads and category.get("supercategory") in (None, "none")):
            names[category["id"]] = str(category["name"])
    return dict(sorted(names.items()))


def merge_names(names: Sequence[Mapping[int, str]], files: Sequence[Path]) -> tuple[str, ...]:
    """The names of all parts, in the order of their ids.

    Raises:
        ValueError: if a file names two ids alike.
    """
    merged: dict[str, None] = {}
    for part, file in zip(names, files):
        if len(set(part.values())) < len(part):
            twice = next(name for name in part.values() if list(part.values()).count(name) > 1)
            raise ValueError(f"{file}: class {twice!r} has two category ids: give it one")
        merged |= dict.fromkeys(part.values())
    return tuple(merged)


def read_scenes(content: Mapping[str, list], file: Path, source: Path, whole: WholeImages) -> list[RawScene]:
    """The scenes of one file.

    Args:
        whole: tells the images that files belong to.

    Raises:
        ValueError: for an image that is not found, an annotation of an unknown image or category, or without a box; as
            `WholeImages.address_of`.
    """
    names = category_names(content, file)
    images = {}
    for number, image in enumerate(content["images"]):
        if "id" not in image or not image.get("file_name"):
            raise ValueError(f"{file}: image {number} has no id or no file_name")
        if image["id"] in images:
            raise ValueError(f"{file}: image id {image['id']} occurs twice")
        images[image["id"]] = image
    objects: dict[Any, list[RawObject]] = {key: [] for key in images}
    for number, annotation in enumerate(content["annotations"]):
        place = f"{file}, annotation {annotation.get('id', number)}"
        if annotation.get("image_id") not in images:
            raise ValueError(f"{place}: image_id {annotation.get('image_id')} is no image of the file")
        if annotation.get("category_id") not in names:
            raise ValueError(f"{place}: category_id {annotation.get('category_id')} has no name in categories")
        if "bbox" not in annotation:
            raise ValueError(f"{place} has no bbox")
        ignored = bool(annotation.get("iscrowd") or annotation.get("ignore"))
        values = four_numbers(annotation["bbox"], place)
        segmentation = annotation.get("segmentation")
        mask = segmentation if states_mask(segmentation) else None
        objects[annotation["image_id"]].append(RawObject(values, names[annotation["category_id"]], ignored, place, mask))
    addresses = find_images(images, file, source, whole)
    return [
        RawScene(
            record_of(addresses[key]),
            tuple(objects[key]),
            "xywh",
            (int(image["height"]), int(image["width"])) if image.get("height") and image.get("width") else None,
            f"{file}, image {key}",
        )
        for key, image in images.items()
    ]


def find_images(images: Mapping[Any, Mapping[str, Any]], file: Path, source: Path, whole: WholeImages) -> dict[Any, str]:
    """The record's path of each image by its id; arguments as of `read_scenes`.

    Raises:
        ValueError: for one that is not found, and for two that are the same: what one says is there, the other says is not.
    """
    folders, addresses, ids = image_folders(file, source), dict[Any, str](), dict[str, Any]()
    for key, image in images.items():
        address = whole.address_of(str(find_image(image["file_name"], folders, file)))
        if address in ids:
            raise ValueError(f"{file}: images {ids[address]} and {key} are both {address}: give it one id")
        addresses[key], ids[address] = address, key
    return addresses


def image_folders(file: Path, source: Path) -> list[Path]:
    """Where the images of a file may lie, the likely places first."""
    root = source.parent if source.is_file() else source
    part = part_name(file)
    stem = re.sub(r"^instances_", "", file.stem)
    places = [file.parent]
    for base in dict.fromkeys((root, file.parent, file.parent.parent)):
        for name in IMAGE_FOLDERS:
            places += [base / name / stem, base / name / part, base / name]
        places += [base / stem, base / part, base / part / "images", base]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def find_image(name: str, folders: list[Path], file: Path) -> Path:
    """The image of that name, which may be the address of a page, and may have been written on Windows.

    The folder that has it becomes the first of `folders`, as it likely has the next one, too.

    Raises:
        ValueError: if it is nowhere.
    """
    for folder in folders:
        names = dict.fromkeys((name, name.replace("\\", "/")))
        for candidate in (path for one in names for path in (folder / one, folder / Path(one).name)):
            if candidate.is_file() or os.path.isfile(file_of(str(candidate))):
                folders.remove(folder)
                folders.insert(0, folder)
                return candidate
    raise ValueError(f"{file}: there is no image {name!r} in {', '.join(map(str, folders[:4]))}: put it there")
