"""Where images come from: every source becomes a `datasets.Dataset` with an undecoded column `image`."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"))


def find_images(folder: str | Path) -> list[str]:
    """Paths of all images below `folder`, sorted; nested folders and symbolic links are followed, each folder once.

    Raises:
        ValueError: when there is no such folder, it is empty, or it holds no file with an image's extension.
    """
    if not str(folder):
        raise ValueError("image folder '' is no folder: give a folder that holds images")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"image folder {str(folder)!r} {what}: give a folder that holds images")
    found, others, seen, waiting = [], 0, set(), [str(folder)]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    found.append(entry.path)
                else:
                    others += 1
    if not found:
        kinds = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
        what = f"holds {others} file{'s' * (others != 1)} but no image" if others else "is empty"
        raise ValueError(f"image folder {str(folder)!r} {what}: give one with images ({kinds}), nested as you like")
    return sorted(found)


def image_dataset(paths: Sequence[str], labels: Sequence[int] | None = None) -> datasets.Dataset:
    """Paths as a `datasets.Dataset` with a column `image`, undecoded, and a column `label` where there are labels."""
    import datasets

    columns = {"image": list(paths)} | ({"label": list(labels)} if labels is not None else {})
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
