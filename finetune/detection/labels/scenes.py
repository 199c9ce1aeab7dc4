"""Scenes with boxes: classes, upright boxes inside their images, a validation part, a number of labels drawn by a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from simmim.data.decode import STRETCHED, open_picture
from simmim.data.image_names import files_of_pages
from simmim.data.known_formats import detect_path
from simmim.data.label_map_files import HEADER_FORMATS, SceneStatistics
from simmim.data.loading import available_cores
from simmim.data.orientation import Box, Size, read_orientation, stored_box, swaps_axes, upright_size
from simmim.data.parts import validating_use
from simmim.data.pillow_guard import UNREADABLE, decoding
from simmim.data.records import Record, open_record
from simmim.data.scene_draws import AS_EVER, SceneDraw, SceneSource
from simmim.finetune.detection.labels.base import RawLabels, RawScene, ReadingOptions, convert_box
from simmim.finetune.detection.labels.masks import filled_box, fills_box, learns_masks, read_mask, turn_mask
from simmim.finetune.detection.labels.registry import find_reader
from simmim.finetune.detection.masks import PackedMask
from simmim.messages import counted, did_you_mean, notify
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

FEW_BOXES = 5  # of a class, below which its figures say little
INVERSE = {6: 8, 8: 6}  # of EXIF's orientations; the others are their own
ANY = ReadingOptions()
EXIF = ("auto", "upright", "stored")


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes: (N, 4) float32, (x1, y1, x2, y2) in upright pixels, exclusive.
        classes: (N,) int64.
        ignored: (N,) bool, True = neither an object to find nor background.
        masks: of each object, in upright pixels; None where boxes alone are learned.
    """

    boxes: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray
    masks: tuple[PackedMask, ...] | None = None


class ClassSize(NamedTuple):
    """How large the objects of a class are.

    Attributes:
        name: of the class.
        share: side of the square of a box's area in shares of its image's shorter side, the median over the boxes.
        short_side_px: of the images with such boxes, the median.
    """

    name: str
    share: float
    short_side_px: int


