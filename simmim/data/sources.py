"""Where images come from: every source becomes a `datasets.Dataset`, or a stream, with an undecoded column `image`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.index import EXTENSIONS, dataset_from_paths, index_folder

if TYPE_CHECKING:
    import datasets

KINDS = (
    "a folder of images, a glob, a text file of paths, Parquet or Arrow files, WebDataset tar shards, a saved datasets "
    "folder, or a hub id (owner/name)"
)
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "path", "file", "filename")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Looked at for a run's defaults where a source can only be read from its beginning.
HEAD_OF_STREAM = 256


@dataclass(frozen=True)
class Source:
    """Unlabeled images, wherever they come from.

    Attributes:
        images: rows `{"image": {"bytes": …, "path": …}}`; a `datasets.IterableDataset` when streaming.
        num_images: images in an epoch.
        head: some of the rows, by number; all of them unless streaming.
        streaming: whether rows come in their order only.
    """

    images: datasets.Dataset | datasets.IterableDataset
    num_images: int
    head: datasets.Dataset
    streaming: bool


def open_source(
    path: str | Sequence[str], column: str | None = None, streaming: bool = False, count: int | None = None
) -> Source:
    """Open `path` for training.

    Args:
        column: which holds the images, in sources that have columns; found by default.
        streaming: read in order, through a shuffle buffer, without an index or a local copy.
        count: images in an epoch of a stream whose length cannot be told without reading it.

    Raises:
        ValueError: when there is nothing to read at `path`, or it has no such column.
    """
    if not streaming:
        images = open_images(path, column)
        return Source(images, len(images), images, streaming=False)
    stream, known = open_stream(path, column)
    length = count or known
    if not length:
        raise ValueError(f"how many images {path!r} holds cannot be told without reading it: give data.count")
    head = dataset_of(list(stream.take(HEAD_OF_STREAM)))
    if not len(head):
        raise ValueError(f"{path!r} holds no images")
    return Source(stream, length, head, streaming=True)


def open_images(path: str | Sequence[str], column: str | None = None) -> datasets.Dataset:
    """Open one or several sources as one dataset with a column `image`.

    Raises:
        ValueError: as `open_source`.
    """
    import datasets

    if not isinstance(path, str | os.PathLike):
        if not path:
            raise ValueError(f"no images: give {KINDS}")
        parts = [open_images(str(one), column) for one in path]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    kind, files = classify(str(path))
    if kind == "folder":
        return index_folder(path)
    if kind == "paths":
        return dataset_from_paths(files)
    return image_column(load(kind, files), column, str(path))


def open_stream(path: str | Sequence[str], column: str | None) -> tuple[datasets.IterableDataset, int | None]:
    """Open one or several sources as one stream, and its length where that is known."""
    import datasets

    if not isinstance(path, str | os.PathLike):
        parts = [open_stream(str(one), column) for one in path]
        lengths = [length for _, length in parts]
        stream = parts[0][0] if len(parts) == 1 else datasets.concatenate_datasets([part for part, _ in parts])
        return stream, sum(lengths) if all(lengths) else None
    kind, files = classify(str(path))
    if kind in ("folder", "paths", "saved"):
        images = open_images(path, column)
        return images.to_iterable_dataset(num_shards=min(64, len(images))), len(images)
    stream = image_column(load(kind, files, streaming=True), column, str(path))
    return stream, known_length(kind, files, stream)


def classify(path: str) -> tuple[str, list[str]]:
    """What `path` is: folder, paths, parquet, arrow, webdataset, saved or hub, and its files.

    Raises:
        ValueError: when it is none of them.
    """
    expanded = os.path.expanduser(path)
    if not path:
        raise ValueError(f"no images: give {KINDS}")
    if os.path.isdir(expanded):
        return classify_folder(expanded)
    if os.path.isfile(expanded):
        if expanded.endswith(".txt"):
            return "paths", listed_paths(expanded)
        return kind_of_files([expanded], path), [expanded]
    if any(sign in path for sign in "*?["):
        files = sorted(file for file in glob.glob(expanded, recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"no file matches {path!r}: give {KINDS}")
        images = [file for file in files if os.path.splitext(file)[1].lower() in EXTENSIONS]
        return ("paths", images) if images else (kind_of_files(files, path), files)
    if HUB_ID.fullmatch(path) and not os.path.exists(os.path.dirname(expanded)):
        return "hub", [path]
    raise ValueError(f"{path!r} does not exist: give {KINDS}")


def classify_folder(folder: str) -> tuple[str, list[str]]:
    """A folder is a saved dataset, a folder of shards where these are all it holds, or else a folder of images."""
    names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return "saved", [folder]
    files = [os.path.join(folder, name) for name in names if not name.startswith(".")]
    for ending, kind in ((".tar", "webdataset"), (".parquet", "parquet"), (".arrow", "arrow")):
        shards = [file for file in files if file.endswith(ending)]
        if shards and not any(os.path.splitext(file)[1].lower() in EXTENSIONS or os.path.isdir(file) for file in files):
            return kind, shards
    return "folder", [folder]


def kind_of_files(files: list[str], path: str) -> str:
    """The one kind that all of `files` are, by their names.

    Raises:
        ValueError: when there is no such kind.
    """
    kinds = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
    kinds |= dict.fromkeys(EXTENSIONS, "paths")
    found = {kinds.get(os.path.splitext(file)[1].lower()) for file in files}
    if len(found) != 1 or None in found:
        raise ValueError(f"{path!r} is nothing that images can be read from: give {KINDS}")
    return found.pop()


def listed_paths(file: str) -> list[str]:
    """Paths from a text file, one a line, relative ones to the file's own folder; blank lines and # comments are left
    out.

    Raises:
        ValueError: when it lists none, or is no text.
    """
    home = os.path.dirname(os.path.abspath(file))
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file!r} is no text file of paths: {error}") from error
    paths = [os.path.join(home, line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    if not paths:
        raise ValueError(f"{file!r} lists no images: give one path a line")
    return paths


def without_telemetry():
    """The datasets library, which by default tells a server of every call of load_dataset, even on local files."""
    import datasets
    import huggingface_hub

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    return datasets


def load(kind: str, files: list[str], streaming: bool = False):
    """Read a source that has columns, as a dataset or a stream.

    Raises:
        ValueError: when it cannot be read, or the hub cannot be reached.
    """
    datasets = without_telemetry()

    try:
        if kind == "saved":
            saved = datasets.load_from_disk(files[0])
            return first_split(saved) if isinstance(saved, dict) else saved
        if kind == "hub":
            return datasets.load_dataset(files[0], split="train", streaming=streaming)
        return datasets.load_dataset(kind, data_files={"train": files}, split="train", streaming=streaming)
    except Exception as error:  # datasets raises most kinds of exception, its own and those of what it builds on
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if kind == "hub":
            raise ValueError(
                f"{files[0]!r} is no file or folder here, and as a hub id it cannot be had ({first}): without network give "
                "a local copy, made elsewhere by datasets.load_dataset(…).save_to_disk(FOLDER)"
            ) from error
        raise ValueError(f"{files[0]!r} cannot be read as {kind}: {first}") from error


def first_split(splits):
    """The training split, or the only one."""
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def image_column(data, column: str | None, path: str):
    """`data` with the one column `image`, undecoded.

    Raises:
        ValueError: when there is no such column, or none that holds images, listing the columns.
    """
    import datasets

    features = data.features or dict.fromkeys(data.column_names or [])
    if column is None:
        column = found_column(features)
    if column is None or column not in features:
        asked = f"no column {column!r}" if column else "no column of images"
        raise ValueError(f"{path!r} has {asked}: its columns are {', '.join(features)}; give data.column")
    data = data.select_columns([column])
    if column != "image":
        data = data.rename_column(column, "image")
    return data.cast_column("image", datasets.Image(decode=False))


def found_column(features) -> str | None:
    """The column of images: of that type, or of a usual name with bytes or paths in it."""
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return name
    return next((name for name in IMAGE_COLUMNS if name in features), None)


def known_length(kind: str, files: list[str], stream) -> int | None:
    """How many rows a stream has, where files or their description tell without reading all of it."""
    if kind == "parquet":
        import pyarrow.parquet

        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    if kind == "webdataset":
        return sum(map(samples_in_tar, files))
    splits = getattr(stream.info, "splits", None) or {}
    return getattr(splits.get("train"), "num_examples", None)


def samples_in_tar(file: str) -> int:
    """Samples of a WebDataset shard: its members' names up to the first dot, counted once. Reads headers alone."""
    import tarfile

    try:
        with tarfile.open(file) as shard:
            names = [member.name for member in shard if member.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{file!r} cannot be read as a tar shard: {error}") from error
    return len({os.path.join(os.path.dirname(name), os.path.basename(name).split(".")[0]) for name in names})


def dataset_of(rows: list[dict]) -> datasets.Dataset:
    """Rows `{"image": {"bytes", "path"}}` as a dataset in memory."""
    import datasets

    return datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
