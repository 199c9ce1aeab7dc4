"""Scenes, images with a class per pixel: the classes, a validation part, and a number of labeled scenes drawn by a seed.

A label map is a picture of its image's size whose values stand for classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simmim.data.decode import STRETCHED
from simmim.data.image_names import files_of_pages
from simmim.data.label_map_files import NUM_VALUES, SceneStatistics, inspect_scenes
from simmim.data.label_map_sources import CLASSES_FILE, read_class_names, read_scenes
from simmim.data.orientation import Size
from simmim.data.parts import validating_use
from simmim.data.records import paths_of
from simmim.data.scene_draws import AS_EVER, SceneDraw, SceneSource
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class ClassScheme:
    """Which value of a label map's file stands for which class. A class id is an index of `classes`.

    Attributes:
        classes: names, in order.
        values: of each class in the files.
        ignore_index: value in the files of pixels that do not count; −1 for none.
    """

    classes: tuple[str, ...]
    values: tuple[int, ...]
    ignore_index: int

    @property
    def ignored_id(self) -> int:
        """The id of pixels that do not count, whatever their value in the files."""
        return 255 if len(self.classes) <= 255 else NUM_VALUES - 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds class ids and `ignored_id`."""
        return np.dtype(np.uint8 if self.ignored_id == 255 else np.int32)

    def class_ids(self, values: np.ndarray) -> np.ndarray:
        """Values of a file, (height, width), to class ids and `ignored_id`, of `dtype`."""
        table = np.full(max(int(values.max()), *self.values) + 1, self.ignored_id, dtype=self.dtype)
        table[list(self.values)] = np.arange(len(self.classes))
        return table[values]


@dataclass(frozen=True)
class LabeledScenes:
    """Labeled scenes to train on and to validate with.

    Attributes:
        train, validation: columns `image` and `label_map`, undecoded.
        scheme: the classes.
        pixels: number of training pixels of each class.
        validation_sizes: (height, width) of the validation images, upright; None for an image that cannot be read.
        notes: what was inferred from the label maps, a sentence each.
        test_validates: whether `validation` is a part that is called test.
        source: all training scenes, from which others may be chosen.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    scheme: ClassScheme
    pixels: tuple[int, ...]
    validation_sizes: tuple[Size | None, ...]
    notes: tuple[str, ...] = ()
    test_validates: bool = False
    source: SceneSource | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names."""
        return self.scheme.classes


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
    draw: SceneDraw = AS_EVER,
    reading: Reading = STRETCHED,
) -> LabeledScenes:
    """Read labeled scenes with every label map, and choose what to train on and what to validate with.

    `path` is a folder with images/ and masks/, files of the same names apart from their extensions; one with such folders in
    train/ and in val/ or test/, or with images/train, masks/train, images/val, masks/val; a CSV file of paths (relative to
    it); Parquet files, a saved `datasets` folder or a hub id with two columns of images. If there is no validation part, a
    fifth of the scenes, drawn by `seed`, is held out before labels are chosen.

    Args:
        labels: keep this number of training scenes, drawn by `seed` so that every class is among them; None keeps all.
        column, mask_column: the columns of images and label maps; detected by default.
        classes: names in the order of the values; by default those in classes.txt, one per line, or else the values.
        values: value of each class in the label maps; by default 0, 1, …, without `ignore_index`.
        ignore_index: value of pixels that do not count; −1 for none.
        progress: wraps the scenes while they are read, for a progress bar.
        draw: how scenes are drawn in a study.
        reading: which pages or files make an image. Pages of one file train or validate, not both.

    Raises:
        ValueError: for images and label maps without a partner, label maps that cannot be read, are of another size or hold
            values that are no class, fewer than two classes, classes without a training pixel, and too few scenes.
    """
    parts = read_scenes(path := str(path), column, mask_column, reading)
    statistics = {part: inspect_scenes(scenes, progress, reading) for part, scenes in parts.items()}
    scheme, notes = find_scheme(path, classes, values, ignore_index, [*statistics.values()])
    use, scenes = validating_use(parts), statistics["train"]
    files = files_of_pages(paths_of(parts["train"]))
    source = SceneSource(path, scenes, scheme.values, bool(use), files)
    rows, held_out = source.hold_out(seed, draw)
    if use:
        check_classes_are_trained(scenes, statistics[use], scheme)
    check_pixels([scenes[row] for row in rows], judging_scenes(statistics, use, held_out), scheme, path)
    rows, held_out = source.choose(labels, seed, draw)
    judging = judging_scenes(statistics, use, held_out)
    notes += note_missing_classes(judging, scheme)
    return LabeledScenes(
        parts["train"].select(rows),
        parts[use] if held_out is None and use else parts["train"].select(held_out),
        scheme,
        count_pixels((scenes[row] for row in rows), scheme),
        tuple(scene.size for scene in judging),
        tuple(notes),
        use == "test",
        source,
    )


def judging_scenes(
    statistics: Mapping[str, Sequence[SceneStatistics]], use: str | None, held_out: Sequence[int] | None
) -> list[SceneStatistics]:
    """The scenes that validate: of the part `use`, or rows of the training part."""
    if held_out is None:
        return list(statistics[use or "train"])
    return [statistics["train"][row] for row in held_out]


