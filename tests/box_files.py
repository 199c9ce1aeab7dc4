"""Images with boxes, written in each format that is read."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Scene(NamedTuple):
    """One image: its name without ending, its size (height, width), and its objects, (class, x1, y1, x2, y2)."""

    name: str
    size: tuple[int, int]
    objects: tuple[tuple[str, float, float, float, float], ...]


CLASSES = ("cat", "dog")
SCENES = (
    Scene("a", (32, 64), (("dog", 3, 5, 20, 30), ("cat", 0, 0, 64, 32))),
    Scene("b", (64, 32), (("cat", 1, 2, 3, 4),)),
    Scene("c", (16, 16), ()),
    Scene("d", (32, 32), (("dog", 30, 30, 32, 32), ("dog", 7, 9, 8, 31))),
)


def write_images(folder, scenes=SCENES):
    """Gray PNG files; each object is a bright rectangle."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        pixels = np.full(scene.size, 40, dtype=np.uint8)
        for name, x1, y1, x2, y2 in scene.objects:
            pixels[round(y1) : round(y2), round(x1) : round(x2)] = 250 if name == CLASSES[0] else 150
        Image.fromarray(pixels).save(Path(folder) / f"{scene.name}.png")


def write_coco(folder, scenes=SCENES, images="images", file="annotations/train.json"):
    """Category ids are 7, 8, …."""
    write_images(folder / images, scenes)
    annotations = [
        {"id": 100 * number + index, "image_id": number, "category_id": 7 + CLASSES.index(name), "iscrowd": 0}
        | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        for number, scene in enumerate(scenes)
        for index, (name, x1, y1, x2, y2) in enumerate(scene.objects)
    ]
    content = {
        "images": [
            {"id": number, "file_name": f"{scene.name}.png", "height": scene.size[0], "width": scene.size[1]}
            for number, scene in enumerate(scenes)
        ],
        "annotations": annotations,
        "categories": [{"id": 7 + number, "name": name} for number, name in enumerate(CLASSES)],
    }
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    return folder


def write_roboflow(folder, scenes=SCENES):
    """COCO beside the images, with Roboflow's first category, which only heads the others."""
    write_coco(folder, scenes, "train", "train/_annotations.coco.json")
    file = folder / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        *({**category, "supercategory": "pets"} for category in content["categories"]),
    ]
    file.write_text(json.dumps(content))
    return folder


def write_yolo(folder, scenes=SCENES):
    """Images without objects have no file."""
    write_images(folder / "images", scenes)
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text(f"path: .\nnames: {json.dumps(list(CLASSES))}\n")
    for scene in scenes:
        height, width = scene.size
        lines = []
        for name, x1, y1, x2, y2 in scene.objects:
            shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            lines.append(f"{CLASSES.index(name)} {' '.join(map(str, shares))}\n")
        if lines:
            (folder / "labels" / f"{scene.name}.txt").write_text("".join(lines))
    return folder


def write_voc(folder, scenes=SCENES):
    """Whole numbers from 1."""
    write_images(folder / "JPEGImages", scenes)
    (folder / "Annotations").mkdir()
    for scene in scenes:
        objects = "".join(
            f"\n<object>\n<name>{name}</name>\n<difficult>0</difficult>\n<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n</object>"
            for name, x1, y1, x2, y2 in scene.objects
        )
        size = f"<size><width>{scene.size[1]}</width><height>{scene.size[0]}</height><depth>1</depth></size>"
        (folder / "Annotations" / f"{scene.name}.xml").write_text(f"<annotation>{size}{objects}\n</annotation>\n")
    return folder


def write_csv(folder, scenes=SCENES):
    """A row without class and box for an image without objects."""
    write_images(folder / "pictures", scenes)
    with (folder / "boxes.csv").open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["path", "class", "xmin", "ymin", "xmax", "ymax"])
        for scene in scenes:
            writer.writerows([f"pictures/{scene.name}.png", *found] for found in scene.objects or [("", "", "", "", "")])
    return folder / "boxes.csv"


def write_columns(folder, scenes=SCENES):
    """A saved datasets folder with COCO's numbers and named categories."""
    import datasets

    write_images(folder / "pictures", scenes)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": [[datasets.Value("float32")]],
                "category": [datasets.ClassLabel(names=list(CLASSES))],
            },
        }
    )
    rows = [
        {
            "image": str(folder / "pictures" / f"{scene.name}.png"),
            "objects": {
                "bbox": [[x1, y1, x2 - x1, y2 - y1] for _, x1, y1, x2, y2 in scene.objects],
                "category": [CLASSES.index(name) for name, *_ in scene.objects],
            },
        }
        for scene in scenes
    ]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = {
    "coco": write_coco,
    "roboflow": write_roboflow,
    "yolo": write_yolo,
    "voc": write_voc,
    "csv": write_csv,
    "columns": write_columns,
}
