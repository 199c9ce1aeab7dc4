"""Readers: one for each kind of source, in a table. A new kind is a reader and a line in `READERS`.

A reader tells whether a location holds its kind, and reads it with the `datasets` library: rows with a column of images, and
with any other columns that the source has.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.dicom_series import find_aside
from simmim.data.index import dataset_from_paths, expand_stores, index_folder, is_image, is_image_name
from simmim.data.left_out import LeftOut
from simmim.data.parts import TRAINING, meaning_of
from simmim.data.slide_files import belonging_files
from simmim.data.zarr_folders import is_zarr
from simmim.hub import look_up, offline
from simmim.messages import counted, first_line, notify

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Location:
    """What lies at a path.

    Attributes:
        path: as the user gave it: a folder, a file, a glob, or the name of something that is not here.
        expanded: `path` with ~ replaced by the home folder.
        is_folder: whether it is a folder.
        entries: paths of what lies in the folder, without hidden entries; else the file, or the files and Zarr folders that
            match the glob; in order.
    """

    path: str
    expanded: str
    is_folder: bool
    entries: tuple[str, ...]

    @property
    def exists(self) -> bool:
        """Whether a folder or a file lies here."""
        return self.is_folder or bool(self.entries)


def locate(path: str) -> Location:
    """Look at `path`.

    Raises:
        ValueError: if `path` is empty, a folder that cannot be read, or a glob that no file matches.
    """
    if not path:
        raise ValueError(f"no images: give {known_kinds()}")
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        try:
            names = sorted(name for name in os.listdir(expanded) if not name.startswith("."))
        except OSError as error:
            raise ValueError(
                f"folder {path!r} cannot be read ({error.strerror}): give one that can, or try again"
            ) from error
        return Location(path, expanded, True, tuple(os.path.join(expanded, name) for name in names))
    if os.path.isfile(expanded):
        return Location(path, expanded, False, (expanded,))
    if any(sign in path for sign in "*?["):
        matches = matching_images(expanded)
        if not matches:
            raise ValueError(f"no file matches {path!r}: give {known_kinds()}")
        return Location(path, expanded, False, tuple(matches))
    return Location(path, expanded, False, ())


def matching_images(pattern: str) -> list[str]:
    """The files and Zarr folders that a glob matches, in order, without what lies in a store, or belongs to a slide, that it
    matches too. Parts of DICOM slides are left to `GlobReader`."""
    matches = sorted(glob.glob(pattern, recursive=True))
    stores = {path for path in matches if is_zarr(path) and os.path.isdir(path)}
    belonging = belonging_files(matches)
    whole = stores | belonging

    def lies_within(path: str) -> bool:
        parent = os.path.dirname(path)
        return parent != path and (parent in whole or lies_within(parent))

    return [path for path in matches if is_image(path) and path not in belonging and not (whole and lies_within(path))]


def detect_reader(path: str) -> tuple[Reader, list[str]]:
    """The reader for `path`, and the files to give it.

    Raises:
        ValueError: if no reader reads what lies there.
    """
    location = locate(path)
    for reader in reversed(READERS.values()):
        files = reader.detect(location)
        if files is not None:
            return reader, files
    if location.exists:
        raise ValueError(f"{path!r} is nothing that images can be read from: give {known_kinds()}")
    raise ValueError(f"{path!r} does not exist: give {known_kinds()}")


def check_sources_exist(paths: str | Path | Sequence[str]) -> None:
    """Check that something may be at each path. Nothing is read, no glob is matched and no hub asked.

    Raises:
        ValueError: as `detect_reader`, for a path that can be no glob and no id either.
    """
    for path in [str(paths)] if isinstance(paths, str | os.PathLike) else map(str, paths):
        glob_or_hub_id = any(sign in path for sign in "*?[") or (path.count("/") == 1 and path[0] not in "/~.")
        if not glob_or_hub_id and not os.path.lexists(os.path.expanduser(path)):
            detect_reader(path)


def known_kinds() -> str:
    """All kinds of sources, for an error message."""
    *others, last = (reader.description for reader in READERS.values())
    return f"{', '.join(others)}, or {last}"


# --- the protocol ------------------------------------------------------------------------------------------------------


class Reader(ABC):
    """Reads one kind of source.

    Attributes:
        description: the kind as error messages name it.
        has_columns: whether rows may hold more than an image, for example a label. Without columns, `read` gives the one
            column `image`, undecoded.
        can_stream: whether `stream` reads rows in order without reading all of them first.
    """

    description: str
    has_columns = True
    can_stream = False

    @abstractmethod
    def detect(self, location: Location) -> list[str] | None:
        """The files, folders or names to read at `location`; None if it is not of this kind."""

    @abstractmethod
    def read(self, files: list[str]) -> datasets.Dataset:
        """The rows; of several splits the training split, or the first one.

        Raises:
            ValueError: if they cannot be read.
        """

    def read_splits(self, files: list[str]) -> dict[str, datasets.Dataset]:
        """The rows by the name of the split; all in "train" if the source has no splits."""
        return {"train": self.read(files)}

    def stream(self, files: list[str]) -> tuple[datasets.IterableDataset, int | None]:
        """The rows of `read` in order, and their number if it is known. For readers that can stream."""
        raise NotImplementedError


# --- image files -------------------------------------------------------------------------------------------------------


class FolderReader(Reader):
    """A folder of images, nested in any way."""

    description = "a folder of images"
    has_columns = False

    def detect(self, location: Location) -> list[str] | None:
        return [location.path] if location.is_folder else None

    def read(self, files: list[str]) -> datasets.Dataset:
        return index_folder(files[0])


class GlobReader(Reader):
    """Image files: those that match a glob, or a single one."""

    description = "a glob"
    has_columns = False

    def detect(self, location: Location) -> list[str] | None:
        if location.is_folder or not any(map(is_image_name, location.entries)):
            return None
        return [location.expanded]

    def read(self, files: list[str]) -> datasets.Dataset:
        pattern, left_out, images = files[0], LeftOut(), []
        entries = locate(pattern).entries
        aside = find_aside(entries) if len(entries) > 1 else {}  # a file that is given alone is meant
        left_out.slide_parts.update(aside.values())
        for path in entries:
            if path in aside:
                continue
            if is_image_name(path):
                images.append(path)
            else:
                left_out.count(path)
        for folder in searched_folders(pattern):
            try:
                os.scandir(folder).close()
            except OSError as error:
                left_out.deny(folder, error)
        left_out.report(pattern)
        return dataset_from_paths(expand_stores(images))


class ListReader(Reader):
    """A text file of paths, one per line, relative ones to the file's folder. Blank lines and # comments are ignored."""

    description = "a text file of paths"
    has_columns = False

    def detect(self, location: Location) -> list[str] | None:
        is_list = location.entries == (location.expanded,) and location.expanded.endswith(".txt")
        return [location.expanded] if is_list else None

    def read(self, files: list[str]) -> datasets.Dataset:
        file = files[0]
        parent = os.path.dirname(os.path.abspath(file))
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file!r} is no text file of paths: {error}") from error
        paths = [os.path.join(parent, line.strip()) for line in lines if line.strip() and not line.startswith("#")]
        if not paths:
            raise ValueError(f"{file!r} lists no images: give one path per line")
        return dataset_from_paths(expand_stores(paths))


