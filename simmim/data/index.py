"""An index of a folder's images: one scan, stored as an Arrow file, and validated against the folder when it is used again.

A million paths are one memory-mapped file that all loading processes share, without Python objects.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.files import atomic_write, write_json

if TYPE_CHECKING:
    import datasets

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif", ".npy")
)
VERSION = 1
ROWS_AT_ONCE = 100_000
# A folder that changed this shortly before its scan may change again within the same tick of its time stamp.
TRUSTED_AGE_S = 2.0


class Scan:
    """Walks a folder in the order of its images' paths; afterwards holds the folders' time stamps and the other files.

    Symbolic links are followed, every folder is entered once, hidden files and folders are left out.

    Attributes:
        stamps: time of the last change, in ns, of every folder entered; −1 for a folder that changed just before.
        num_others: files without an image's extension.
        denied: folders that could not be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.stamps: dict[str, int] = {}
        self.num_others = 0
        self.denied: list[str] = []
        self._entered: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[str]:
        yield from self._walk(self.folder)

    def _walk(self, folder: str) -> Iterator[str]:
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self._entered:
                return
            self._entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                # A folder sorts with its slash, so that all paths come out in their order.
                children = sorted(
                    (entry.name + "/" if is_folder else entry.name, entry.path, is_folder)
                    for entry in entries
                    if not entry.name.startswith(".")
                    for is_folder in (entry.is_dir(),)
                )
        except OSError:
            self.denied.append(folder)
            return
        trusted = time.time() - status.st_mtime > TRUSTED_AGE_S
        self.stamps[folder] = status.st_mtime_ns if trusted else -1
        for name, path, is_folder in children:
            if is_folder:
                yield from self._walk(path)
            elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                if not path.isprintable() and path != path.encode("utf-8", "ignore").decode("utf-8"):
                    raise ValueError(f"file name {path!r} is not valid UTF-8: rename the file")
                yield path
            else:
                self.num_others += 1


def index_folder(folder: str | Path) -> datasets.Dataset:
    """All images below `folder` as a `datasets.Dataset` with an undecoded column `image`, in the order of their paths.

    The index is stored in the user's cache folder and used again as long as no folder of the tree has changed.

    Raises:
        ValueError: if there is no such folder, it is empty, or it holds no image.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    root = os.path.abspath(folder)
    stem = cache_folder() / hashlib.sha256(root.encode()).hexdigest()[:24]
    cached = read_cached_index(stem, root)
    if cached is not None:
        return cached
    scan = Scan(root)
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(stem.with_suffix(".arrow")) as temporary:
            count = write_paths(temporary, scan)
            if not count:
                raise ValueError(explain_no_images(folder, scan))
        write_json(stem.with_suffix(".json"), {"version": VERSION, "root": root, "count": count, "stamps": scan.stamps})
    except OSError:  # the cache folder cannot be written: the index lives in memory, for this run
        return dataset_from_paths(list(Scan(root)))
    return read_arrow(stem)


def find_images(folder: str | Path) -> list[str]:
    """Paths of all images below `folder`, in their order, without an index.

    Raises:
        ValueError: as `index_folder`.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    scan = Scan(folder)
    paths = list(scan)
    if not paths:
        raise ValueError(explain_no_images(folder, scan))
    return paths


def check_folder(folder: Path) -> None:
    """Refuse a path that is no folder.

    Raises:
        ValueError: with what it is.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"image folder {str(folder)!r} {problem}: give a folder that holds images")


def explain_no_images(folder: Path, scan: Scan) -> str:
    """Why a folder gives no images."""
    if scan.denied:
        problem = f"cannot be read ({scan.denied[0]})"
    elif scan.num_others:
        problem = f"holds {scan.num_others} file{'s' * (scan.num_others != 1)} but no image"
    else:
        problem = "is empty"
    extensions = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
    return f"image folder {str(folder)!r} {problem}: give one with images ({extensions}), nested as you like"


def cache_folder() -> Path:
    """The folder of all indices: $XDG_CACHE_HOME/simmim/index, by default ~/.cache/simmim/index."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "simmim" / "index"


def read_cached_index(stem: Path, root: str) -> datasets.Dataset | None:
    """The stored index of `root`; None if there is none or a folder has changed since.

    Args:
        stem: path of the index's two files, without their extensions.
    """
    try:
        description = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        if description["version"] != VERSION or description["root"] != root:
            return None
        if any(os.stat(path).st_mtime_ns != stamp for path, stamp in description["stamps"].items()):
            return None
        index = read_arrow(stem)
        return index if len(index) == description["count"] else None
    except (OSError, ValueError, KeyError):
        return None


def read_arrow(stem: Path) -> datasets.Dataset:
    """The index at `stem`, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(stem.with_suffix(".arrow")))


def write_paths(file: Path, paths: Iterable[str]) -> int:
    """Write paths as the rows of an Arrow file and return their number. At most `ROWS_AT_ONCE` are in memory."""
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    features = datasets.Features({"image": datasets.Image(decode=False)})
    count = 0
    pending: list[str] = []

    def write() -> None:
        column = pa.array(pending, pa.string())
        no_bytes = pa.nulls(len(pending), pa.binary())
        table = pa.table({"image": pa.StructArray.from_arrays([no_bytes, column], ["bytes", "path"])})
        writer.write_table(table, writer_batch_size=ROWS_AT_ONCE)
        pending.clear()

    with ArrowWriter(path=str(file), features=features) as writer:
        for path in paths:
            pending.append(path)
            count += 1
            if len(pending) == ROWS_AT_ONCE:
                write()
        if pending:
            write()
        if count:
            writer.finalize()
    return count


def dataset_from_paths(paths: list[str], labels: list[int] | None = None) -> datasets.Dataset:
    """Paths as a dataset with a column `image`, undecoded, and a column `label` if there are labels."""
    import datasets

    columns = {"image": paths} | ({"label": labels} if labels is not None else {})
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
