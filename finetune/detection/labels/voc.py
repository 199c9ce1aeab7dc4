"""Pascal VOC's XML: one file an image, with corners counted in pixels from 1, both inside the box."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from simmim.data.decode import STRETCHED
from simmim.data.orientation import Size
from simmim.data.parts import TRAINING, VALIDATION, assign_parts, meaning_of
from simmim.finetune.detection.labels.base import (
    BoxReader,
    RawLabels,
    RawObject,
    RawScene,
    ReadingOptions,
    four_numbers,
    record_of,
)
from simmim.finetune.detection.labels.layout import Pair, annotations_by_stem, files_in, find_pairs, image_files, read_text
from simmim.reading import Reading

FOLDERS = ("Annotations", "annotations", "labels", "xmls")
TRAINVAL = "trainval"  # the list of all that is in those of training and validation
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocReader(BoxReader):
    """Folders of images and of XML files with the same names, and lists of the parts in ImageSets/Main."""

    title = "Pascal VOC XML"
    layout = "JPEGImages/ (or images/) and Annotations/ with NAME.xml files, or train/ and val/ with images and XML files"

    def detect(self, path: str) -> bool:
        folder = Path(path).expanduser()
        return folder.is_dir() and bool(find_pairs(folder, FOLDERS, ".xml", nested=True))

    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        folder = Path(path).expanduser()
        pairs = find_pairs(folder, FOLDERS, ".xml", nested=True)
        lists = read_lists(folder)
        if lists and list(pairs) == ["train"]:
            parts = {use: read_pair(pairs["train"], stems, options.reading) for use, stems in lists.items()}
        else:
            parts = {use: read_pair(pair, None, options.reading) for use, pair in pairs.items()}
        stated, notes = options.box_format, []
        if stated is None:
            stated = "voc"
            if counts_from_zero([scene for scenes in parts.values() for scene in scenes]):
                stated = "xyxy"
                notes.append("corners are exclusive and count from 0 (box_format xyxy): some are 0 or no whole numbers")
        return RawLabels(
            {
                use: [RawScene(scene.image, scene.objects, stated, scene.size, scene.place) for scene in scenes]
                for use, scenes in parts.items()
            },
            notes=tuple(notes),
        )


def counts_from_zero(scenes: list[RawScene]) -> bool:
    """Whether corners cannot be pixels counted from 1: a first one is 0, or one is no whole number."""
    values = [found.values for scene in scenes for found in scene.objects]
    return any(min(box[:2]) == 0 or any(value != int(value) for value in box) for box in values)


def read_lists(folder: Path) -> dict[str, list[str]]:
    """Names by the keys of `Parts.used` from ImageSets/Main/train.txt and the like; empty if there are no such lists.

    Where there is no list to train on, but trainval.txt, it is that one, without what a list to validate with has.
    """
    lists = {file.stem: file for file in files_in(folder / "ImageSets" / "Main", ".txt")}
    lists = {name: file for name, file in lists.items() if meaning_of(name) or name == TRAINVAL}
    stems = {name: [line.split()[0] for line in read_text(lists[name]).splitlines() if line.strip()] for name in lists}
    if TRAINVAL in stems and TRAINING not in map(meaning_of, stems):
        validating = {stem for name, found in stems.items() if meaning_of(name) == VALIDATION for stem in found}
        stems["train"] = [stem for stem in stems.pop(TRAINVAL) if stem not in validating]
    parts = assign_parts(stems, str(folder))
    if parts is None:
        return {}
    aside = {name: len(stems[name]) for name in parts.left_aside}
    parts.report(str(folder), aside)
    return {use: stems[name] for use, name in parts.used.items()}


def read_pair(pair: Pair, stems: list[str] | None, reading: Reading = STRETCHED) -> list[RawScene]:
    """The scenes of one part.

    Args:
        stems: of the images that belong to it; all by default.
        reading: which pages or files make an image.

    Raises:
        ValueError: for an image without an XML file, an XML file without an image, and as `read_file`.
    """
    files = annotations_by_stem(pair.annotations, ".xml")
    images = image_files(pair, files, reading)
    stems_read = list(images) if stems is None else stems
    for stem in stems_read:
        if stem not in images:
            raise ValueError(f"there is no image {pair.images / stem}.jpg, .png, …, which the list of its part names")
        if stem not in files:
            raise ValueError(
                f"image {images[stem]} has no annotation: expected {pair.annotations / stem}.xml, without objects if it has "
                "none"
            )
    if stems is None:
        for stem, file in files.items():
            if stem not in images:
                raise ValueError(f"{file} has no image: expected {pair.images / stem}.jpg, .png, …")
    return [read_file(files[stem], images[stem]) for stem in stems_read]


def read_file(file: Path, image: str) -> RawScene:
    """One scene.

    Raises:
        ValueError: naming file and line, for a broken file, an object without a name or without a box.
    """
    text = read_text(file)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{file}, line {error.position[0]}: no XML ({error})") from error
    starts = [text.count("\n", 0, match.start()) + 1 for match in re.finditer(r"<object\b", text)]
    objects = []
    for number, element in enumerate(root.iter("object")):
        place = f"{file}, line {starts[number]}" if number < len(starts) else str(file)
        name = (element.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{place}: an object without a name")
        box = element.find("bndbox")
        if box is None:
            raise ValueError(f"{place}: object {name!r} has no bndbox")
        values = four_numbers([(box.findtext(corner) or "").strip() for corner in CORNERS], place)
        ignored = (element.findtext("difficult") or "0").strip() in ("1", "true", "True")
        objects.append(RawObject(values, name, ignored, place))
    return RawScene(record_of(image), tuple(objects), "voc", stated_size(root), str(file))


def stated_size(root: ElementTree.Element) -> Size | None:
    """(height, width) as the file states it; None where it states 0 or nothing, as some tools do."""
    try:
        height, width = (int(float(root.findtext(f"size/{name}") or 0)) for name in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 and width > 0 else None
