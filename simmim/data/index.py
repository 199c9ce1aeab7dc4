"""An index of a folder's images: one scan, stored as an Arrow file, and validated against the folder when it is used again.

A million paths are one memory-mapped file that all loading processes share, without Python objects.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.data.dicom_series import find_aside
from simmim.data.left_out import LeftOut
from simmim.data.slide_files import belonging_files
from simmim.data.zarr_folders import images_in_zarr, is_zarr
from simmim.files import atomic_write, write_json
from simmim.messages import counted

if TYPE_CHECKING:
    import datasets

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
        ".npy",
        ".dcm",
        ".heic",
        ".heif",
        ".svs",
        ".ndpi",
        ".scn",
        ".bif",
        ".btf",
        ".qptiff",
        ".zarr",
        ".mrxs",
        ".vms",
        ".vmu",
        ".svslide",
        ".czi",
    ]
)
VERSION = 7
ROWS_AT_ONCE = 100_000
# A folder that changed this shortly before its scan may change again within the same tick of its time stamp.
TRUSTED_AGE_S = 2.0


class Scan:
    """Walks a folder in the order of its images' paths; afterwards holds the folders' time stamps and the other files.

    Symbolic links are followed, every folder is entered once, hidden files and folders are left out, and those that
    belong to a slide, or are its label or a coarser level. Of a Zarr folder the images are given, and nothing else is looked
    at.

    Attributes:
        stamps: time of the last change, in ns, of every folder entered, and of the files by which the images of Zarr folders
            are known; −1 for one that changed just before.
        left_out: the folders that could not be read, the files without an image's extension, and parts of slides.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.stamps: dict[str, int] = {}
        self.left_out = LeftOut()
        self._entered: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[str]:
        yield from self._store(self.folder) if is_zarr(self.folder) else self._walk(self.folder)

    def _store(self, folder: str) -> Iterator[str]:
        """The images of a Zarr folder, or in one."""
        with contextlib.suppress(OSError):  # one that cannot be read is denied below
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self._entered:
                return
            self._entered.add((status.st_dev, status.st_ino))
        for path in images_in_zarr(folder, self._stamp, self.left_out.deny):
            check_name(path)
            yield path

    def _stamp(self, path: str) -> None:
        """Note when a folder or file was changed."""
        try:
            changed_ns = os.stat(path).st_mtime_ns
        except OSError:  # missing: it may appear
            changed_ns = -1
        self.stamps[path] = changed_ns if time.time() - changed_ns / 1e9 > TRUSTED_AGE_S else -1

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
                    for is_folder in (is_folder_entry(entry),)
                )
        except OSError as error:
            self.left_out.deny(folder, error)
            return
        trusted = time.time() - status.st_mtime > TRUSTED_AGE_S
        self.stamps[folder] = status.st_mtime_ns if trusted else -1
        files = [path for _, path, is_folder in children if not is_folder]
        belonging, aside = belonging_files(files), find_aside(files)
        self.left_out.slide_parts.update(aside.values())
        for name, path, is_folder in children:
            if path in belonging or path in aside:
                continue
            if is_folder:
                yield from self._store(path) if is_zarr(path) else self._walk(path)
            elif is_image_name(name):
                check_name(path)
                yield path
            else:
                self._leave_out(path)

    def _leave_out(self, path: str) -> None:
        """Count an entry that is no image; a link whose target cannot be reached may be to a folder of images."""
        if os.path.islink(path):
            try:
                os.stat(path)
            except OSError as error:
                self.left_out.deny(path, error)
                return
        self.left_out.count(path)


def check_name(path: str) -> None:
    """Refuse a path that a data set cannot hold.

    Raises:
        ValueError: naming it.
    """
    if not path.isprintable() and path != path.encode("utf-8", "ignore").decode("utf-8"):
        raise ValueError(f"file name {path!r} is not valid UTF-8: rename the file")