def find_scheme(
    path: str,
    classes: Sequence[str],
    values: Sequence[int],
    ignore_index: int,
    statistics: Sequence[Sequence[SceneStatistics]],
) -> tuple[ClassScheme, list[str]]:
    """The classes as of `read_labeled_scenes`, and what was inferred from the label maps.

    Raises:
        ValueError: as `build_scheme` and `check_values`.
    """
    names = tuple(classes) or read_class_names(Path(path).expanduser())
    notes: list[str] = []
    if not names and not values:
        values = find_values(statistics, ignore_index)
        notes.append(f"classes are the {len(values)} values that the label maps hold")
    scheme = build_scheme(names, values, ignore_index, path)
    check_values([scene for scenes in statistics for scene in scenes], scheme)
    return scheme, notes


def count_pixels(scenes: Iterable[SceneStatistics], scheme: ClassScheme) -> tuple[int, ...]:
    """Number of pixels of each class."""
    totals = dict.fromkeys(scheme.values, 0)
    for scene in scenes:
        for value in totals.keys() & scene.counts.keys():
            totals[value] += scene.counts[value]
    return tuple(totals.values())


def find_values(parts: Iterable[Sequence[SceneStatistics]], ignore_index: int) -> list[int]:
    """All values in the label maps of all parts, but `ignore_index`."""
    return sorted({value for scenes in parts for scene in scenes for value in scene.counts} - {ignore_index})


def note_missing_classes(validation: Sequence[SceneStatistics], scheme: ClassScheme) -> list[str]:
    """A sentence about the classes without a validation pixel, if there are any."""
    missing = [name for name, count in zip(scheme.classes, count_pixels(validation, scheme)) if not count]
    return [f"no validation pixel of {', '.join(missing)}: left out of the mean IoU unless predicted"] if missing else []


# --- checks ------------------------------------------------------------------------------------------------------------


def build_scheme(names: Sequence[str], values: Sequence[int], ignore_index: int, path: str) -> ClassScheme:
    """The classes with their values.

    Raises:
        ValueError: if the numbers of names and values differ, one occurs twice, or there are fewer than two.
    """
    if not values:
        values = [value for value in range(len(names) + 1) if value != ignore_index][: len(names)]
    names = tuple(names) or tuple(map(str, values))
    if len(names) != len(values):
        raise ValueError(
            f"{len(names)} classes are named ({', '.join(names)}), {len(values)} values given: give one value per class"
        )
    for noun, entries in (("class", names), ("value", values)):
        repeated = next((entry for entry in entries if list(entries).count(entry) > 1), None)
        if repeated is not None:
            raise ValueError(f"{noun} {repeated!r} of {path!r} is given twice")
    if ignore_index in values:
        raise ValueError(f"value {ignore_index} is a class and data.ignore_index: give another, or -1 for none")
    if len(names) < 2:
        classes = f"only class {names[0]!r}" if names else "no class"
        raise ValueError(
            f"the label maps of {path!r} hold {classes} besides the ignored value {ignore_index}: give at least two "
            f"classes, and data.ignore_index -1 if {ignore_index} is one of them"
        )
    return ClassScheme(names, tuple(values), ignore_index)


def check_values(scenes: Sequence[SceneStatistics], scheme: ClassScheme) -> None:
    """Refuse values that stand for no class.

    Raises:
        ValueError: naming the first file, its values, and what was expected.
    """
    known = {*scheme.values, scheme.ignore_index}
    for scene in scenes:
        unknown = sorted(scene.counts.keys() - known)
        if unknown:
            listed = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
            low, high = min(scheme.values), max(scheme.values)
            is_range = high - low + 1 == len(scheme.values)
            expected = f"{low} to {high}" if is_range else ", ".join(map(str, scheme.values))
            ignored = f", or {scheme.ignore_index} to ignore" if scheme.ignore_index >= 0 else ""
            raise ValueError(
                f"label map {scene.name} holds the value{'s' * (len(unknown) > 1)} {listed}, expected {expected}, the "
                f"values of {len(scheme.classes)} classes{ignored}: correct the label map, or name all classes in "
                f"{CLASSES_FILE} or data.classes"
            )


def check_classes_are_trained(
    train: Sequence[SceneStatistics], validation: Sequence[SceneStatistics], scheme: ClassScheme
) -> None:
    """Refuse a validation part with classes that are in no training scene.

    Raises:
        ValueError: naming the classes and a file.
    """
    trained = {value for scene in train for value in scene.counts} | {scheme.ignore_index}
    for scene in validation:
        new = [name for name, value in zip(scheme.classes, scheme.values) if value in scene.counts.keys() - trained]
        if new:
            raise ValueError(
                f"classes differ between the training and the validation label maps: {', '.join(map(repr, new))} of "
                f"{scene.name} is in no training label map"
            )


def check_pixels(
    train: Sequence[SceneStatistics], validation: Sequence[SceneStatistics], scheme: ClassScheme, path: str
) -> None:
    """Refuse classes without a training pixel, and validation scenes without any pixel that counts.

    Raises:
        ValueError: naming the class.
    """
    for name, count in zip(scheme.classes, count_pixels(train, scheme)):
        if not count:
            raise ValueError(
                f"class {name!r} has no pixel in the {len(train)} training label maps of {path!r}: give some, or leave it "
                "out of the classes"
            )
    if not any(count_pixels(validation, scheme)):
        raise ValueError(f"the {len(validation)} validation label maps of {path!r} hold nothing but ignored pixels")