def searched_folders(pattern: str) -> set[str]:
    """The folders whose entries a glob looks at. The glob passes over those that it cannot read without a word."""
    if not glob.has_magic(pattern) or os.path.isfile(pattern):
        return set()
    parent = os.path.dirname(pattern)
    folders = glob.glob(parent, recursive=True) if glob.has_magic(parent) else [parent or os.curdir]
    return {folder for folder in folders if os.path.isdir(folder)} | searched_folders(parent)


# --- rows with columns, read by the datasets library -------------------------------------------------------------------


class ShardReader(Reader):
    """Files of one format of the `datasets` library: one, those that match a glob, or a folder with nothing else to read.

    Args:
        format: the library's name of the format.
        extension: of the files' names.
        description: as error messages name it.
    """

    can_stream = True

    def __init__(self, format: str, extension: str, description: str) -> None:
        self.format, self.extension, self.description = format, extension, description

    def detect(self, location: Location) -> list[str] | None:
        if not location.is_folder:
            extensions = {os.path.splitext(path)[1].lower() for path in location.entries}
            return list(location.entries) if extensions == {self.extension} else None
        if any(is_image_name(path) or os.path.isdir(path) for path in location.entries):
            return None
        return [path for path in location.entries if path.endswith(self.extension)] or None

    def read(self, files: list[str]) -> datasets.Dataset:
        return self._load(files, streaming=False)

    def read_splits(self, files: list[str]) -> dict[str, datasets.Dataset]:
        """The rows by the part that the files' names tell: train-00000.parquet, test.parquet."""
        by_part = divide_files(files)
        return {part: self.read(its_files) for part, its_files in by_part.items()} or {"train": self.read(files)}

    def stream(self, files: list[str]) -> tuple[datasets.IterableDataset, int | None]:
        rows = self._load(files, streaming=True)
        return rows, self.count_rows(files, rows)

    def count_rows(self, files: list[str], rows: datasets.IterableDataset) -> int | None:
        """The number of rows, where it is known without reading all of them."""
        return stated_length(rows)

    def _load(self, files: list[str], streaming: bool):
        datasets = import_datasets()
        with as_value_error(f"{files[0]!r} cannot be read as {self.format}: {{error}}"):
            return datasets.load_dataset(self.format, data_files={"train": files}, split="train", streaming=streaming)


class ParquetReader(ShardReader):
    """Parquet files, whose metadata state the number of rows."""

    def count_rows(self, files: list[str], rows: datasets.IterableDataset) -> int | None:
        import pyarrow.parquet

        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


class WebDatasetReader(ShardReader):
    """WebDataset tar shards, whose headers are counted."""

    def count_rows(self, files: list[str], rows: datasets.IterableDataset) -> int | None:
        return sum(map(count_tar_samples, files))


