"""Photographs of groceries, taken by phone in shops: 2,640 to pre-train on, the same with labels, and 2,446 to judge by.

    git clone https://github.com/marcusklasson/GroceryStoreDataset       # MIT license
    python benchmarks/groceries.py --source GroceryStoreDataset --out data/groceries

OUT gets `unlabeled/` and `labeled/train/CLASS/` with the photographs of the data set's training part, and
`labeled/test/CLASS/` with those of its test part. For choices that the test part must not see, `development/train/CLASS/`
has the former and `development/validation/CLASS/` the data set's validation part. The short side has 192 px. The classes are
the data set's 43 coarse ones: Apple, not Golden-Delicious. Photographs of the one class that has none to learn from are left
out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

SHORT_SIDE_PX = 192
# Folders of labeled photographs by the data set's parts.
PLACES = {
    "train": ("labeled/train", "development/train"),
    "val": ("development/validation",),
    "test": ("labeled/test",),
}


def listed(source: Path, part: str) -> list[PurePosixPath]:
    """Paths of a part's photographs in the data set: part, kind of goods, class, variety where there are some, name."""
    lines = (source / "dataset" / f"{part}.txt").read_text(encoding="utf-8").splitlines()
    return [PurePosixPath(line.split(",")[0].strip()) for line in lines if line.strip()]


def class_of(path: PurePosixPath) -> str:
    """The coarse class of a photograph."""
    return path.parts[2]


def shrunk(file: Path) -> Image.Image:
    """An upright photograph whose short side has `SHORT_SIDE_PX`."""
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    factor = SHORT_SIDE_PX / min(upright.size)
    return upright.resize(
        (round(upright.width * factor), round(upright.height * factor)), Image.Resampling.BICUBIC, reducing_gap=3
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a clone of the data set's repository")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    missing = [f"dataset/{part}.txt" for part in PLACES if not (options.source / "dataset" / f"{part}.txt").is_file()]
    if missing:
        print(f"{options.source}: has no {missing[0]}; clone the repository that --help names", file=sys.stderr)
        return 2
    if options.out.exists():
        print(f"{options.out}: exists; give a new folder", file=sys.stderr)
        return 2
    partial = options.out.with_name(f"{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    known = {class_of(path) for path in listed(options.source, "train")}
    for part, places in PLACES.items():
        for path in listed(options.source, part):
            if class_of(path) not in known:
                continue
            photograph = shrunk(options.source / "dataset" / path)
            files = [partial / place / class_of(path) / path.name for place in places]
            for file in [*files, *([partial / "unlabeled" / path.name] if part == "train" else [])]:
                file.parent.mkdir(parents=True, exist_ok=True)
                photograph.save(file, quality=92)
    partial.rename(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
