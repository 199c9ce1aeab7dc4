"""Sources: every source becomes a `datasets.Dataset`, or a stream, of records in an undecoded column `image`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.arrangement import arrange, match_channels
from simmim.data.decode import STRETCHED, count_images
from simmim.data.pillow_guard import UNREADABLE
from simmim.data.readers import detect_reader, known_kinds
from simmim.data.records import Record, iterate_records
from simmim.data.tiff import UnexplainedPages
from simmim.messages import notify
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "path", "file", "filename")
MAX_STREAM_SHARDS = 64
HEAD_FILES = 16  # that are asked what their pages are
HEAD_IMAGES = 256  # first images of a stream, from which a run's defaults follow


@dataclass(frozen=True)
class Source:
    """Unlabeled images.

    Attributes:
        images: rows `{"image": {"bytes": …, "path": …}}`; a `datasets.IterableDataset` if streaming.
        num_images: images in an epoch.
        head: rows that can be read by number: all of them, or the first ones if streaming.
        streaming: whether rows can only be read in order.
    """

    images: datasets.Dataset | datasets.IterableDataset
    num_images: int
    head: datasets.Dataset
    streaming: bool


def open_source(
    path: str | Sequence[str],
    column: str | None = None,
    streaming: bool = False,
    num_images: int | None = None,
    reading: Reading = STRETCHED,
) -> Source:
    """Open `path` for training.

    Args:
        column: the column of images, in sources that have columns; detected by default.
        streaming: read in order, through a shuffle buffer, without an index or a local copy.
        num_images: images in an epoch of a stream whose length cannot be determined without reading it.
        reading: which pages or files make an image. A stream's rows are files.

    Raises:
        ValueError: if there is nothing to read at `path`, or it has no such column.
    """
    if not streaming:
        images = open_images(path, column, reading)
        return Source(images, len(images), images, streaming=False)
    if reading.channel_files or reading.pages == "images":
        raise ValueError(
            "data.streaming reads files in order, one image each: leave out data.pages images and data.channel_files"
        )
    stream, stated = open_stream(path, column)
    length = num_images or stated
    if not length:
        raise ValueError(f"the number of images in {path!r} is unknown without reading it: give data.count")
    head = dataset_of(list(stream.take(HEAD_IMAGES)))
    if not len(head):
        raise ValueError(f"{path!r} holds no images")
    return Source(stream, length, head, streaming=True)


def open_images(
    path: str | Path | Sequence[str],
    column: str | None = None,
    reading: Reading = STRETCHED,
    setting: str = "data.column",
) -> datasets.Dataset:
    """Open one or several sources as one dataset with a column `image`, undecoded.

    Args:
        column: as of `open_source`.
        reading: which pages or files make an image.
        setting: by which the user names the column, for the error message.

    Raises:
        ValueError: as `open_source`.
    """
    import datasets

    if not isinstance(path, str | os.PathLike):
        if not path:
            raise ValueError(f"no images: give {known_kinds()}")
        parts = [open_images(str(part), column, reading, setting) for part in path]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    reader, files = detect_reader(str(path))
    rows = reader.read(files)
    return arrange(select_images(rows, column, str(path), setting) if reader.has_columns else rows, reading)


def suit_reading(path: str | Path | Sequence[str], known: Reading) -> Reading:
    """How an encoder's images were read, as it suits other images: where its channels were files of their own and no file is
    one by its pattern, each file is an image with all channels, which is a `Notice`. Pages that nothing explains are its
    channels then.

    Args:
        path: as of `open_images`, or of labeled images.
    """
    if not known.channel_files:
        return known
    try:
        parts = [str(path)] if isinstance(path, str | os.PathLike) else list(map(str, path))
        found = [detect_reader(part) for part in parts]
        records = [
            record for reader, files in found if not reader.has_columns for record in iterate_records(reader.read(files))
        ]
    except ValueError:
        return known  # said where they are opened, or they are labels that name images
    paths = [record["path"] or "" for record in records]
    if (not paths and not any(reader.has_columns for reader, _ in found)) or match_channels(paths, known.channel_files):
        return known
    notify(
        f"the encoder's images have their channels in files of their own, {known.channel_files}, and no file here is one: "
        "each is read as an image of all channels"
    )
    single = replace(known, channel_files=None)
    return replace(single, pages="channels") if known.pages is None and not explains_pages(records, single) else single


def explains_pages(records: Sequence[Record], reading: Reading) -> bool:
    """Whether the files say what their pages are, as far as a few tell."""
    for record in records[:HEAD_FILES]:
        try:
            count_images(record, reading)
        except UnexplainedPages:
            return False
        except UNREADABLE:  # told where it is read
            continue
    return True


def open_stream(path: str | Sequence[str], column: str | None) -> tuple[datasets.IterableDataset, int | None]:
    """Open one or several sources as one stream, and its length where that is known.

    Raises:
        ValueError: as `open_source`.
    """
    import datasets

    if not isinstance(path, str | os.PathLike):
        parts = [open_stream(str(part), column) for part in path]
        lengths = [length for _, length in parts]
        stream = parts[0][0] if len(parts) == 1 else datasets.concatenate_datasets([part for part, _ in parts])
        return stream, sum(lengths) if all(lengths) else None  # type: ignore[arg-type]
    reader, files = detect_reader(str(path))
    if not reader.can_stream:
        images = open_images(path, column)
        return images.to_iterable_dataset(num_shards=min(MAX_STREAM_SHARDS, len(images))), len(images)
    stream, length = reader.stream(files)
    return (select_images(stream, column, str(path)) if reader.has_columns else stream), length


def select_images(rows, column: str | None, path: str, setting: str = "data.column"):
    """The column of images alone, undecoded, named `image`.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset`.
        column: its name; detected by default.
        path, setting: of the source, and by which the user names the column, for the error message.

    Raises:
        ValueError: if there is no such column, or none that holds images, with the columns' names.
    """
    import datasets

    features = rows.features or dict.fromkeys(rows.column_names or [])
    if column is None:
        column = detect_image_column(features)
    if column is None or column not in features:
        missing = f"no column {column!r}" if column else "no column of images"
        raise ValueError(f"{path!r} has {missing}: its columns are {', '.join(features)}; give {setting}")
    rows = rows.select_columns([column])
    if column != "image":
        rows = rows.rename_column(column, "image")
    return rows.cast_column("image", datasets.Image(decode=False))


def detect_image_column(features) -> str | None:
    """The column of images: of that type, or of a usual name for bytes or paths."""
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return name
    return next((name for name in IMAGE_COLUMNS if name in features), None)


def dataset_of(rows: list[dict]) -> datasets.Dataset:
    """Rows `{"image": {"bytes", "path"}}` as a dataset in memory."""
    import datasets

    return datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
