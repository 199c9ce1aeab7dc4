"""Instance maps: a PNG or TIFF an image, whose pixel values number the objects; 0 is background. Sets of cells have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from simmim.data.image_names import find_stems
from simmim.data.label_map_files import read_label_map
from simmim.data.label_sources import subfolders
from simmim.data.left_out import LeftOut
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.finetune.detection.labels.base import BoxReader, RawLabels, RawObject, RawScene, ReadingOptions, record_of
from simmim.finetune.detection.labels.layout import IMAGE_FOLDERS, Pair, find_pairs, image_files, refuse_folder
from simmim.finetune.detection.masks import PackedMask, pack
from simmim.messages import counted, notify
from simmim.reading import Reading

FOLDER = "instances"
ENDINGS = (".png", ".tif", ".tiff")
ONE_CLASS = "object"  # where no folder and no setting names the class


class InstanceMapsReader(BoxReader):
    """Folders of images and of instance maps with the same names, of one class or a folder a class."""

    title = "instance maps"
    layout = "images/ and instances/ with PNG or TIFF files of the images' names, or a folder for each class in instances/"

    def detect(self, path: str) -> bool:
        return bool(find_instance_maps(Path(path).expanduser()))

    def read(self, path: str, options: ReadingOptions) -> RawLabels:
        found = find_instance_maps(Path(path).expanduser())
        if set(found) == {""}:
            name = options.classes[0] if len(options.classes) == 1 else ONE_CLASS
            found = {name: found[""]}
        parts: dict[str, dict[str, Pair]] = {}
        for name, pairs in found.items():
            for use, pair in pairs.items():
                parts.setdefault(use, {})[name] = pair
        scenes = {use: read_part(pairs, options.reading) for use, pairs in parts.items()}
        check_numbers([scene for part in scenes.values() for scene in part], path)
        return RawLabels(scenes, tuple(found))


def find_instance_maps(folder: Path) -> dict[str, dict[str, Pair]]:
    """Pairs of folders as of `find_pairs`, by class; the class is empty where the maps lie in no folder of a class."""
    pairs = find_pairs(folder, (FOLDER,), ENDINGS, together=False)
    if pairs:
        return {"": pairs}
    parts = {name for images in IMAGE_FOLDERS for name in subfolders(folder / images)}
    homes = [folder / FOLDER, *(folder / name / FOLDER for name in subfolders(folder))]
    classes = sorted({name for home in homes for name in subfolders(home)} - parts)
    found = {name: find_pairs(folder, (f"{FOLDER}/{name}",), ENDINGS, together=False) for name in classes}
    return {name: of_class for name, of_class in found.items() if of_class}


def read_part(pairs: Mapping[str, Pair], reading: Reading) -> list[RawScene]:
    """The scenes of one part. An image without a map has no objects.

    Args:
        pairs: by class; all have the same images.
        reading: which pages or files make an image.

    Raises:
        ValueError: for a map without an image, a map or a folder that cannot be read, and maps of one image that differ in
            size.
    """
    maps = {name: find_maps(pair.annotations) for name, pair in pairs.items()}
    pair, stems = next(iter(pairs.values())), {stem for files in maps.values() for stem in files}
    images = image_files(pair, stems, reading)
    for files in maps.values():
        for stem, file in files.items():
            if stem not in images:
                raise ValueError(f"{file} has no image: expected {pair.images / stem}.png, .tif, …")
    missing = [stem for stem in images if stem not in stems]
    if missing:
        notify(
            f"{len(missing):,} of {counted(len(images), 'image')} in {str(pair.images)!r} have no instance map and count as "
            f"images without objects, the first {missing[0]!r}"
        )
    return [
        read_scene(image, {name: files[stem] for name, files in maps.items() if stem in files})
        for stem, image in images.items()
    ]


def find_maps(folder: Path) -> dict[str, str]:
    """The maps of one class, as of `find_stems`.

    Raises:
        ValueError: also for a folder that cannot be read.
    """
    left_out = LeftOut()
    maps = find_stems(folder, left_out)
    for denied, reason in left_out.denied.items():
        refuse_folder(denied, reason)
    left_out.report(str(folder))
    return maps


def read_scene(image: str, files: Mapping[str, str]) -> RawScene:
    """One image with the objects of its maps.

    Args:
        image: path of its record.
        files: maps by class; none for an image without objects.

    Raises:
        ValueError: as `read_part`.
    """
    objects: list[RawObject] = []
    size, place = None, image
    for name, file in files.items():
        try:
            values = read_label_map(record_of(file))
        except UNREADABLE as error:
            raise ValueError(f"instance map {file} cannot be read: {describe_error(error)}") from error
        if size is not None and values.shape != size:
            raise ValueError(
                f"instance map {file} is {values.shape[0]}x{values.shape[1]} pixels and {place} {size[0]}x{size[1]} (height "
                "x width): give maps of their image's size"
            )
        height, width = values.shape
        size, place = (height, width), file
        for number, mask in split_objects(values).items():
            objects.append(RawObject(mask.box, name, False, f"{file}, object {number}", mask))
    return RawScene(record_of(image), tuple(objects), "xyxy", size, place)


def split_objects(values: np.ndarray) -> dict[int, PackedMask]:
    """The mask of each object by its number.

    Args:
        values: (height, width) whole numbers, 0 = background.
    """
    rows, columns = np.nonzero(values)
    numbers = values[rows, columns]
    order = numbers.argsort(kind="stable")
    found, first = np.unique(numbers[order], return_index=True)
    masks = {}
    for number, own in zip(found.tolist(), np.split(order, first[1:])):
        corner = int(rows[own].min()), int(columns[own].min())
        pixels = np.zeros((int(rows[own].max()) - corner[0] + 1, int(columns[own].max()) - corner[1] + 1), dtype=bool)
        pixels[rows[own] - corner[0], columns[own] - corner[1]] = True
        masks[number] = pack(pixels, corner)
    return masks


def check_numbers(scenes: list[RawScene], path: str) -> None:
    """A notice where every map holds one number, as masks of a class do."""
    counts = [len(scene.objects) for scene in scenes if scene.objects]
    numbers = {found.place.rpartition(" ")[2] for scene in scenes for found in scene.objects}
    if len(counts) > 1 and max(counts) == 1 and len(numbers) == 1:
        notify(
            f"every instance map of {path!r} holds the one number {numbers.pop()}: are they masks of a class? Instance maps "
            "number the objects 1, 2, 3, …; for masks of classes use simmim finetune segmentation"
        )
