"""Rows with columns, as `datasets` reads them: an image, and `objects` with lists of boxes and categories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simmim.data.image_names import check_rows_are_images
from simmim.data.label_sources import is_csv, is_plain_folder, read_train_and_validation
from simmim.data.readers import detect_reader
from simmim.data.sources import select_images
from simmim.finetune.detection.labels.base import (
    BOX_FORMATS,
    BoxReader,
    RawLabels,
    RawObject,
    RawScene,
    ReadingOptions,
    four_numbers,
)

OBJECT_COLUMNS = ("objects", "annotations", "annotation")
BOX_NAMES = ("bbox", "bboxes", "box", "boxes")
CATEGORY_NAMES = ("category", "categories", "category_id", "class", "classes", "label", "labels")
IGNORED_NAMES = ("is_crowd", "iscrowd", "difficult", "ignore")


class ColumnsReader(BoxReader):
    """Parquet files, a saved `datasets` folder, or a hub id."""

    title = "columns of datasets"
    layout = "rows with image and objects (bbox and category lists), in Parquet, a saved datasets folder or a hub id"

    def detect(self, path: str) -> bool:
        if is_csv(path) or is_plain_folder(path):
            return False
        try:
            return detect_reader(path)[0].has_columns
        except ValueError:  # a file that holds no rows, as COCO's JSON
            return False

    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        if options.box_format is None:
            raise ValueError(
                f"the boxes of {path!r} are four numbers each, whose meaning differs between sources: give data.box_format, "
                f"one of {', '.join(BOX_FORMATS)}"
            )
        reader, files = detect_reader(path)
        parts = read_train_and_validation(path, reader, files)
        names = class_names(next(iter(parts.values())).features, path)
        scenes = {use: read_rows(rows, use, options, path, names) for use, rows in parts.items()}
        return RawLabels(scenes, names)


def objects_column(features: Mapping[str, Any]) -> str | None:
    """The column whose entries have boxes; None if boxes are columns of their own."""
    return next((name for name in OBJECT_COLUMNS if name in features), None)


def inner_features(features: Mapping[str, Any]) -> Mapping[str, Any]:
    """The features of one object, by name: of a list of objects, of lists by name, or of the row's own columns."""
    column = objects_column(features)
    inner = features if column is None else features[column]
    for attribute in ("feature", "_inner"):  # a list of objects
        inner = getattr(inner, attribute, inner)
    if isinstance(inner, list):
        inner = inner[0]
    return inner if isinstance(inner, Mapping) else {}


def class_names(features: Mapping[str, Any], path: str) -> tuple[str, ...] | None:
    """The names that the column of categories has by its type; None where it has none.

    Raises:
        ValueError: if there are no boxes or no categories, with the columns' names.
    """
    inner = inner_features(features)
    for names in (BOX_NAMES, CATEGORY_NAMES):
        if not any(name in inner for name in names):
            raise ValueError(
                f"{path!r} has no {names[0]} in {objects_column(features) or 'its columns'}: there are "
                f"{', '.join(inner) or ', '.join(features)}; give rows with image and objects (bbox and category lists)"
            )
    category: Any = inner[next(name for name in CATEGORY_NAMES if name in inner)]
    category = getattr(category, "feature", category)
    category = category[0] if isinstance(category, list) else category
    return tuple(category.names) if hasattr(category, "names") else None


def read_rows(rows, use: str, options: ReadingOptions, path: str, names: tuple[str, ...] | None) -> list[RawScene]:
    """The scenes of one part.

    Raises:
        ValueError: naming the row.
    """
    images = select_images(rows, options.column, path)
    check_rows_are_images(images, options.reading, path)
    column = objects_column(rows.features)
    wanted = [column] if column else [name for name in rows.column_names if name in (*BOX_NAMES, *CATEGORY_NAMES)]
    sizes = [name for name in ("height", "width") if name in rows.column_names]
    entries = rows.select_columns([*wanted, *sizes])
    scenes = []
    for number, (image, entry) in enumerate(zip(images, entries)):
        place = f"{path}, {use} row {number}"
        found = entry[column] if column else entry
        objects = tuple(
            read_object(one, options, names, f"{place}, object {index}") for index, one in enumerate(as_list(found))
        )
        size = (entry["height"], entry["width"]) if len(sizes) == 2 else None
        scenes.append(RawScene(image["image"], objects, options.box_format, size if size and all(size) else None, place))
    return scenes


def as_list(found: Any) -> list[dict[str, Any]]:
    """Objects as a list of dicts, from such a list or from lists by name."""
    if found is None:
        return []
    if isinstance(found, Mapping):
        named = {name: values for name, values in found.items() if isinstance(values, list)}
        count = len(next((named[name] for name in BOX_NAMES if name in named), ()))
        return [{name: values[index] for name, values in named.items() if len(values) == count} for index in range(count)]
    return list(found)


def read_object(one: Mapping[str, Any], options: ReadingOptions, names: tuple[str, ...] | None, place: str) -> RawObject:
    """One object.

    Raises:
        ValueError: for one without a box, and for a category without a name.
    """
    box = next((one[name] for name in BOX_NAMES if name in one), None)
    category = next((one[name] for name in CATEGORY_NAMES if name in one), None)
    if box is None or category is None:
        raise ValueError(f"{place} has no {'box' if box is None else 'category'}")
    known = names or options.classes
    if isinstance(category, int) and known:
        if not 0 <= category < len(known):
            raise ValueError(f"{place}: category {category} has no name: known are 0 to {len(known) - 1}")
        category = known[category]
    ignored = any(bool(one.get(name)) for name in IGNORED_NAMES)
    return RawObject(four_numbers(box, place), str(category), ignored, place)
