"""Images with a class for every pixel: where they come from, what their masks hold, a validation part, so many labels.

A mask is a picture of the image's size whose values are numbers of classes, read as they are stored: of a palette's PNG the
indices, never the colours.
"""
from __future__ import annotations

import csv
import io
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from simmim.data.decode import UNREADABLE, Size, decoding, open_picture, orientation, reason, turned
from simmim.data.index import find_images, image_dataset
from simmim.data.labels import VALIDATION_NAMES, is_plain_folder, load_splits
from simmim.data.samples import cores
from simmim.data.sources import HUB_ID, classify, found_column, image_column

if TYPE_CHECKING:
    import datasets

IMAGE_FOLDER, MASK_FOLDERS, CLASSES_FILE = "images", ("masks", "annotations", "labels"), "classes.txt"
MASK_COLUMNS = ("mask", "masks", "annotation", "segmentation", "segmentation_mask", "seg_map", "label", "labels")
LAYOUT = "images/ and masks/ with files of the same names, or train/ and val/ that have these"
ROWS_AT_ONCE = 256
VALUES = 2**16  # mask values are below
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM", "JPEG")
HEADER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # of others `open_picture` tells the size


@dataclass(frozen=True)
class MaskScheme:
    """Which value of a mask stands for which class.

    Attributes:
        classes: names, in order.
        values: of each class in the files.
        ignore_index: value in the files of pixels that count for nothing; −1 for none.
    """

    classes: tuple[str, ...]
    values: tuple[int, ...]
    ignore_index: int

    @property
    def ignored(self) -> int:
        """What stands for no class among the classes' numbers, whatever it is in the files."""
        return 255 if len(self.classes) <= 255 else VALUES - 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest in which classes and `ignored` have room."""
        return np.dtype(np.uint8 if self.ignored == 255 else np.int32)

    def numbers(self, mask: np.ndarray) -> np.ndarray:
        """A mask as in a file, (height, width), to the classes' numbers from 0 on, and `ignored`."""
        table = np.full(max(int(mask.max()), *self.values) + 1, self.ignored, dtype=self.dtype)
        table[list(self.values)] = np.arange(len(self.classes))
        return table[mask]