@dataclass(frozen=True)
class BoxedScenes:
    """Labeled images to train on and to validate with.

    Attributes:
        train, validation: column `image`, undecoded.
        train_objects, validation_objects: of each row.
        validation_sizes: (height, width), upright; None for an image that cannot be read.
        classes: names in order.
        notes: what was inferred, a sentence each.
        test_validates: whether `validation` is a part that is called test.
        source: all training images, from which others may be chosen.
        has_masks: whether every object has a mask.
        smallest: the class with the smallest objects among all images that may be trained on, drawn or not.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    train_objects: tuple[Objects, ...]
    validation_objects: tuple[Objects, ...]
    validation_sizes: tuple[Size | None, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    test_validates: bool = False
    source: SceneSource | None = None
    has_masks: bool = False
    smallest: ClassSize | None = None


class Inspected(NamedTuple):
    """One scene after its image's header was read.

    Attributes:
        raw: as the file describes it.
        objects: of the image.
        size: (height, width), upright; None for an image that cannot be read.
        num_clipped: boxes that reached out of the image.
    """

    raw: RawScene
    objects: Objects
    size: Size | None
    num_clipped: int


def read_boxed_scenes(
    path: str,
    labels: int | None,
    seed: int,
    options: ReadingOptions = ANY,
    format: str | None = None,
    exif: str = "auto",
    draw: SceneDraw = AS_EVER,
    masks: bool | None = False,
) -> BoxedScenes:
    """Read labels in any known format, and choose what to train on and what to validate with.

    Without a validation part a fifth of the images, drawn by `seed`, is held out before labels are chosen.

    Args:
        labels: keep this number of training images, drawn by `seed` so that every class is among them; None keeps all.
        format: one of `registry.READERS`; detected by default.
        exif: which picture boxes refer to where EXIF turns it: upright, stored, or auto, the one whose size is stated.
        draw: how images are drawn in a study.
        masks: whether masks are read; None where the labels are to say it: if every object has one.

    Raises:
        ValueError: for labels that cannot be read, boxes without area or outside their image, unknown classes, classes
            without a training box, masks that are broken or missing, and too few images.
    """
    reader = find_reader(path, format)
    raw = reader.read(path, options)
    classes = choose_classes(raw, options.classes, path)
    parts = inspect_parts(raw, classes, exif, options.reading, masks, path)
    for part, scenes in parts.items():
        if not scenes:
            raise ValueError(f"{path!r} has no image to {'train on' if part == 'train' else 'validate with'}")
    use = validating_use(parts)
    if num_clipped := sum(scene.num_clipped for scenes in parts.values() for scene in scenes):
        notify(f"clipped where they reach out of their images: {counted(num_clipped, 'box')} of {path!r}")
    everything, has_masks = parts["train"], parts["train"][0].objects.masks is not None
    statistics = [SceneStatistics("", scene.size, counts_of(scene.objects)) for scene in everything]
    files = files_of_pages([scene.raw.image["path"] for scene in everything])
    source = SceneSource(path, statistics, tuple(range(len(classes))), bool(use), files)
    rows, held_out = source.hold_out(seed, draw)
    judging = parts[use] if use else [everything[row] for row in held_out or ()]
    check_boxes([everything[row] for row in rows], judging, classes, path)
    smallest = smallest_class([everything[row] for row in rows], classes)
    rows, held_out = source.choose(labels, seed, draw)
    train = [everything[row] for row in rows]
    validation = judging if held_out is None else [everything[row] for row in held_out]
    notes = (*raw.notes, *notes_on_masks(raw, has_masks), *notes_on_counts(train, validation, classes))
    return BoxedScenes(
        records_of(train),
        records_of(validation),
        tuple(scene.objects for scene in train),
        tuple(scene.objects for scene in validation),
        tuple(scene.size for scene in validation),
        classes,
        (f"labels are {reader.title}", *notes),
        use == "test",
        source,
        has_masks,
        smallest,
    )


# --- classes -----------------------------------------------------------------------------------------------------------


def choose_classes(raw: RawLabels, given: Sequence[str], path: str) -> tuple[str, ...]:
    """The classes in order: those given, those that the format states and that have a box, or else all names.

    Raises:
        ValueError: for an object of another class than those given, and where there is no box at all.
    """
    objects = [found for scenes in raw.parts.values() for scene in scenes for found in scene.objects]
    if not any(not found.ignored for found in objects):
        num_images = sum(len(scenes) for scenes in raw.parts.values())
        raise ValueError(f"{path!r} has no box in {counted(num_images, 'image')}: give some")
    used = {found.category for found in objects}
    if given:
        if len(set(given)) < len(given):
            raise ValueError(f"data.classes names {next(name for name in given if list(given).count(name) > 1)!r} twice")
        for found in objects:
            if found.category not in given:
                raise ValueError(f"{found.place}: unknown class {found.category!r}{did_you_mean(found.category, given)}")
        return tuple(given)
    if raw.classes is None:
        return tuple(sorted(used))
    return tuple(name for name in raw.classes if name in used)


def check_boxes(train: Sequence[Inspected], validation: Sequence[Inspected], classes: Sequence[str], path: str) -> None:
    """Refuse classes without a training box, and a validation part without any box.

    Raises:
        ValueError: naming the class.
    """
    trained, judged = total_counts(train), total_counts(validation)
    for number, name in enumerate(classes):
        if not trained[number]:
            where = f", but {judged[number]} in the validation images" if judged[number] else ""
            raise ValueError(
                f"class {name!r} has no box in the {len(train)} training images of {path!r}{where}: give some, or leave it "
                "out"
            )
    if not judged:
        raise ValueError(f"the {len(validation)} validation images of {path!r} hold no box: give some that do")


def counts_of(objects: Objects) -> dict[int, int]:
    """Boxes by class, without ignored ones."""
    return dict(Counter(objects.classes[~objects.ignored].tolist()))


def total_counts(scenes: Sequence[Inspected]) -> Counter[int]:
    """Boxes by class over scenes."""
    total: Counter[int] = Counter()
    for scene in scenes:
        total.update(counts_of(scene.objects))
    return total


def smallest_class(scenes: Sequence[Inspected], classes: Sequence[str]) -> ClassSize | None:
    """The class with the smallest objects; None where no image with objects can be read."""
    shares: dict[int, list[float]] = {}
    sides: dict[int, list[int]] = {}
    for scene in scenes:
        if scene.size is None:
            continue
        boxes, classes_of = (values[~scene.objects.ignored] for values in scene.objects[:2])
        widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
        for number, share in zip(classes_of.tolist(), np.sqrt(widths * heights) / min(scene.size)):
            shares.setdefault(number, []).append(float(share))
            sides.setdefault(number, []).append(min(scene.size))
    sizes = [ClassSize(classes[number], median(shares[number]), round(median(sides[number]))) for number in shares]
    return min(sizes, key=lambda size: size.share, default=None)


def notes_on_masks(raw: RawLabels, has_masks: bool) -> list[str]:
    """Sentences where masks are learned beside boxes."""
    if not has_masks:
        return []
    return ["masks of all objects are learned beside their boxes (head.masks false: boxes alone)", *raw.notes_on_masks]


def notes_on_counts(train: Sequence[Inspected], validation: Sequence[Inspected], classes: Sequence[str]) -> list[str]:
    """Sentences about images without objects, and classes with few boxes."""
    notes = []
    empty = sum(not len(scene.objects.boxes) for scene in train)
    if empty:
        notes.append(f"{empty:,} of {len(train):,} training images have no objects: all background")
    for scenes, use in ((train, "training"), (validation, "validation")):
        counts = total_counts(scenes)
        few = [f"{name} {counts[number]}" for number, name in enumerate(classes) if counts[number] < FEW_BOXES]
        if few:
            notes.append(f"fewer than {FEW_BOXES} {use} boxes of {', '.join(few)}: their figures say little")
    return notes


# --- boxes -------------------------------------------------------------------------------------------------------------


def inspect_parts(
    raw: RawLabels, classes: Sequence[str], exif: str, reading: Reading, masks: bool | None, path: str
) -> dict[str, list[Inspected]]:
    """Every scene of each part, with masks in all of them or in none; arguments as of `read_boxed_scenes`."""
    has_masks = learns_masks(list(raw.parts.values()), masks, path)
    parts = {use: inspect(scenes, classes, exif, reading, has_masks) for use, scenes in raw.parts.items()}
    if has_masks and masks is None and not any_shape(parts.values()):
        return {use: [without_masks(scene) for scene in scenes] for use, scenes in parts.items()}
    return parts


def inspect(
    scenes: Sequence[RawScene],
    classes: Sequence[str],
    exif: str,
    reading: Reading = STRETCHED,
    masks: bool = False,
) -> list[Inspected]:
    """Boxes, and masks if they are to be read, in pixels of the upright images, of every scene.

    Args:
        reading: which pages or files make an image.
    """
    ids = {name: number for number, name in enumerate(classes)}
    with ThreadPoolExecutor(available_cores()) as pool:
        headers = list(pool.map(lambda scene: read_header(scene.image, reading), scenes))
    return [inspect_scene(scene, *header, ids, exif, masks) for scene, header in zip(scenes, headers)]


def read_header(record: Record, reading: Reading = STRETCHED) -> tuple[Size | None, int]:
    """(height, width) of an image, upright, and EXIF's orientation; None for one that cannot be read."""
    try:
        with decoding():
            if detect_path(record):
                return open_picture(record, None, reading=Reading(pages=reading.pages)).size, 1
            try:
                with open_record(record) as stream, Image.open(stream, formats=HEADER_FORMATS) as image:
                    orientation = read_orientation(image)
                    return upright_size(image, orientation), orientation
            except UnidentifiedImageError:
                return open_picture(record, None, reading=Reading(pages=reading.pages)).size, 1
    except UNREADABLE:
        return None, 1  # training replaces and counts an image that cannot be read


