"""Images to predict for, from any source: their names in the output, batches of one size, and files of pictures."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from simmim.data import UNREADABLE, describe_error, open_picture
from simmim.data.addresses import parse_address
from simmim.files import atomic_write
from simmim.finetune.dense.head_files import SavedModel
from simmim.finetune.dense.views import whole_picture
from simmim.finetune.dense.windows import Size
from simmim.messages import counted

OVERLAYS = "overlays"  # folder of pictures
MAX_BATCH_PIXELS = 2**22  # of the images of one batch at the model's scale


class InputImage(NamedTuple):
    """One image to predict for.

    Attributes:
        name: name of its files in the output, without an ending.
        pixels: (channels, height, width), uint8 or float32, at the model's scale.
        size: (height, width) of the file's image.
    """

    name: str
    pixels: Tensor
    size: Size


def check_new_folder(out: str | Path) -> Path:
    """The folder to make.

    Raises:
        ValueError: for one that holds something.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists: give a new folder")
    return out


def read_images(source, names: list[str], saved: SavedModel, unreadable: dict[str, str]) -> Iterator[InputImage]:
    """Every image that can be read, in order; why the others cannot goes to `unreadable`."""
    channels = saved.model.encoder.config.in_channels
    for row in tqdm(range(len(source)), desc="predicting", unit="image"):
        record = source[row]["image"]
        try:
            picture = open_picture(record, channels, reading=saved.preprocessing.reading_or_default)
            pixels = whole_picture(picture, saved.short_side)
        except UNREADABLE as error:
            unreadable[record["path"] or f"row {row}"] = describe_error(error)
            continue
        yield InputImage(names[row], pixels, picture.size)


def batches_of_one_size(images: Iterator[InputImage], batch_size: int) -> Iterator[list[InputImage]]:
    """Consecutive images of one size at the model's scale, `batch_size` at a time, fewer where they are large."""
    batch: list[InputImage] = []
    for image in images:
        full = len(batch) >= min(batch_size, max(1, MAX_BATCH_PIXELS // image.pixels[0].numel()))
        if batch and (full or batch[0].pixels.shape != image.pixels.shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def output_names(paths: list[str | None], images: Path) -> list[str]:
    """A unique name without an ending for each image's files.

    It is the image's path in the folder `images`, else its file's name, else its index. Names that differ by their endings
    alone keep them, and equal names get an index. Of an image of several files it is that of the first, and of a page
    scan.tif#page=0: names by which labels are found beside images.
    """
    paths = [None if path is None else label_path(path) for path in paths]
    is_folder = images.expanduser().is_dir()
    root = os.path.abspath(images.expanduser())
    file_names = []
    for row, path in enumerate(paths):
        if path is None:
            file_names.append(f"{row:06d}")
        elif is_folder and os.path.abspath(path).startswith(root + os.sep):
            file_names.append(os.path.relpath(os.path.abspath(path), root))
        else:
            file_names.append(os.path.basename(path))
    # A folder of a Zarr store's name would be taken for one.
    file_names = [re.sub(r"\.zarr(?=[/\\])", "", name) for name in file_names]
    stems = [os.path.splitext(name)[0] for name in file_names]
    unique = {stem for stem, count in Counter(stems).items() if count == 1}
    names, used = [], set()
    for row, (file_name, stem) in enumerate(zip(file_names, stems)):
        name = stem if stem in unique else file_name
        while name in used:
            name = f"{name}-{row:06d}"
        used.add(name)
        names.append(name)
    return names


def label_path(path: str) -> str:
    """The path by which labels name an image: of one whose channels are files, the first file."""
    address = parse_address(path)
    return address.files[0] if len(address.files) > 1 else path


def check_any_read(count: int, unreadable: Mapping[str, str]) -> None:
    """Check that something was predicted.

    Args:
        count: images that were read.
        unreadable: why each of the others was not, by path.

    Raises:
        ValueError: when there is none.
    """
    if not count:
        path, reason = next(iter(unreadable.items()))
        raise ValueError(f"none of {counted(len(unreadable), 'image')} can be read; the first, {path}: {reason}")


def write_png(file: Path, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all, of a folder of them: predictions would wait for the disk at each."""
    data = io.BytesIO()
    image.save(data, format="png")
    with atomic_write(file, survives_power_cut=False) as temporary:
        temporary.write_bytes(data.getvalue())