class SavedReader(Reader):
    """A folder written by `save_to_disk` of a `datasets.Dataset` or `DatasetDict`."""

    description = "a saved datasets folder"

    def detect(self, location: Location) -> list[str] | None:
        names = {os.path.basename(path) for path in location.entries} if location.is_folder else set()
        is_saved = "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names
        return [location.expanded] if is_saved else None

    def read(self, files: list[str]) -> datasets.Dataset:
        splits = self.read_splits(files)
        train = next((name for name in splits if meaning_of(name) == TRAINING), next(iter(splits)))
        if others := [f"{name} ({counted(len(rows), 'image')})" for name, rows in splits.items() if name != train]:
            notify(f"of {files[0]!r} the split {train} is read; left aside: {', '.join(others)}")
        return splits[train]

    def read_splits(self, files: list[str]) -> dict[str, datasets.Dataset]:
        with as_value_error(f"{files[0]!r} cannot be read as saved: {{error}}"):
            saved = import_datasets().load_from_disk(files[0])
        return dict(saved) if isinstance(saved, dict) else {"train": saved}


class HubReader(Reader):
    """A dataset of the Hugging Face hub."""

    description = "a hub id (owner/name)"
    can_stream = True

    def detect(self, location: Location) -> list[str] | None:
        is_id = not location.exists and HUB_ID.fullmatch(location.path)
        return [location.path] if is_id and not os.path.exists(os.path.dirname(location.expanded)) else None

    def read(self, files: list[str]) -> datasets.Dataset:
        return self._load(files, split="train")

    def read_splits(self, files: list[str]) -> dict[str, datasets.Dataset]:
        return dict(self._load(files))

    def stream(self, files: list[str]) -> tuple[datasets.IterableDataset, int | None]:
        rows = self._load(files, split="train", streaming=True)
        return rows, stated_length(rows)

    def _load(self, files: list[str], **options):
        datasets = import_datasets()
        message = (
            f"{files[0]!r} is no file or folder here, and as a hub id it cannot be loaded ({{error}}): without network give "
            "a local copy, made elsewhere by datasets.load_dataset(…).save_to_disk(FOLDER)"
        )
        with as_value_error(message):
            found = look_up(files[0], "dataset")
            # Without a connection the library would ask for half a minute.
            with contextlib.nullcontext() if found else offline():
                return datasets.load_dataset(files[0], **options)


def divide_files(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by the part that their names tell; none if no name tells one.

    Raises:
        ValueError: if some names tell a part and others do not.
    """
    by_part: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", os.path.splitext(os.path.basename(file))[0].lower())
        told = {word for word in words if meaning_of(word)}
        by_part.setdefault(told.pop() if len(told) == 1 else "", []).append(file)
    unclear = by_part.pop("", [])
    if unclear and by_part:
        others = ", ".join(os.path.basename(files[0]) for files in by_part.values())
        raise ValueError(
            f"{os.path.basename(unclear[0])!r} lies beside {others}, and its name does not tell its part: rename it "
            "(train-…, val-…, test-…), or give the files of one part"
        )
    return by_part


def import_datasets():
    """The `datasets` library, without its telemetry: by default it reports every call of load_dataset to a server, even for
    local files."""
    import datasets
    import huggingface_hub

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    return datasets


@contextlib.contextmanager
def as_value_error(message: str) -> Iterator[None]:
    """Turn any exception into a ValueError with `message`, in which {error} becomes the exception's first line. The
    datasets library raises most kinds of exceptions, its own and those of what it builds on."""
    try:
        yield
    except Exception as error:
        raise ValueError(message.replace("{error}", first_line(error))) from error


def stated_length(rows: datasets.IterableDataset) -> int | None:
    """The number of rows that a stream's description states, if any."""
    splits = getattr(rows.info, "splits", None) or {}
    return getattr(splits.get("train"), "num_examples", None)


def count_tar_samples(file: str) -> int:
    """Samples of a WebDataset shard: the members' names up to the first dot, each counted once. Reads headers only.

    Raises:
        ValueError: if the file is no tar file.
    """
    import tarfile

    try:
        with tarfile.open(file) as shard:
            names = [member.name for member in shard if member.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{file!r} cannot be read as a tar shard: {error}") from error
    return len({os.path.join(os.path.dirname(name), os.path.basename(name).split(".")[0]) for name in names})


# From the most general kind to the most special. A location is offered to the last reader first: a folder of Parquet files
# is also a folder.
READERS: dict[str, Reader] = {
    "folder": FolderReader(),
    "glob": GlobReader(),
    "list": ListReader(),
    "arrow": ShardReader("arrow", ".arrow", "Arrow files"),
    "parquet": ParquetReader("parquet", ".parquet", "Parquet files"),
    "webdataset": WebDatasetReader("webdataset", ".tar", "WebDataset tar shards"),
    "saved": SavedReader(),
    "hub": HubReader(),
}