def inspect_scene(
    scene: RawScene, size: Size | None, orientation: int, ids: dict[str, int], exif: str, masks: bool = False
) -> Inspected:
    """One scene with upright boxes inside its image.

    Args:
        size: of the image, upright.

    Raises:
        ValueError: naming file and line, for a box without area in the image.
    """
    if size is None:
        empty = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), () if masks else None)
        return Inspected(scene, empty, None, 0)
    turned = refers_to_stored(scene, size, orientation, exif)
    stored = size[::-1] if swaps_axes(orientation) else size
    boxes, num_clipped = np.zeros((len(scene.objects), 4), np.float32), 0
    for number, found in enumerate(scene.objects):
        box = convert_box(found.values, scene.box_format, stored if turned else size, found.place)
        if turned:
            box = stored_box(box, stored, INVERSE.get(orientation, orientation))
        clipped = clip(box, size)
        num_clipped += max(abs(a - b) for a, b in zip(box, clipped)) > 0.5
        if box[2] <= box[0] or box[3] <= box[1]:
            said = " ".join(f"{value:g}" for value in found.values)
            raise ValueError(f"{found.place}: box {said} ({scene.box_format}) has no area: correct or remove it")
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            said = " ".join(f"{value:g}" for value in found.values)
            raise ValueError(
                f"{found.place}: box {said} ({scene.box_format}) lies outside its image of {size[0]}x{size[1]} pixels "
                "(height x width): correct or remove it"
            )
        boxes[number] = clipped
    classes = np.array([ids[found.category] for found in scene.objects], dtype=np.int64)
    ignored = np.array([found.ignored for found in scene.objects], dtype=bool)
    found_masks = masks_of(scene, boxes, size, orientation if turned else 1) if masks else None
    return Inspected(scene, Objects(boxes, classes, ignored, found_masks), size, int(num_clipped))


