"""Images with disks and squares, and COCO's labels with their masks as run lengths or polygons."""

import json
from typing import NamedTuple

import numpy as np
import pycocotools.mask as coco
from PIL import Image

CLASSES = ("disk", "square")


class Shape(NamedTuple):
    """An object: its class, and its pixels in the image."""

    name: str
    pixels: np.ndarray


def draw_shapes(generator, size, count, side_px=(9, 17)):
    """Shapes beside one another, one in each of `count` columns."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    shapes = []
    for number in range(count):
        side = int(generator.integers(*side_px))
        left = number * width // count + int(generator.integers(0, width // count - side + 1))
        top = int(generator.integers(0, height - side + 1))
        name = CLASSES[int(generator.integers(0, 2))]
        if name == "disk":
            center = top + (side - 1) / 2, left + (side - 1) / 2
            pixels = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= (side / 2) ** 2
        else:
            pixels = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        shapes.append(Shape(name, pixels))
    return shapes


def box_of(pixels):
    """[x, y, width, height] of a mask."""
    rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
    return [int(value) for value in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]


def run_lengths(pixels, compressed=True):
    """COCO's, by pycocotools."""
    found = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    if compressed:
        return {"size": found["size"], "counts": found["counts"].decode()}
    flat = np.concatenate([[0], pixels.T.ravel().astype(int), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, *[[pixels.size]] * (len(edges) % 2 == 0)]))
    return {"size": list(pixels.shape), "counts": counts.tolist()}


def draw_scenes(count, seed, size=(48, 48)):
    """Lists of shapes."""
    generator = np.random.default_rng(seed)
    return [draw_shapes(generator, size, 1 + number % 2) for number in range(count)]


def write_scenes(folder, scenes, part="train", channels=1):
    """COCO's layout; disks are brighter than squares. Returns the file of labels."""
    images = folder / "images" / part
    images.mkdir(parents=True, exist_ok=True)
    described, annotations = [], []
    for number, shapes in enumerate(scenes, start=1):
        size = shapes[0].pixels.shape
        pixels = np.full(size, 40, dtype=np.uint8)
        for index, (name, mask) in enumerate(shapes):
            pixels[mask] = 250 if name == "disk" else 150
            annotations.append(
                {"id": 100 * number + index, "image_id": number, "category_id": 1 + CLASSES.index(name), "iscrowd": 0}
                | {"bbox": box_of(mask), "area": int(mask.sum()), "segmentation": run_lengths(mask)}
            )
        if channels == 1:
            Image.fromarray(pixels).save(images / f"{number:02d}.png")
        else:
            np.save(images / f"{number:02d}.npy", np.stack([pixels] * channels, axis=-1))
        name = f"{number:02d}.{'png' if channels == 1 else 'npy'}"
        described.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
    categories = [{"id": 1 + number, "name": name} for number, name in enumerate(CLASSES)]
    file = folder / "annotations" / f"instances_{part}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": described, "annotations": annotations, "categories": categories}))
    return file


def random_pixels(generator, size, kind):
    """A mask: nothing, everything, noise, a run over the edges of columns, or a few rectangles."""
    if kind == "noise":
        return generator.random(size) < 0.4
    pixels = np.full(size, kind == "all")
    if kind == "columns":
        flat = np.zeros(size[0] * size[1], dtype=bool)
        flat[size[0] // 2 : -1] = True
        pixels = flat.reshape(size[1], size[0]).T
    if kind == "rectangles":
        for _ in range(3):
            top, left = (int(generator.integers(0, side)) for side in size)
            pixels[top : top + int(generator.integers(1, 9)), left : left + int(generator.integers(1, 9))] = True
    return pixels
