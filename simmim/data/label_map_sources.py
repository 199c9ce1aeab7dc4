"""Images and their masks, from folders, CSV files, or datasets with two columns of images."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.index import dataset_from_paths, find_images
from simmim.data.labels import IMAGE_FOLDER, MASK_FOLDERS, VALIDATION_NAMES, is_plain_folder, parts_of
from simmim.data.sources import HUB_ID, classify, found_column, image_column

if TYPE_CHECKING:
    import datasets

CLASSES_FILE = "classes.txt"
MASK_COLUMNS = ("mask", "masks", "annotation", "segmentation", "segmentation_mask", "seg_map", "label", "labels")
LAYOUT = "images/ and masks/ with files of the same names, or train/ and val/ that have these"


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
    return {name: read_columns(part, column, mask_column, path) for name, part in parts_of(kind, files).items()}


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


def note_on_label_maps(path: str | list[str]) -> str:
    """A sentence for those who take a folder of scenes for one of images alone; empty where there are no masks in it."""
    for one in [path] if isinstance(path, str) else path:
        folder = Path(one).expanduser()
        try:
            images, masks = paired_folders(folder)["train"]
            find_images(masks)
        except (ValueError, OSError):
            continue
        return f"{masks} are masks, and count as images here like all else in {one}: give {images} to leave them out"
    return ""


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

    columns = dataset_from_paths(images), dataset_from_paths(masks).rename_column("image", "label_map")
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
        [image_column(data, column, path), masks.rename_column(mask_column, "label_map")], axis=1
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
