"""An index of a folder's images: one scan, kept as Arrow, and checked against the folder when it is used again.

A million paths are one memory-mapped file that all loading processes share, and no Python objects.
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
# A folder changed so shortly before it was scanned may change again without its time stamp showing it.
TOO_FRESH_S = 2.0


class Scan:
    """Walks a folder in the order of its images' paths; afterwards knows the folders' time stamps and other files.

    Symbolic links are followed, every folder is entered once, hidden files and folders are left out.

    Attributes:
        stamps: time of last change, in ns, of every folder seen; of one too fresh to be trusted −1.
        others: files that have no image's extension.
        denied: folders that could not be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.stamps: dict[str, int] = {}
        self.others, self.denied = 0, []
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
                # A folder sorts with its slash, so that the whole comes out in the order of the paths.
                listed = sorted(
                    (entry.name + "/" if is_folder else entry.name, entry.path, is_folder)
                    for entry in entries
                    if not entry.name.startswith(".")
                    for is_folder in (entry.is_dir(),)
                )
        except OSError:
            self.denied.append(folder)
            return
        trusted = time.time() - status.st_mtime > TOO_FRESH_S
        self.stamps[folder] = status.st_mtime_ns if trusted else -1
        for name, path, is_folder in listed:
            if is_folder:
                yield from self._walk(path)
            elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                if not path.isprintable() and path != path.encode("utf-8", "ignore").decode("utf-8"):
                    raise ValueError(f"file name {path!r} is not valid UTF-8: rename the file")
                yield path
            else:
                self.others += 1


def index_folder(folder: str | Path) -> datasets.Dataset:
    """All images below `folder` as a `datasets.Dataset` with an undecoded column `image`, in the order of their paths.

    The index is kept in the user's cache folder and used again as long as no folder of the tree has changed.

    Raises:
        ValueError: when there is no such folder, it is empty, or it holds no image.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    root = os.path.abspath(folder)
    place = cache_folder() / hashlib.sha256(root.encode()).hexdigest()[:24]
    kept = read_kept(place, root)
    if kept is not None:
        return kept
    scan = Scan(root)
    try:
        (place.parent).mkdir(parents=True, exist_ok=True)
        with atomic_write(place.with_suffix(".arrow")) as temporary:
            count = write_paths(temporary, scan)
            if not count:
                raise ValueError(nothing_found(folder, scan))
        write_json(place.with_suffix(".json"), {"version": VERSION, "root": root, "count": count, "stamps": scan.stamps})
    except OSError:  # no cache to be had: the index lives in memory, for this run
        return dataset_from_paths(list(Scan(root)))
    return read_arrow(place)


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
        raise ValueError(nothing_found(folder, scan))
    return paths


def check_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        ValueError: saying what it is.
    """
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"image folder {str(folder)!r} {what}: give a folder that holds images")


def nothing_found(folder: Path, scan: Scan) -> str:
    """Why a folder gives no images."""
    if scan.denied:
        what = f"cannot be read ({scan.denied[0]})"
    else:
        what = f"holds {scan.others} file{'s' * (scan.others != 1)} but no image" if scan.others else "is empty"
    kinds = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
    return f"image folder {str(folder)!r} {what}: give one with images ({kinds}), nested as you like"


def cache_folder() -> Path:
    """Where indices are kept: $XDG_CACHE_HOME/simmim/index, by default ~/.cache/simmim/index."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "simmim" / "index"


def read_kept(place: Path, root: str) -> datasets.Dataset | None:
    """The kept index of `root`, or None where there is none or a folder has changed since."""
    try:
        about = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        if about["version"] != VERSION or about["root"] != root:
            return None
        if any(os.stat(path).st_mtime_ns != stamp for path, stamp in about["stamps"].items()):
            return None
        index = read_arrow(place)
        return index if len(index) == about["count"] else None
    except (OSError, ValueError, KeyError):
        return None


def read_arrow(place: Path) -> datasets.Dataset:
    """The index at `place`, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(place.with_suffix(".arrow")))


def write_paths(file: Path, paths: Iterable[str]) -> int:
    """Write paths as the rows of an Arrow file and return how many there were; few are in memory at a time."""
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    features = datasets.Features({"image": datasets.Image(decode=False)})
    count, waiting = 0, []

    def write() -> None:
        column = pa.array(waiting, pa.string())
        nothing = pa.nulls(len(waiting), pa.binary())
        table = pa.table({"image": pa.StructArray.from_arrays([nothing, column], ["bytes", "path"])})
        writer.write_table(table, writer_batch_size=ROWS_AT_ONCE)
        waiting.clear()

    with ArrowWriter(path=str(file), features=features) as writer:
        for path in paths:
            waiting.append(path)
            count += 1
            if len(waiting) == ROWS_AT_ONCE:
                write()
        if waiting:
            write()
        if count:
            writer.finalize()
    return count


def dataset_from_paths(paths: list[str], labels: list[int] | None = None) -> datasets.Dataset:
    """Paths as a dataset with a column `image`, undecoded, and a column `label` where there are labels."""
    import datasets

    columns = {"image": paths} | ({"label": labels} if labels is not None else {})
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
