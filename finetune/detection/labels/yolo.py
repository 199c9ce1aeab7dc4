"""YOLO's text files: one file an image, a line an object, a class number and center, width and height in shares.

Or the points of a polygon in place of these, which is the object's mask. An object of several parts is one polygon, whose
parts tools join by bridges without width; they have no pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from simmim.data.decode import STRETCHED
from simmim.data.index import is_image_name
from simmim.data.label_map_sources import CLASSES_FILE
from simmim.finetune.detection.labels.base import (
    MAX_NUMBER,
    BoxReader,
    RawLabels,
    RawObject,
    RawScene,
    ReadingOptions,
    four_numbers,
    record_of,
)
from simmim.finetune.detection.labels.layout import (
    Pair,
    annotation_files,
    annotations_by_stem,
    files_in,
    find_pairs,
    image_files,
    read_text,
)
from simmim.finetune.detection.labels.masks import MIN_POINTS, PolygonInShares
from simmim.messages import counted, notify
from simmim.reading import Reading

FOLDERS = ("labels", "annotations")
NAMES_FILES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
LISTS = (CLASSES_FILE, "obj.names", "classes.names", "labels.txt")  # of names, one per line
BOX_WORDS = 5  # class and box; more are the points of a polygon
ORIENTED_CORNERS = 4  # of an oriented box, which the format tells from no other polygon


class YoloReader(BoxReader):
    """Folders of images and of text files with the same names."""

    title = "YOLO text"
    layout = "images/ and labels/ with NAME.txt files, or train/ and val/ that have these, and data.yaml or classes.txt"

    def detect(self, path: str) -> bool:
        return bool(find_text_pairs(Path(path).expanduser()))

    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        folder = Path(path).expanduser()
        description = find_description(folder)
        pairs = find_text_pairs(folder)
        names = read_names(folder, description) or names_beside_labels(pairs) or dict(enumerate(options.classes))
        keypoints_by = description.file.name if description and description.content.get("kpt_shape") else ""
        parts = {use: read_pair(pair, names, options.reading, keypoints_by) for use, pair in pairs.items()}
        objects = [found for scenes in parts.values() for scene in scenes for found in scene.objects]
        on_masks = notes_on_polygons(objects)
        if names:
            return RawLabels(parts, tuple(names.values()), notes_on_masks=on_masks)
        numbers = sorted({int(found.category) for found in objects})
        note = "classes are the numbers that the label files hold: name them in classes.txt, or by data.classes"
        return RawLabels(parts, tuple(map(str, numbers)), (note,), on_masks)


def notes_on_polygons(objects: list[RawObject]) -> tuple[str, ...]:
    """A sentence where polygons may be oriented boxes."""
    polygons = [found.segmentation for found in objects if found.segmentation is not None]
    if not polygons or any(len(polygon.points) != ORIENTED_CORNERS for polygon in polygons):
        return ()
    return (
        "every polygon has four corners, as oriented boxes have: each is learned as a mask, and its angle is not "
        "(head.masks false: the upright boxes around them)",
    )


def find_text_pairs(folder: Path) -> dict[str, Pair]:
    """As `find_pairs`, of text files with the names of images; both may lie in one folder."""
    pairs = find_pairs(folder, FOLDERS, ".txt", together=False, nested=True) or find_pairs(folder, FOLDERS, ".txt")
    return pairs if all(map(holds_labels, pairs.values())) else {}


def holds_labels(pair: Pair) -> bool:
    """Whether text files are labels, and not lists of names alone: of those beside images, one has the name of an image."""
    if pair.images != pair.annotations:
        return any(file.name not in LISTS for file in annotation_files(pair.annotations, ".txt"))
    stems = {path.stem for path in pair.images.iterdir() if is_image_name(str(path))}
    return any(file.stem in stems for file in files_in(pair.annotations, ".txt"))


class Description(NamedTuple):
    """data.yaml: the file, and what it holds."""

    file: Path
    content: dict[str, Any]


def find_description(folder: Path) -> Description | None:
    """data.yaml of a folder; None if there is none.

    Raises:
        ValueError: for a file that holds no YAML.
    """
    for name in NAMES_FILES:
        file = folder / name
        if file.is_file():
            try:
                content = yaml.safe_load(read_text(file)) or {}
            except yaml.YAMLError:
                content = None
            if not isinstance(content, dict):
                raise ValueError(f"{file} is no YAML file with names: give names: [first, second, …]")
            return Description(file, content)
    return None


def read_names(folder: Path, description: Description | None) -> dict[int, str]:
    """Names by number, from data.yaml or from a list; empty if there is neither.

    Raises:
        ValueError: if the file holds no names.
    """
    if description is not None:
        names = description.content.get("names")
        if isinstance(names, list):
            names = dict(enumerate(names))
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{description.file} has no names: give names: [first, second, …]")
        return {int(number): str(text) for number, text in sorted(names.items())}
    for name in LISTS:
        for file in (folder / name, *(folder / part / name for part in FOLDERS)):
            if file.is_file():
                return read_list(file)
    return {}


def read_list(file: Path) -> dict[int, str]:
    """Names by number from a list.

    Raises:
        ValueError: for an empty one.
    """
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} names no classes: give one per line")
    return dict(enumerate(lines))


def names_beside_labels(pairs: Mapping[str, Pair]) -> dict[int, str]:
    """Names by number from the lists that lie beside the label files of each part, as labelImg writes them; of lists that go
    on alike the longest. Empty if there are none.

    Raises:
        ValueError: if a number has another name in another list.
    """
    files = [file for pair in pairs.values() for name in LISTS if (file := pair.annotations / name).is_file()]
    names: dict[int, str] = {}
    for file in files:
        for number, name in read_list(file).items():
            if names.setdefault(number, name) != name:
                raise ValueError(
                    f"classes differ between {files[0]} and {file}: {number} is {names[number]!r} and {name!r}; number them "
                    "alike"
                )
    return names


def read_pair(pair: Pair, names: dict[int, str], reading: Reading = STRETCHED, keypoints_by: str = "") -> list[RawScene]:
    """The scenes of one part. An image without a text file has no objects, as for the tools that write this format.

    Args:
        names, keypoints_by: as of `read_objects`.
        reading: which pages or files make an image.

    Raises:
        ValueError: for a text file without an image, and as `annotation_files` and `read_objects`.
    """
    files = annotations_by_stem(pair.annotations, ".txt")
    images = image_files(pair, files, reading)
    for stem, file in files.items():
        if stem not in images and file.name not in LISTS and pair.images != pair.annotations:
            raise ValueError(f"{file} has no image: expected {pair.images / stem}.jpg, .png, …")
    missing = [stem for stem in images if stem not in files]
    if missing:
        notify(
            f"{len(missing):,} of {counted(len(images), 'image')} in {str(pair.images)!r} have no label file and count as "
            f"images without objects, the first {missing[0]!r}"
        )
    scenes = []
    for stem, image in images.items():
        objects = read_objects(files[stem], names, keypoints_by) if stem in files else ()
        scenes.append(RawScene(record_of(image), objects, "cxcywh-shares", None, str(files.get(stem, image))))
    return scenes


def read_objects(file: Path, names: dict[int, str], keypoints_by: str = "") -> tuple[RawObject, ...]:
    """The objects of one file; of a polygon the mask, and the box around it.

    Args:
        names: by number; if empty, every number is a class.
        keypoints_by: name of the file that says that labels hold keypoints; empty where none does.

    Raises:
        ValueError: naming file and line, for an unknown class and for anything but five numbers or a polygon.
    """
    objects = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        words, place = line.split(), f"{file}, line {number}"
        if not words:
            continue
        try:
            category = int(words[0])
        except ValueError:
            raise ValueError(f"{place}: class {words[0]!r}, expected a whole number") from None
        if names and category not in names:
            raise ValueError(f"{place}: class {category} has no name: known are {min(names)} to {max(names)}")
        polygon = None
        if len(words) == BOX_WORDS:
            values = four_numbers(words[1:], place)
        else:
            check_words(words, place, keypoints_by)
            polygon = read_polygon(words[1:], place)
            values = polygon.box
        objects.append(RawObject(values, names.get(category, str(category)), False, place, polygon))
    return tuple(objects)


def check_words(words: list[str], place: str, keypoints_by: str) -> None:
    """Refuse a line that holds neither a box nor a polygon; arguments as of `read_objects`.

    Raises:
        ValueError: naming file and line.
    """
    expected = f"{place}: {len(words)} words, expected a class and four numbers"
    if keypoints_by:  # they have as many words as some polygons
        raise ValueError(f"{expected}: {keypoints_by} has kpt_shape, and keypoints are not read: leave them out")
    if len(words) < BOX_WORDS or not len(words) % 2:
        raise ValueError(f"{expected}, or x and y of {MIN_POINTS} points or more of a polygon")


def read_polygon(words: list[str], place: str) -> PolygonInShares:
    """A polygon from x and y in turn.

    Raises:
        ValueError: naming file and line, for words that are no finite numbers.
    """
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            raise ValueError(f"{place}: {word!r} in a polygon, expected numbers") from None
        if not abs(numbers[-1]) < MAX_NUMBER:  # so that NaN fails, too
            raise ValueError(f"{place}: {word!r} in a polygon, expected finite numbers")
    return PolygonInShares(np.array(numbers).reshape(-1, 2))
