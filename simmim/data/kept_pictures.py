"""Decoded images on disk, shrunk where that can be, so that each file is decoded once: by all processes, ranks and runs.

An entry is one file, which is mapped when it is read; one that is not whole is known by its digest, and is no entry. It
belongs to the content of its image's file: a file that has changed is read anew, and its entry replaced. What a sample looks
like does not depend on the entries, as an image without one is shrunk in the same way each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from filelock import FileLock
from torch.utils.data import get_worker_info

from simmim.data.index import cache_folder
from simmim.data.orientation import Size
from simmim.data.pictures import Picture
from simmim.data.pillow_guard import decoding
from simmim.data.records import Record, contents_of, files_of
from simmim.data.shrinking import Shrunk, ShrunkPicture, kept_size, shrink
from simmim.data.slide_files import may_have_companions
from simmim.data.views import RandomView
from simmim.messages import notify

if TYPE_CHECKING:
    import datasets

    from simmim.data.image_statistics import ImageStatistics

MAGIC, VERSION = b"simmimK1", 1
HEAD = struct.Struct("<8sQI")  # magic, digest of all that follows, bytes of the description
USAGE, LOCK, USED = "usage", "usage.lock", "used"
SUFFIX = ".kept"
LEAST_GAIN = 4.0  # pixels of the files for one that is kept, from which keeping images pays at any number of them
# Where crops need nearly all pixels, keeping saves decoding alone, and takes several times the files' space: for collections
# of no more than this, which the system's file cache mostly holds, and files that are compressed to at most this share.
WHOLE_BYTES, COMPRESSED_SHARE = 4e9, 0.8
WHOLE_EPOCHS = 4  # from which writing them pays
HEAD_FILES, JPEG_ENDINGS = 16, (".jpg", ".jpeg", ".jfif")  # files that tell what most are
CREDIT_BYTES, CREDIT_PARTS = 64 * 2**20, 64  # that a process reserves at a time, at most this part of what is left
BINARY = getattr(os, "O_BINARY", 0)
WRITE = os.O_WRONLY | os.O_CREAT | BINARY
OLD_S = 3600.0  # a temporary file of that age belongs to no process


class KeptPictures:
    """The shrunk images of a collection under certain views.

    Args:
        views: of which no crop is enlarged.
        how: all else that pictures depend on, for the entries' names.
        budget_bytes: that all collections may take on this disk; 0 keeps nothing.
        folder: of all collections; by default beside the indices.
        whole: keep images that are hardly larger than crops need, too, with all their pixels.
    """

    def __init__(
        self,
        views: Sequence[RandomView],
        how: tuple,
        budget_bytes: int,
        folder: str | Path | None = None,
        whole: bool = False,
    ) -> None:
        self.views, self.budget_bytes, self.whole = tuple(views), budget_bytes, whole
        self.root = Path(folder) if folder else pictures_folder()
        rule = json.dumps([VERSION, [asdict(view) for view in self.views], *map(repr, how), *["whole"] * whole])
        self.folder = self.root / hashlib.sha256(rule.encode()).hexdigest()[:24]
        self.may_write = budget_bytes > 0
        self.credit = 0  # bytes that this process has reserved and not used

    def open(self, record: Record, opened: Callable[[], Picture]) -> Picture:
        """The picture of a record, of its entry where there is one.

        Args:
            opened: opens the picture from its file.

        Raises:
            One of `UNREADABLE`.
        """
        stamp = stamp_of(record)
        entry = self.entry(record, stamp)
        kept = read_entry(entry, stamp)
        if kept is not None:
            return ShrunkPicture(kept)
        with decoding():  # once for both, as its beginning and end take as long as opening the file
            picture = opened()
            shrunk = shrink(picture, self.views, self.whole)
        if shrunk is not None and self.may_write:
            self.write(entry, shrunk.kept, stamp)
        return shrunk or picture

    def entry(self, record: Record, stamp: list) -> str:
        """The file of a record's entry. In Parquet and tar, images of several folders may have one name."""
        known_by = [record["path"] or "", *([] if record["bytes"] is None else [repr(stamp)])]
        name = hashlib.sha256("".join(known_by).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return f"{self.folder}/{name[:2]}/{name}{SUFFIX}"

    def write(self, entry: str, kept: Shrunk, stamp: list) -> None:
        """Write an entry if the budget allows it. A disk that is full or cannot be written is no error: nothing is kept from
        then on, which is a `Notice`."""
        parts = pack_entry(kept, stamp)
        try:
            if self.reserve(sum(map(len, parts))):
                write_entry(entry, parts)
        except OSError as error:
            self.may_write = False
            if (get_worker_info() or FirstWorker).id == 0:
                notify(f"images are no longer kept shrunk in {self.root} ({error.strerror}); the run goes on without")

    def reserve(self, num_bytes: int) -> bool:
        """Add to what all collections take, if the budget allows it. A process takes some of the budget at a time, and gives
        back nothing: the next run counts again."""
        if num_bytes > self.credit:
            with usage_lock(self.root):
                used = read_usage(self.root)
                wanted = max(num_bytes - self.credit, min(CREDIT_BYTES, (self.budget_bytes - used) // CREDIT_PARTS))
                if used + wanted > self.budget_bytes:
                    self.may_write = False
                    return False
                write_usage(self.root, used + wanted)
            self.credit += wanted
        self.credit -= num_bytes
        return True

    def make_room(self, needed_bytes: int) -> int:
        """Count what is kept, and remove the collections that were not used for longest until this one fits. To be called
        before a run, by one of its processes.

        Returns:
            Bytes that this collection has already.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / USED).touch()
            with usage_lock(self.root):
                sizes = {folder: folder_bytes(folder) for folder in self.root.iterdir() if folder.is_dir()}
                own = sizes.pop(self.folder, 0)
                others = sorted(sizes, key=last_used)
                missing = max(0, needed_bytes - own)
                while others and own + sum(sizes.values()) + missing > self.budget_bytes:
                    oldest = others.pop(0)
                    shutil.rmtree(oldest, ignore_errors=True)
                    sizes[oldest] = folder_bytes(oldest)
                write_usage(self.root, own + sum(sizes.values()))
            return own
        except OSError as error:
            self.may_write = False
            notify(f"images are not kept shrunk: {self.root} cannot be written ({error.strerror})")
            return 0

    def estimate(self, head: datasets.Dataset, num_images: int, images: ImageStatistics) -> KeptEstimate:
        """How much the images of a collection take, as `estimate_kept`."""
        return estimate_kept(self.views, head, num_images, images, self.whole)


class KeptEstimate(NamedTuple):
    """What keeping a collection takes and saves.

    Attributes:
        num_bytes: of all entries.
        gain: pixels of the files for one that is kept.
        size: of a typical entry, (height, width).
        whole: whether images that are hardly larger than crops need are kept, too.
    """

    num_bytes: int
    gain: float
    size: Size
    whole: bool = False


def estimate_kept(
    views: Sequence[RandomView], head: datasets.Dataset, num_images: int, images: ImageStatistics, whole: bool
) -> KeptEstimate:
    """How much the images of a collection take.

    Args:
        head: some of them.
        num_images: all of them.
        images: their statistics.
        whole: as of `KeptPictures`.
    """
    paths, is_deep = [record["path"] or "" for record in head[:HEAD_FILES]["image"]], images.reading.is_deep
    num_jpegs = sum(os.path.splitext(path)[1].lower() in JPEG_ENDINGS for path in paths)
    is_jpeg, value_bytes = 2 * num_jpegs > len(paths) and not is_deep, 4 if is_deep else 1
    kept = [(size, kept_size(views, size, is_jpeg, whole)) for size in images.sizes]
    worth = [(size, small) for size, small in kept if small is not None]
    if not worth:
        return KeptEstimate(0, 1.0, (0, 0), whole)
    mean = sum(small[0] * small[1] for _, small in worth) / len(kept)
    gain = sum(size[0] * size[1] for size, _ in kept) / len(kept) / (mean or 1)
    typical = sorted(small for _, small in worth)[len(worth) // 2]
    return KeptEstimate(round(mean * images.channels * value_bytes * num_images), gain, typical, whole)


def way_to_keep(
    views: Sequence[RandomView], head: datasets.Dataset, num_images: int, images: ImageStatistics
) -> KeptEstimate:
    """How a collection is kept if it is: shrunk; or, where that saves little and all fits, also with all pixels. It follows
    from the images alone, so that it is the same on every machine and in a run that is resumed.

    Args:
        head, num_images, images: as of `estimate_kept`.
    """
    shrunk = estimate_kept(views, head, num_images, images, whole=False)
    if shrunk.gain >= LEAST_GAIN or not is_compressed(head, images):
        return shrunk
    whole = estimate_kept(views, head, num_images, images, whole=True)
    return whole if whole.num_bytes <= WHOLE_BYTES else shrunk


def is_worth_keeping(kept: KeptEstimate, epochs: float = math.inf) -> bool:
    """Whether keeping saves time in a run that sees each image so many times."""
    return (epochs > 1 and kept.gain >= LEAST_GAIN) or (kept.whole and epochs >= WHOLE_EPOCHS)


def is_compressed(head: datasets.Dataset, images: ImageStatistics) -> bool:
    """Whether files of 8-bit images are clearly smaller than their pixels, by some of them. Deep values take more space when
    they are kept than in any file."""
    if images.reading.is_deep or not images.sizes:
        return False
    pixels = sum(height * width for height, width in images.sizes) / len(images.sizes)
    sizes = [file_bytes(record) for record in head[:HEAD_FILES]["image"]]
    return sum(sizes) / len(sizes) <= COMPRESSED_SHARE * pixels * images.channels


def file_bytes(record: Record) -> int:
    """The size of a record's files; 0 for those that are missing."""
    if record["bytes"] is not None:
        return len(record["bytes"])
    return sum(os.path.getsize(path) for path in files_of(record) if os.path.isfile(path))


class FirstWorker:
    """Stands in where there is no loading process."""

    id = 0


def pictures_folder() -> Path:
    """The folder of all collections: $XDG_CACHE_HOME/simmim/pictures, by default ~/.cache/simmim/pictures."""
    return cache_folder().parent / "pictures"


def stamp_of(record: Record) -> list:
    """What tells a file from itself after a change: size, time and place on the disk of each, of a folder or a slide with
    those of all that belong to it; of bytes their digest.

    Raises:
        OSError: for a file that is missing.
    """
    if record["bytes"] is not None:
        return [len(record["bytes"]), xxhash.xxh3_64_intdigest(record["bytes"])]
    stamps = []
    for path in files_of(record):
        each = os.stat(path)
        stamps.append([each.st_size, each.st_mtime_ns, each.st_ino])
        if stat.S_ISREG(each.st_mode) and not may_have_companions(path):
            continue
        inside = [os.stat(file) for file in contents_of({"bytes": None, "path": path}) if file != path]
        if stat.S_ISDIR(each.st_mode) or inside:
            stamps[-1] += [len(inside), sum(one.st_size for one in inside), sum(one.st_mtime_ns for one in inside)]
    return stamps


# --- entries -------------------------------------------------------------------------------------------------------------


def pack_entry(kept: Shrunk, stamp: list) -> tuple[bytes, memoryview]:
    """The content of an entry's file, in two parts."""
    values = np.ascontiguousarray(kept.values.transpose(1, 2, 0))  # pixels together, as Pillow takes them
    fields = {name: value for name, value in vars(kept).items() if name != "values"}
    described = {**fields, "stamp": stamp, "shape": values.shape, "dtype": values.dtype.str}
    description, pixels = json.dumps(described).encode(), memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    digest = xxhash.xxh3_64(description)
    digest.update(pixels)
    return HEAD.pack(MAGIC, digest.intdigest(), len(description)) + description, pixels


def read_entry(entry: str, stamp: list) -> Shrunk | None:
    """What an entry keeps; None where there is none, it is torn or not yet whole, or its image's file has changed since."""
    try:
        handle = os.open(entry, os.O_RDONLY | BINARY)  # Python's file object would take longer than the call
    except OSError:
        return None
    try:
        try:
            data = memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(handle)
        magic, digest, length = HEAD.unpack_from(data)
        if magic != MAGIC or xxhash.xxh3_64_intdigest(data[HEAD.size :]) != digest:
            return None
        fields: dict[str, Any] = json.loads(bytes(data[HEAD.size : HEAD.size + length]))
        if fields.pop("stamp") != stamp:
            return None
        shape, dtype = fields.pop("shape"), np.dtype(fields.pop("dtype"))
        values = np.frombuffer(data, dtype, offset=HEAD.size + length).reshape(shape)
        fields["size"] = tuple(fields["size"])
        return Shrunk(values.transpose(2, 0, 1), **fields)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def write_entry(path: str, parts: Sequence[bytes | memoryview]) -> None:
    """Write an entry where there is none, or take the place of one that is torn or outdated. It is not forced to the disk:
    what a power cut or a killed process leaves is known by its digest.

    Raises:
        OSError: as of writing. Nothing is left then.
    """
    folder, name = os.path.split(path)
    written = path
    try:
        try:
            # Under its own name at once, which saves the change of names.
            handle = os.open(path, WRITE | os.O_EXCL, 0o644)
        except FileNotFoundError:
            os.makedirs(folder, exist_ok=True)
            handle = os.open(path, WRITE | os.O_EXCL, 0o644)
    except FileExistsError:
        # Others may have mapped it, so that it is never changed in place.
        written = f"{folder}/.{name}.{os.getpid()}.{threading.get_ident()}"
        handle = os.open(written, WRITE | os.O_TRUNC, 0o644)
    try:
        try:
            write_all(handle, parts)
        finally:
            os.close(handle)
        if written != path:
            os.replace(written, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(written)
        raise


def write_all(handle: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write parts one after the other, in one call where the system has one."""
    left = [memoryview(part) for part in parts]
    while left:
        written = os.writev(handle, left) if hasattr(os, "writev") else os.write(handle, left[0])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


# --- the budget ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def usage_lock(root: Path) -> Iterator[None]:
    """Inside the block this process alone counts."""
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):
        yield


def read_usage(root: Path) -> int:
    """The bytes of all collections, as counted last."""
    try:
        number, end = (root / USAGE).read_text().split("\n")
        return int(number + end)
    except (OSError, ValueError):
        return sum(folder_bytes(folder) for folder in root.iterdir() if folder.is_dir())


def write_usage(root: Path, num_bytes: int) -> None:
    """Note the bytes of all collections."""
    # In place: some disks wait for data when a file takes another one's place. A torn number is counted again.
    with open(root / USAGE, "wb") as file:
        file.write(f"{num_bytes}\n".encode())


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a collection; temporary files that a killed process left are removed."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.name.startswith(".") and path.is_file() and time.time() - status.st_mtime > OLD_S:
                path.unlink()
            elif path.is_file():
                total += status.st_size
    return total


def last_used(folder: Path) -> float:
    """When a collection was used last."""
    try:
        return (folder / USED).stat().st_mtime
    except OSError:
        return 0.0
