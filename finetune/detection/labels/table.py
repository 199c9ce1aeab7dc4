"""A CSV file with a row an object: path of the image, class and box; a row without a class is an image without objects."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from simmim.data.image_names import WholeImages, file_of
from simmim.data.index import is_image
from simmim.data.label_sources import LABEL_COLUMNS, PART_COLUMNS, PATH_COLUMNS, csv_rows
from simmim.data.parts import EXPECTED, assign_splits, meaning_of
from simmim.finetune.detection.labels.base import (
    BoxReader,
    RawLabels,
    RawObject,
    RawScene,
    ReadingOptions,
    four_numbers,
    record_of,
)
from simmim.finetune.detection.labels.layout import read_text

# Columns of a box, with the format that their names state.
BOX_COLUMNS = (
    (("xmin", "ymin", "xmax", "ymax"), "xyxy"),
    (("x1", "y1", "x2", "y2"), "xyxy"),
    (("left", "top", "right", "bottom"), "xyxy"),
    (("x", "y", "width", "height"), "xywh"),
    (("x", "y", "w", "h"), "xywh"),
    (("left", "top", "width", "height"), "xywh"),
    (("cx", "cy", "w", "h"), "cxcywh"),
)
CLASS_COLUMNS = ("class", "class_name", "name", "category", "label", *LABEL_COLUMNS)
IMAGE_SIZE = ("height", "width")  # of the image, where the box's columns are others


class TableReader(BoxReader):
    """A CSV file with a header."""

    title = "CSV"
    layout = "a CSV file with columns path, class, xmin, ymin, xmax, ymax, a row an object"

    def detect(self, path: str) -> bool:
        file = Path(path).expanduser()
        return file.is_file() and file.suffix.lower() == ".csv"

    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        file = Path(path).expanduser()
        reader = csv_rows(io.StringIO(read_text(file), newline=""))
        present = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = present
        columns = find_columns(file, present, options, reader.reader.dialect.delimiter != ",")
        scenes: dict[str, list[RawObject]] = {}
        parts: dict[str, str] = {}
        sizes: dict[str, tuple[int, int] | None] = {}
        whole, folder = WholeImages(options.reading), file.resolve().parent
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            name = row[columns.path]
            if not name:
                raise ValueError(f"{place} has no path")
            image = os.path.join(folder, name)
            if "\\" in name and not is_image(file_of(image)):  # written on Windows
                image = image.replace("\\", "/")
            if image not in scenes:
                if not is_image(file_of(image)):
                    raise ValueError(f"{place}: there is no image {image}")
                scenes[image], sizes[image], parts[image] = [], stated_size(row, columns), part_of(row, columns, place)
            elif columns.part and parts[image] != row[columns.part]:
                raise ValueError(
                    f"{place}: {name} is in {parts[image]} and in {row[columns.part]}: give it one {columns.part}"
                )
            if row[columns.category] or any(row[column] for column in columns.box):
                scenes[image].append(read_object(row, columns, place))
        if not scenes:
            raise ValueError(f"{file} has no rows: give one with path, class and box for each object")
        box_format = options.box_format or columns.box_format
        raw = {
            image: RawScene(record_of(whole.address_of(image)), tuple(objects), box_format, sizes[image], f"{file}, {image}")
            for image, objects in scenes.items()
        }
        if columns.part is None:
            return RawLabels({"train": list(raw.values())})
        used = assign_splits(Counter(parts.values()), str(file)).used
        return RawLabels({use: [raw[image] for image in raw if parts[image] == name] for use, name in used.items()})


class Columns:
    """Names of a file's columns.

    Attributes:
        path, category: of the image and of the class.
        box: four.
        box_format: that they state.
        size: height and width of the image; None if the file does not have them.
        part: None if the file tells no parts.
        decimal_comma: whether 12,5 is twelve and a half, as where semicolons are between the fields.
    """

    def __init__(
        self,
        path: str,
        category: str,
        box: Sequence[str],
        box_format: str,
        present: Sequence[str],
        decimal_comma: bool,
    ) -> None:
        self.decimal_comma = decimal_comma
        self.path, self.category, self.box, self.box_format = path, category, tuple(box), box_format
        self.size = IMAGE_SIZE if set(IMAGE_SIZE) <= set(present) and not set(IMAGE_SIZE) & set(box) else None
        self.part = next((name for name in PART_COLUMNS if name in present), None)


def find_columns(file: Path, present: Sequence[str], options: ReadingOptions, decimal_comma: bool) -> Columns:
    """The columns to read.

    Raises:
        ValueError: if one is missing, with those there are.
    """
    path = options.column or next((name for name in PATH_COLUMNS if name in present), None)
    category = next((name for name in CLASS_COLUMNS if name in present), None)
    box = next(((names, stated) for names, stated in BOX_COLUMNS if set(names) <= set(present)), None)
    for found, content in ((path, "of paths (path)"), (category, "of classes (class)"), (box, "xmin, ymin, xmax, ymax")):
        if found is None or (isinstance(found, str) and found not in present):
            raise ValueError(f"{file} has no columns {content}: its columns are {', '.join(present)}")
    return Columns(path, category, *box, present, decimal_comma)


def part_of(row: Mapping[str, str], columns: Columns, place: str) -> str:
    """The part of a row.

    Raises:
        ValueError: for a name that is no usual one.
    """
    name = row[columns.part] if columns.part else "train"
    if meaning_of(name or "") is None:
        raise ValueError(f"{place} has the {columns.part} {name!r}: {EXPECTED}")
    return name


def stated_size(row: Mapping[str, str], columns: Columns) -> tuple[int, int] | None:
    """(height, width) of the image, if the row says them."""
    if columns.size is None:
        return None
    height, width = (row[name] for name in columns.size)
    return (int(height), int(width)) if (height or "").isdecimal() and (width or "").isdecimal() else None


def read_object(row: Mapping[str, str], columns: Columns, place: str) -> RawObject:
    """The object of a row.

    Raises:
        ValueError: naming the line.
    """
    if not row[columns.category]:
        raise ValueError(f"{place} has a box and no class")
    numbers = [row[name] or "" for name in columns.box]
    if columns.decimal_comma:
        numbers = [number.replace(",", ".") for number in numbers]
    return RawObject(four_numbers(numbers, place), row[columns.category], False, place)
