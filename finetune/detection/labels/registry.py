"""Formats of boxes by name, asked in this order. A new format is its file and a line in `READERS`."""

from __future__ import annotations

from pathlib import Path

from simmim.finetune.detection.labels.base import BoxReader
from simmim.finetune.detection.labels.coco import CocoReader
from simmim.finetune.detection.labels.columns import ColumnsReader
from simmim.finetune.detection.labels.instances import InstanceMapsReader
from simmim.finetune.detection.labels.table import TableReader
from simmim.finetune.detection.labels.voc import VocReader
from simmim.finetune.detection.labels.yolo import YoloReader
from simmim.messages import did_you_mean

READERS: dict[str, BoxReader] = {
    "coco": CocoReader(),
    "voc": VocReader(),
    "yolo": YoloReader(),
    "csv": TableReader(),
    "columns": ColumnsReader(),
    "instances": InstanceMapsReader(),
}


def reader_named(name: str) -> BoxReader:
    """The reader of a format.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in READERS:
        raise ValueError(f"data.format is {name!r}{did_you_mean(name, READERS)}")
    return READERS[name]


def find_reader(path: str, name: str | None = None) -> BoxReader:
    """The reader for `path`: of that name, or the one that finds its files there.

    Raises:
        ValueError: if there is none, or there are several.
    """
    if name is not None:
        reader = reader_named(name)
        if not reader.detect(path):
            raise ValueError(f"{path!r} holds no boxes as {reader.title}: give {reader.layout}")
        return reader
    found = [name for name, reader in READERS.items() if reader.detect(path)]
    if len(found) > 1:
        raise ValueError(f"{path!r} holds boxes in {len(found)} formats: give data.format as {' or '.join(found)}")
    if not found:
        explain_nothing(path)
    return READERS[found[0]]


def explain_nothing(path: str) -> None:
    """Say why there are no boxes at `path`.

    Raises:
        ValueError: always; with a hint where there are label maps.
    """
    from simmim.data.label_map_sources import find_folder_pairs

    folder = Path(path).expanduser()
    if not folder.exists():
        raise ValueError(f"labeled data {path!r} does not exist: give {READERS['coco'].layout}, or another format")
    try:
        label_maps = find_folder_pairs(folder).pairs["train"].label_maps
    except ValueError:
        layouts = "; ".join(f"{reader.title}: {reader.layout}" for reader in READERS.values())
        raise ValueError(f"{path!r} holds no boxes in a known format. Known are {layouts}") from None
    if not any(label_maps.iterdir()):
        raise ValueError(f"{label_maps} is empty: put the boxes of the images there, or give data.format and where they are")
    raise ValueError(f"{label_maps} holds label maps and no boxes: use simmim finetune segmentation, or give boxes")