def masks_of(scene: RawScene, boxes: np.ndarray, size: Size, orientation: int) -> tuple[PackedMask, ...]:
    """The masks of one scene's objects, upright. An ignored object without one hides its box.

    Args:
        boxes: of the objects, upright.
        size: of the upright image.
        orientation: EXIF's, by which the picture that masks refer to is turned; 1 where they refer to the upright one.
    """
    stored, masks = size[::-1] if swaps_axes(orientation) else size, []
    for found, box in zip(scene.objects, boxes.tolist()):
        if found.segmentation is None:
            masks.append(filled_box(box, size))
            continue
        mask = read_mask(found.segmentation, stored, found.place)
        masks.append(mask if orientation == 1 else turn_mask(mask, stored, orientation))
    return tuple(masks)


def any_shape(parts: Iterable[Sequence[Inspected]]) -> bool:
    """Whether any mask is more than a rectangle; some tools write boxes as polygons, too."""
    return any(not fills_box(mask) for scenes in parts for scene in scenes for mask in scene.objects.masks or ())


def without_masks(scene: Inspected) -> Inspected:
    """The scene with boxes alone."""
    return scene._replace(objects=scene.objects._replace(masks=None))


def clip(box: Box, size: Size) -> Box:
    """The part of a box inside an image of `size`."""
    left, top, right, bottom = box
    height, width = size
    return min(max(left, 0), width), min(max(top, 0), height), min(max(right, 0), width), min(max(bottom, 0), height)


def refers_to_stored(scene: RawScene, size: Size, orientation: int, exif: str) -> bool:
    """Whether boxes refer to the stored picture and not to the upright one.

    Args:
        size: of the upright picture.

    Raises:
        ValueError: if the stated size is neither's, or EXIF turns the picture and it stays unclear which is meant.
    """
    stored = size[::-1] if swaps_axes(orientation) else size
    if scene.size is not None and scene.size not in (size, stored):
        raise ValueError(
            f"{scene.place} states {scene.size[0]}x{scene.size[1]} pixels, and the image has {size[0]}x{size[1]} (height x "
            "width): were images resized after they were labeled?"
        )
    if orientation == 1:
        return False
    if exif != "auto":
        return exif == "stored"
    if scene.size is None or size == stored:
        said = "states no size" if scene.size is None else "states a size that fits both"
        raise ValueError(
            f"{scene.place} {said}, and EXIF turns the image (orientation {orientation}): give data.exif upright or stored, "
            "the picture that the boxes were drawn on"
        )
    return scene.size == stored


def records_of(scenes: Sequence[Inspected]) -> datasets.Dataset:
    """The images of scenes, undecoded."""
    import datasets

    rows = [{"image": scene.raw.image} for scene in scenes]
    return datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