@dataclass(frozen=True)
class LabeledMasks:
    """Labeled scenes read.

    Attributes:
        train, validation: undecoded columns `image` and `mask`.
        scheme: the classes.
        pixels: training pixels of each class.
        validation_sizes: (width, height) of the validation images, upright; an image that cannot be read has None.
        notes: what was concluded and not given, a sentence each.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    scheme: MaskScheme
    pixels: tuple[int, ...]
    validation_sizes: tuple[Size | None, ...]
    notes: tuple[str, ...] = ()


def labeled_masks(
    path: str | Path,
    labels: int | None,
    seed: int,
    column: str | None = None,
    mask_column: str | None = None,
    classes: Sequence[str] = (),
    values: Sequence[int] = (),
    ignore_index: int = 255,
    progress: Callable[[Iterable], Iterable] = iter,
) -> LabeledMasks:
    """Read labeled scenes, look into every mask, and choose what to train on and what to validate with.

    `path` is a folder with images/ and masks/, files of the same names apart from their endings; one with such folders in
    train/ and in val/ or test/, or with images/train, masks/train, images/val, masks/val; a CSV file of image and mask
    paths (relative to it); Parquet files, a saved `datasets` folder or a hub id with two columns of images. Where there is
    no validation part, a fifth of the scenes, drawn by `seed`, is held out before labels are chosen.

    Args:
        labels: keep so many training scenes, drawn by `seed` so that every class is among them; None keeps all.
        column, mask_column: which columns hold images and masks; found by default.
        classes: names in the order of the values; by default those in classes.txt, one a line, or else the values.
        values: mask value of each class; by default 0, 1, …, of which `ignore_index` is left out.
        ignore_index: mask value that counts for nothing; −1 for none.
        progress: put around the scenes while they are looked into.

    Raises:
        ValueError: for images without a mask and masks without an image, masks that cannot be read, are of another size or
            hold values that are no class, fewer than two classes, classes that differ between the parts or have no
            training pixel, and more labels than scenes.
    """
    parts = read_pairs(str(path), column, mask_column)
    names = tuple(classes) or named_classes(Path(path).expanduser())
    looked = {name: look_into(data, progress) for name, data in parts.items()}
    notes = []
    if not names and not values:
        found = sorted({value for scenes in looked.values() for scene in scenes for value in scene.counts} - {ignore_index})
        values, names = found, tuple(map(str, found))
        notes.append(f"classes are the {len(found)} values that the masks hold")
    scheme = scheme_of(names, values, ignore_index, str(path))
    for scenes in looked.values():
        check_values(scenes, scheme)

    generator = random.Random(f"scenes/{seed}")
    data, rows = parts["train"], list(range(len(parts["train"])))
    if "validation" in parts:
        validation, held_out, validation_scenes = parts["validation"], None, looked["validation"]
        check_parts(looked["train"], validation_scenes, scheme)
    else:
        if len(rows) < 2:
            raise ValueError(f"{str(path)!r} has 1 scene: give at least 2, one to train on and one to validate with")
        held_out = sorted(generator.sample(rows, max(1, len(rows) // 5)))
        rows = sorted(set(rows) - set(held_out))
        validation, validation_scenes = data, [looked["train"][row] for row in held_out]
    pixels = pixels_of((looked["train"][row] for row in rows), scheme)
    for name, count in zip(scheme.classes, pixels):
        if not count:
            raise ValueError(
                f"class {name!r} has no pixel in the {len(rows)} training masks of {str(path)!r}: give some, or leave it "
                "out of the classes"
            )
    if labels is not None:
        rows = drawn(looked["train"], rows, labels, scheme, generator)
        pixels = pixels_of((looked["train"][row] for row in rows), scheme)
    if not any(pixels_of(validation_scenes, scheme)):
        raise ValueError(f"the {len(validation_scenes)} validation masks of {str(path)!r} hold nothing but ignored pixels")
    unseen = [name for name, count in zip(scheme.classes, pixels_of(validation_scenes, scheme)) if not count]
    if unseen:
        notes.append(f"no validation pixel of {', '.join(unseen)}: left out of the mean IoU unless predicted")
    return LabeledMasks(
        data.select(rows),
        validation if held_out is None else validation.select(held_out),
        scheme,
        pixels,
        tuple(scene.size for scene in validation_scenes),
        tuple(notes),
    )


# --- what masks hold ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a look into one mask tells.

    Attributes:
        name: the mask's file, or its row.
        size: (width, height) of the image, upright; None where it cannot be read.
        counts: pixels of each value in the file.
    """

    name: str
    size: Size | None
    counts: dict[int, int]


def look_into(data: datasets.Dataset, progress: Callable[[Iterable], Iterable] = iter) -> list[Scene]:
    """Every mask of the rows `image`, `mask`.

    Raises:
        ValueError: naming the file, for a mask that cannot be read or is not of its image's size.
    """

    def records() -> Iterator[tuple]:
        for first in range(0, len(data), ROWS_AT_ONCE):
            rows = data[first : first + ROWS_AT_ONCE]
            yield [(first + offset, *pair) for offset, pair in enumerate(zip(rows["image"], rows["mask"]))]

    with ThreadPoolExecutor(cores()) as pool:
        found = itertools.chain.from_iterable(pool.map(lambda row: look_at(*row), some) for some in records())
        return list(progress(found))


def look_at(row: int, image: dict, mask: dict) -> Scene:
    """One scene, as `look_into`."""
    name, image_name = (record["path"] or f"row {row}" for record in (mask, image))
    try:
        values = read_mask(mask)
    except UNREADABLE as error:
        raise ValueError(f"mask {name} cannot be read: {reason(error)}") from error
    try:
        size = upright_size(image)
    except UNREADABLE:
        size = None  # an image that cannot be read is replaced and counted when its turn comes
    if size is not None and size != values.shape[::-1]:
        raise ValueError(
            f"mask {name} is {values.shape[1]}x{values.shape[0]} pixels and its image {image_name} {size[0]}x{size[1]}: "
            "give masks of their images' sizes, upright"
        )
    counts = np.bincount(values.ravel())
    return Scene(name, size, {int(value): int(counts[value]) for value in np.flatnonzero(counts)})


