"""Images that stay open between one tile and the next, a few in each process."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from simmim.data.addresses import without_tile
from simmim.data.records import Record, files_of
from simmim.data.windows import WindowedImage

MOST_OPEN, MOST_BYTES = 16, 2**30  # images, and what they hold in memory; the latest one may hold more


class OpenWindows:
    """The images that tiles were read from last, each opened once. A file that has changed is opened anew."""

    def __init__(self) -> None:
        self.images: OrderedDict[tuple, WindowedImage] = OrderedDict()
        self.lock = threading.RLock()
        self.process = os.getpid()

    @contextlib.contextmanager
    def borrow(
        self, record: Record, max_pixels: int, reading: Any, opened: Callable[[Record, int, Any], WindowedImage]
    ) -> Iterator[WindowedImage]:
        """The image of a record, for this thread alone.

        Args:
            record: its path may name a tile.
            opened: opens the image where it is not open.
        """
        with self.lock:
            if self.process != os.getpid():  # a fork would share its parent's places in the files
                self.images, self.process = OrderedDict(), os.getpid()
            key = (identity(record), max_pixels, reading)
            image = self.images.pop(key, None)
            if image is None:
                self.make_room()
                image = opened(record, max_pixels, reading)
            self.images[key] = image
            yield image

    def make_room(self) -> None:
        """Close the images that were not used for longest."""
        while self.images and (
            len(self.images) >= MOST_OPEN or sum(image.num_bytes for image in self.images.values()) > MOST_BYTES // 2
        ):
            _, image = self.images.popitem(last=False)
            image.close()


def identity(record: Record) -> tuple:
    """What tells an image from others and from itself after a change of its file."""
    path = without_tile(record["path"] or "")
    if record["bytes"] is not None:
        return path, len(record["bytes"]), hash(record["bytes"])
    status = [os.stat(file) for file in files_of(record)]
    return path, *((each.st_size, each.st_mtime_ns, each.st_ino) for each in status)
