"""Images with a class for every pixel: the classes, a validation part, and so many labels.

A mask is a picture of the image's size whose values are numbers of classes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simmim.data.decode import Size
from simmim.data.label_map_files import VALUES, Scene, inspect_scenes
from simmim.data.label_map_sources import CLASSES_FILE, named_classes, read_pairs

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class ClassScheme:
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
    def ignored_id(self) -> int:
        """What stands for no class among the classes' numbers, whatever it is in the files."""
        return 255 if len(self.classes) <= 255 else VALUES - 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest in which classes and `ignored` have room."""
        return np.dtype(np.uint8 if self.ignored_id == 255 else np.int32)

    def class_ids(self, mask: np.ndarray) -> np.ndarray:
        """A mask as in a file, (height, width), to the classes' numbers from 0 on, and `ignored`."""
        table = np.full(max(int(mask.max()), *self.values) + 1, self.ignored_id, dtype=self.dtype)
        table[list(self.values)] = np.arange(len(self.classes))
        return table[mask]


@dataclass(frozen=True)
class LabeledScenes:
    """Labeled scenes read.

    Attributes:
        train, validation: undecoded columns `image` and `mask`.
        scheme: the classes.
        pixels: training pixels of each class.
        validation_sizes: (height, width) of the validation images, upright; an image that cannot be read has None.
        notes: what was concluded and not given, a sentence each.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    scheme: ClassScheme
    pixels: tuple[int, ...]
    validation_sizes: tuple[Size | None, ...]
    notes: tuple[str, ...] = ()


def read_labeled_scenes(
    path: str | Path,
    labels: int | None,
    seed: int,
    column: str | None = None,
    mask_column: str | None = None,
    classes: Sequence[str] = (),
    values: Sequence[int] = (),
    ignore_index: int = 255,
    progress: Callable[[Iterable], Iterable] = iter,
) -> LabeledScenes:
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
    looked = {name: inspect_scenes(data, progress) for name, data in parts.items()}
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
    return LabeledScenes(
        data.select(rows),
        validation if held_out is None else validation.select(held_out),
        scheme,
        pixels,
        tuple(scene.size for scene in validation_scenes),
        tuple(notes),
    )


# --- checks ------------------------------------------------------------------------------------------------------------


def scheme_of(names: Sequence[str], values: Sequence[int], ignore_index: int, path: str) -> ClassScheme:
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
    return ClassScheme(names, tuple(values), ignore_index)


def check_values(scenes: Sequence[Scene], scheme: ClassScheme) -> None:
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


def check_parts(train: Sequence[Scene], validation: Sequence[Scene], scheme: ClassScheme) -> None:
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


def pixels_of(scenes: Iterable[Scene], scheme: ClassScheme) -> tuple[int, ...]:
    """Pixels of each class."""
    totals = dict.fromkeys(scheme.values, 0)
    for scene in scenes:
        for value in totals.keys() & scene.counts.keys():
            totals[value] += scene.counts[value]
    return tuple(totals.values())


def drawn(
    scenes: Sequence[Scene], rows: Sequence[int], labels: int, scheme: ClassScheme, generator: random.Random
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