def read_mask(record: dict) -> np.ndarray:
    """The values of one row's mask, `{"bytes": …, "path": …}`, as they are stored: (height, width) uint8, or int32 where
    they are deeper.

    Raises:
        One of `UNREADABLE` when the file is broken or missing, holds colours or no whole numbers from 0 to 65,535, or is a
        JPEG, whose values are not exact.
    """
    with decoding():
        with opened(record) as stream:
            if stream.read(6) == b"\x93NUMPY":
                stream.seek(0)
                values = np.load(stream, allow_pickle=False)
            else:
                stream.seek(0)
                values = stored_values(Image.open(stream, formats=MASK_FORMATS))
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ValueError(f"holds {values.dtype} values of shape {values.shape}, expected whole numbers (height, width)")
    if values.dtype in (bool, np.uint8):
        return values.astype(np.uint8)
    if values.size and not 0 <= values.min() <= values.max() < VALUES:
        raise ValueError(f"holds values from {values.min()} to {values.max()}, expected 0 to {VALUES - 1}")
    return values.astype(np.int32)


def opened(record: dict) -> BinaryIO:
    """A row's bytes, or its file."""
    return io.BytesIO(record["bytes"]) if record["bytes"] is not None else Path(record["path"]).open("rb")


def stored_values(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image, upright, without any conversion.

    Raises:
        ValueError: for colours and for JPEG.
    """
    if image.format in ("JPEG", "MPO"):
        raise ValueError("a JPEG, whose values are not exact: give PNG")
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(f"holds colours (mode {image.mode}), expected one number a pixel: give a grayscale or palette PNG")
    # Pillow stretches gray values of 2 and 4 bits over 0 to 255.
    stretched = {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1) if image.format == "PNG" and image.tile else 1
    image.load()
    return np.asarray(turned(image, orientation(image))) // (1 if image.mode == "1" else stretched)


def upright_size(record: dict) -> Size:
    """(width, height) of an image, from its header where that tells.

    Raises:
        One of `UNREADABLE`.
    """
    with decoding():
        try:
            with opened(record) as stream, Image.open(stream, formats=HEADER_FORMATS) as image:
                return image.size[::-1] if orientation(image) >= 5 else image.size
        except UnidentifiedImageError:
            return open_picture(record, None).size


# --- checks ------------------------------------------------------------------------------------------------------------


def scheme_of(names: Sequence[str], values: Sequence[int], ignore_index: int, path: str) -> MaskScheme:
    """The classes with their values.

    Raises:
        ValueError: when names and values are not as many, repeat, or are fewer than two.
    """
    if not values:
        values = [value for value in range(len(names) + 1) if value != ignore_index][: len(names)]
    names = tuple(names) or tuple(map(str, values))
    if len(names) != len(values):
        raise ValueError(f"{len(names)} classes are named ({', '.join(names)}), {len(values)} values given: give as many")
    for what, given in (("class", names), ("value", values)):
        twice = next((one for one in given if list(given).count(one) > 1), None)
        if twice is not None:
            raise ValueError(f"{what} {twice!r} of {path!r} is given twice")
    if ignore_index in values:
        raise ValueError(f"value {ignore_index} is a class and data.ignore_index: give another, or -1 for none")
    if len(names) < 2:
        held = f"only class {names[0]!r}" if names else "no class"
        raise ValueError(
            f"the masks of {path!r} hold {held} besides the ignored value {ignore_index}: give at least two classes; where "
            f"{ignore_index} is one, give data.ignore_index -1"
        )
    return MaskScheme(names, tuple(values), ignore_index)


def check_values(scenes: Sequence[Scene], scheme: MaskScheme) -> None:
    """Refuse values that are no class.

    Raises:
        ValueError: naming the first file, its values, and what was expected.
    """
    known = {*scheme.values, scheme.ignore_index}
    for scene in scenes:
        unknown = sorted(scene.counts.keys() - known)
        if unknown:
            listed = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
            span = f"{min(scheme.values)} to {max(scheme.values)}"
            gapless = max(scheme.values) - min(scheme.values) + 1 == len(scheme.values)
            ignored = f" or {scheme.ignore_index} to ignore" if scheme.ignore_index >= 0 else ""
            raise ValueError(
                f"mask {scene.name} holds the value{'s' * (len(unknown) > 1)} {listed}, expected "
                f"{span if gapless else ', '.join(map(str, scheme.values))}, the values of {len(scheme.classes)} classes, "
                f"{ignored.strip()}: mend the mask, or name all classes in {CLASSES_FILE} or data.classes"
            )


def check_parts(train: Sequence[Scene], validation: Sequence[Scene], scheme: MaskScheme) -> None:
    """Refuse a validation part with classes that are not trained.

    Raises:
        ValueError: naming the classes and a file.
    """
    seen = {value for scene in train for value in scene.counts} | {scheme.ignore_index}
    for scene in validation:
        new = [name for name, value in zip(scheme.classes, scheme.values) if value in scene.counts.keys() - seen]
        if new:
            raise ValueError(
                f"classes differ between the training and the validation masks: {', '.join(map(repr, new))} of "
                f"{scene.name} is in no training mask"
            )


def pixels_of(scenes: Iterable[Scene], scheme: MaskScheme) -> tuple[int, ...]:
    """Pixels of each class."""
    totals = dict.fromkeys(scheme.values, 0)
    for scene in scenes:
        for value in totals.keys() & scene.counts.keys():
            totals[value] += scene.counts[value]
    return tuple(totals.values())


def drawn(
    scenes: Sequence[Scene], rows: Sequence[int], labels: int, scheme: MaskScheme, generator: random.Random
) -> list[int]:
    """So many of `rows`, by chance: first for each class without a scene yet, the rarest first, one that has it; then any.

    Raises:
        ValueError: when there are not so many, or they are too few to have every class among them.
    """
    if not 1 <= labels <= len(rows):
        raise ValueError(f"{labels} labeled scenes asked for, there are {len(rows)} to train on: give 1 to {len(rows)}")
    order = list(rows)
    generator.shuffle(order)
    having = {value: [row for row in order if value in scenes[row].counts] for value in scheme.values}
    chosen: list[int] = []
    for value in sorted(scheme.values, key=lambda value: (len(having[value]), value)):
        if not any(value in scenes[row].counts for row in chosen):
            chosen.append(having[value][0])
    if len(chosen) > labels:
        raise ValueError(
            f"{labels} labeled scenes asked for, too few to have all {len(having)} classes: give {len(chosen)} or more"
        )
    rest = [row for row in order if row not in set(chosen)]
    return sorted(chosen + rest[: labels - len(chosen)])


# --- where they come from ----------------------------------------------------------------------------------------------


def read_pairs(path: str, column: str | None = None, mask_column: str | None = None) -> dict[str, datasets.Dataset]:
    """Columns `image` and `mask`, undecoded, of "train", and of "validation" where the source has such a part."""
    folder = Path(path).expanduser()
    if path and folder.is_file() and folder.suffix == ".csv":
        return {"train": read_csv(folder, column or "image", mask_column or "mask")}
    if not path or (not folder.exists() and not HUB_ID.fullmatch(path)) or is_plain_folder(folder):
        return {name: read_folders(*pair) for name, pair in paired_folders(folder).items()}
    kind, files = classify(path)
    if kind == "paths":
        raise ValueError(f"{path!r} has images and no masks: give a folder with {LAYOUT}")
    splits = load_splits(kind, files)
    held_out = next((splits[name] for name in VALIDATION_NAMES if name in splits), None)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    parts = {"train": read_columns(train, column, mask_column, path)}
    if held_out is not None and held_out is not train:
        parts["validation"] = read_columns(held_out, column, mask_column, path)
    return parts


def paired_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks of each part.

    Raises:
        ValueError: when there are none, saying which were expected.
    """
    if not folder.is_dir():
        raise ValueError(f"labeled folder {str(folder)!r} does not exist: give a folder with {LAYOUT}")

    def pair(place: Path, part: str = "") -> tuple[Path, Path] | None:
        images = place / IMAGE_FOLDER / part
        masks = next((place / name / part for name in MASK_FOLDERS if (place / name / part).is_dir()), None)
        return (images, masks) if images.is_dir() and masks else None

    for train, held_out in (
        (pair(folder / "train"), (pair(folder / name) for name in VALIDATION_NAMES)),
        (pair(folder, "train"), (pair(folder, name) for name in VALIDATION_NAMES)),
    ):
        validation = next(filter(None, held_out), None)
        if train:
            return {"train": train, "validation": validation} if validation else {"train": train}
    if pair(folder):
        return {"train": pair(folder)}
    have = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    raise ValueError(
        f"labeled folder {str(folder)!r} has no folders of images and masks, but "
        f"{', '.join(have[:8]) or 'no folder at all'}: give one with {LAYOUT}"
    )


def read_folders(images: Path, masks: Path) -> datasets.Dataset:
    """Images and masks of the same names, apart from their endings.

    Raises:
        ValueError: naming an image without a mask, a mask without an image, or two of one name.
    """
    image_of, mask_of = by_stem(images), by_stem(masks)
    for have, lack, what, other in ((image_of, mask_of, "image", masks), (mask_of, image_of, "mask", images)):
        alone = [stem for stem in have if stem not in lack]
        if alone:
            more = f" (nor {len(alone) - 1:,} others)" if len(alone) > 1 else ""
            expected = f"{other / alone[0]}.{'png' if what == 'image' else 'jpg, .png, …'}"
            raise ValueError(
                f"{what} {have[alone[0]]} has no {'mask' if what == 'image' else 'image'}{more}: expected {expected}"
            )
    return paired(list(image_of.values()), [mask_of[stem] for stem in image_of])


def by_stem(folder: Path) -> dict[str, str]:
    """Every image below `folder` by its path in it, without the ending.

    Raises:
        ValueError: when there is none, or two differ by their endings alone.
    """
    found: dict[str, str] = {}
    for path in find_images(folder):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in found:
            raise ValueError(f"{found[stem]} and {path} differ by their endings alone: which goes with the mask? Rename one")
        found[stem] = path
    return found


def read_csv(file: Path, column: str, mask_column: str) -> datasets.Dataset:
    """Images and masks of a CSV file with a header; relative paths start at the file's own folder.

    Raises:
        ValueError: when a column is missing, listing those there are, or a row lacks one of its paths.
    """
    with file.open(newline="", encoding="utf-8-sig") as text:
        reader = csv.DictReader(text)
        names = reader.fieldnames or []
        for wanted, setting in ((column, "data.column"), (mask_column, "data.mask_column")):
            if wanted not in names:
                raise ValueError(f"{file} has no column {wanted!r}: its columns are {', '.join(names)}; give {setting}")
        rows = [(row[column], row[mask_column]) for row in reader]
    if not rows:
        raise ValueError(f"{file} has no rows: give one with an image and its mask each")
    for number, pair in enumerate(rows, start=2):
        if not all(pair):
            raise ValueError(f"{file}, line {number} has no {'mask' if pair[0] else 'image'}")
    home = file.resolve().parent
    for number, (image, _) in enumerate(rows, start=2):
        if not os.path.isfile(os.path.join(home, image)):
            raise ValueError(f"{file}, line {number}: there is no image {os.path.join(home, image)}")
    return paired(*([os.path.join(home, name) for name in names] for names in zip(*rows)))


def paired(images: list[str], masks: list[str]) -> datasets.Dataset:
    """Paths as undecoded columns."""
    import datasets

    columns = image_dataset(images), image_dataset(masks).rename_column("image", "mask")
    return datasets.concatenate_datasets(list(columns), axis=1)


def read_columns(data, column: str | None, mask_column: str | None, path: str) -> datasets.Dataset:
    """Images and masks of a dataset with columns.

    Raises:
        ValueError: when there is no column of masks, listing the columns.
    """
    import datasets

    names = data.column_names
    column = column or found_column({name: kind for name, kind in data.features.items() if name not in MASK_COLUMNS})
    mask_column = mask_column or next((name for name in MASK_COLUMNS if name in names and name != column), None)
    if mask_column not in names:
        asked = f"no column {mask_column!r}" if mask_column else "no column of masks"
        raise ValueError(f"{path!r} has {asked}: its columns are {', '.join(names)}; give data.mask_column")
    masks = data.select_columns([mask_column]).cast_column(mask_column, datasets.Image(decode=False))
    return datasets.concatenate_datasets(
        [image_column(data, column, path), masks.rename_column(mask_column, "mask")], axis=1
    )


def named_classes(path: Path) -> tuple[str, ...]:
    """The names in classes.txt beside the labeled images, one a line; none where there is no such file.

    Raises:
        ValueError: when the parts have files that differ, or the file is empty.
    """
    home = path if path.is_dir() else path.parent
    found: dict[Path, tuple[str, ...]] = {}
    for place in (home, home / "train", *(home / name for name in VALIDATION_NAMES)):
        file = place / CLASSES_FILE
        if file.is_file():
            found[file] = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
            if not found[file]:
                raise ValueError(f"{file} names no classes: give one a line")
    files = list(found)
    for file in files[1:]:
        if found[file] != found[files[0]]:
            only = sorted(set(found[file]) ^ set(found[files[0]]))
            what = f"only in one of them: {', '.join(only)}" if only else "their order"
            raise ValueError(f"classes differ between {files[0]} and {file}: {what}")
    return found[files[0]] if files else ()