def is_folder_entry(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; False for a link whose target cannot be reached."""
    try:
        return entry.is_dir()
    except OSError:
        if entry.is_symlink():
            return False
        raise


def is_image_name(path: str) -> bool:
    """Whether the name has an image's extension, or is of something in a Zarr folder."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS or is_zarr(path)


def is_image(path: str) -> bool:
    """Whether a file lies at `path`, or a Zarr folder, of which no file is an image."""
    if os.path.isdir(path):
        return is_zarr(path)
    return os.path.isfile(path) and not is_zarr(os.path.dirname(path))


def expand_stores(paths: Iterable[str]) -> list[str]:
    """Paths of images, each of a Zarr folder replaced by those of the images in it."""
    return [image for path in paths for image in (images_in_zarr(path) if is_zarr(path) else (path,))]


def index_folder(folder: str | Path) -> datasets.Dataset:
    """All images below `folder` as a `datasets.Dataset` with an undecoded column `image`, in the order of their paths.

    The index is stored in the user's cache folder and used again as long as no folder of the tree has changed. An index that
    lacks a folder, because that could not be read, serves this call alone and is not stored. What is left out is a `Notice`.

    Raises:
        ValueError: if there is no such folder, it cannot be read, is empty, or holds no image.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    root = os.path.abspath(folder)
    stem = cache_folder() / hashlib.sha256(root.encode()).hexdigest()[:24]
    index, left_out = read_cached_index(stem, root) or build_index(stem, root)
    if not len(index):
        raise ValueError(explain_no_images(folder, left_out))
    left_out.report(str(folder))
    return index


def build_index(stem: Path, root: str) -> tuple[datasets.Dataset, LeftOut]:
    """Scan `root`, and store the index if it is complete and the cache folder can be written.

    Args:
        stem: path of the index's two files, without their extensions.
    """
    import tempfile

    scan = Scan(root)
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        # Not in place of an older index: that one is valid again once all folders can be read as before.
        with tempfile.TemporaryDirectory(prefix=f".{stem.name}.", dir=stem.parent) as temporary:
            file = Path(temporary) / "index.arrow"
            count = write_paths(file, scan)
            if not count:
                return dataset_from_paths([]), scan.left_out
            if scan.left_out.denied:
                return read_arrow(file, in_memory=True), scan.left_out
            with atomic_write(stem.with_suffix(".arrow")) as complete:
                file.replace(complete)
        left_out = {"endings": scan.left_out.endings, "slide_parts": scan.left_out.slide_parts}
        description = {"count": count, "stamps": scan.stamps, **left_out, **made_by()}
        write_json(stem.with_suffix(".json"), {"root": root, **description})
        return read_arrow(stem.with_suffix(".arrow")), scan.left_out
    except OSError:  # the cache folder cannot be written: the index lives in memory, for this run
        scan = Scan(root)
        return dataset_from_paths(list(scan)), scan.left_out


def find_images(folder: str | Path, left_out: LeftOut | None = None) -> list[str]:
    """Paths of all images below `folder`, in their order, without an index.

    Args:
        left_out: takes what is left out, for a report of several folders; by default it is a `Notice` at once.

    Raises:
        ValueError: as `index_folder`.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    scan = Scan(folder)
    paths = list(scan)
    if not paths:
        raise ValueError(explain_no_images(folder, scan.left_out))
    if left_out is None:
        scan.left_out.report(str(folder))
    else:
        left_out.add(scan.left_out)
    return paths


def count_images(folder: str | Path) -> int:
    """The number of images below `folder`; 0 for none."""
    return sum(1 for _ in Scan(folder))


def check_folder(folder: Path) -> None:
    """Refuse a path that is no folder.

    Raises:
        ValueError: with what it is.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"image folder {str(folder)!r} {problem}: give a folder that holds images")


def explain_no_images(folder: Path, left_out: LeftOut) -> str:
    """Why a folder gives no images."""
    if left_out.denied:
        path, reason = next(iter(left_out.denied.items()))
        problem = f"cannot be read ({path}: {reason})"
    elif left_out.slide_parts:
        named = ", ".join(counted(count, part) for part, count in left_out.slide_parts.items())
        problem = f"holds no slide, but what lies beside DICOM slides: {named}"
    elif left_out.num_files:
        problem = f"holds {counted(left_out.num_files, 'file')} but no image"
    else:
        problem = "is empty"
    extensions = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
    return f"image folder {str(folder)!r} {problem}: give one with images ({extensions}), nested as you like"


def cache_folder() -> Path:
    """The folder of all indices: $XDG_CACHE_HOME/simmim/index, by default ~/.cache/simmim/index."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "simmim" / "index"


def read_cached_index(stem: Path, root: str) -> tuple[datasets.Dataset, LeftOut] | None:
    """The stored index of `root`, and what it leaves out; None if there is none or a folder has changed since.

    Args:
        stem: path of the index's two files, without their extensions.
    """
    try:
        description = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        if description["root"] != root or not made_by().items() <= description.items():
            return None
        if any(os.stat(path).st_mtime_ns != stamp for path, stamp in description["stamps"].items()):
            return None
        index = read_arrow(stem.with_suffix(".arrow"))
        left_out = LeftOut(endings=Counter(description["endings"]), slide_parts=Counter(description["slide_parts"]))
        return (index, left_out) if len(index) == description["count"] else None
    except (OSError, ValueError, KeyError):
        return None


def made_by() -> dict[str, int | bool]:
    """What an index depends on beside the folder: parts of DICOM slides are known where pydicom is installed."""
    return {"version": VERSION, "knows_dicom": find_spec("pydicom") is not None}


def read_arrow(file: Path, in_memory: bool = False) -> datasets.Dataset:
    """The index in `file`, memory-mapped unless it is to be in memory."""
    import datasets

    return datasets.Dataset.from_file(str(file), in_memory=in_memory)


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
