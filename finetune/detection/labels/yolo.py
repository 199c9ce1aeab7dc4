"""YOLO's text files: a line an object, a class number and center, width and height in shares; one file an image."""

from __future__ import annotations

from pathlib import Path

import yaml

from simmim.data.decode import STRETCHED
from simmim.data.index import is_image_name
from simmim.data.label_map_sources import CLASSES_FILE
from simmim.finetune.detection.labels.base import (
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
from simmim.messages import counted, notify
from simmim.reading import Reading

FOLDERS = ("labels", "annotations")
NAMES_FILES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
LISTS = (CLASSES_FILE, "obj.names", "classes.names", "labels.txt")  # of names, one per line
BOX_WORDS = 5  # class and box; more are the corners of a polygon


class YoloReader(BoxReader):
    """Folders of images and of text files with the same names."""

    title = "YOLO text"
    layout = "images/ and labels/ with NAME.txt files, or train/ and val/ that have these, and data.yaml or classes.txt"

    def detect(self, path: str) -> bool:
        return bool(find_text_pairs(Path(path).expanduser()))

    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        folder = Path(path).expanduser()
        stated = read_names(folder)
        names = stated or dict(enumerate(options.classes))
        parts = {use: read_pair(pair, names, options.reading) for use, pair in find_text_pairs(folder).items()}
        if names:
            return RawLabels(parts, tuple(names.values()))
        numbers = sorted({int(found.category) for scenes in parts.values() for scene in scenes for found in scene.objects})
        note = "classes are the numbers that the label files hold: name them in classes.txt, or by data.classes"
        return RawLabels(parts, tuple(map(str, numbers)), (note,))


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


def read_names(folder: Path) -> dict[int, str]:
    """Names by number, from data.yaml or from a list; empty if there is neither.

    Raises:
        ValueError: if the file holds no names.
    """
    for name in NAMES_FILES:
        file = folder / name
        if file.is_file():
            try:
                names = (yaml.safe_load(read_text(file)) or {}).get("names")
            except (yaml.YAMLError, AttributeError) as error:
                raise ValueError(f"{file} is no YAML file with names: give names: [first, second, …]") from error
            if isinstance(names, list):
                names = dict(enumerate(names))
            if not isinstance(names, dict) or not names:
                raise ValueError(f"{file} has no names: give names: [first, second, …]")
            return {int(number): str(text) for number, text in sorted(names.items())}
    for name in LISTS:
        for file in (folder / name, *(folder / part / name for part in FOLDERS)):
            if file.is_file():
                lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
                if not lines:
                    raise ValueError(f"{file} names no classes: give one per line")
                return dict(enumerate(lines))
    return {}


def read_pair(pair: Pair, names: dict[int, str], reading: Reading = STRETCHED) -> list[RawScene]:
    """The scenes of one part. An image without a text file has no objects, as for the tools that write this format.

    Args:
        names: as of `read_objects`.
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
        objects = read_objects(files[stem], names) if stem in files else ()
        scenes.append(RawScene(record_of(image), objects, "cxcywh-shares", None, str(files.get(stem, image))))
    return scenes


def read_objects(file: Path, names: dict[int, str]) -> tuple[RawObject, ...]:
    """The objects of one file; of a polygon the box around it.

    Args:
        names: by number; if empty, every number is a class.

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
        if len(words) > BOX_WORDS and len(words) % 2:
            values = around_polygon(words[1:], place)
        elif len(words) == BOX_WORDS:
            values = four_numbers(words[1:], place)
        else:
            raise ValueError(f"{place}: {len(words)} words, expected a class and four numbers")
        objects.append(RawObject(values, names.get(category, str(category)), False, place))
    return tuple(objects)


def around_polygon(words: list[str], place: str) -> tuple[float, float, float, float]:
    """Center and size of the box around a polygon, x and y in turn."""
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{place}: polygon {' '.join(words)!r}, expected numbers") from None
    left, right, top, bottom = (f(numbers[axis::2]) for axis in (0, 1) for f in (min, max))
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
