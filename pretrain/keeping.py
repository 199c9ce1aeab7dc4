"""Whether a run keeps its images decoded on disk, and how much of the disk they may take."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from simmim.data import ImageStatistics, RandomView, Source
from simmim.data.kept_pictures import KeptPictures, is_worth_keeping, pictures_folder, way_to_keep
from simmim.pretrain.settings import PretrainSettings

BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B)", re.IGNORECASE)
FREE_SHARE = 0.2  # of what is free on the disk, that auto takes


def parse_budget(text: str) -> int:
    """The bytes of a size, such as 20GB or 500 MiB.

    Raises:
        ValueError: for what is none.
    """
    found = BUDGET.fullmatch(text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"data.cache is {text!r}: give auto, off, or a size as 20GB")
    return int(float(found[1]) * BYTES[found[2].upper()])


def resolve_cache(
    settings: PretrainSettings, source: Source, images: ImageStatistics, views: Sequence[RandomView]
) -> tuple[PretrainSettings, KeptPictures | None]:
    """Settings that say whether images are kept decoded, and these.

    Args:
        views: of an image; none where images are not read from files, whole, time and again.

    Raises:
        ValueError: for a size that is none.
    """
    cache, data = str(settings.data.cache), settings.data
    budget = parse_budget(cache) if cache not in ("auto", "off") else 0
    way = way_to_keep(views, source.head, source.num_images, images) if views and cache != "off" else None
    if way is None or (cache == "auto" and not is_worth_keeping(way, settings.epochs)):
        return replace(settings, data=replace(data, cache="off")), None
    if cache == "auto":
        cache = default_budget()
        budget = parse_budget(cache)
    how = (data.channels or images.channels, data.max_pixels, images.reading)
    kept = KeptPictures(views, how, budget, whole=way.whole)
    return replace(settings, data=replace(data, cache=cache)), kept


def default_budget() -> str:
    """The size that auto takes, as a setting."""
    folder = pictures_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{max(0.001, FREE_SHARE * shutil.disk_usage(folder).free / 1e9):.3g}GB"


def prepare(kept: KeptPictures, source: Source, images: ImageStatistics) -> str:
    """Make room for a collection, and say what is kept of it in a line."""
    estimate = kept.estimate(source.head, source.num_images, images)
    kept.make_room(estimate.num_bytes)
    height, width = estimate.size
    share = min(1.0, kept.budget_bytes / max(1, estimate.num_bytes))
    part = "" if share == 1 else f", which is enough for {math.floor(100 * share)} %"
    return (
        f"cache    images are kept at about {height}×{width} px, {gigabytes(estimate.num_bytes)} of at most "
        f"{gigabytes(kept.budget_bytes)}{part}, in {short(kept.root)}; --data.cache off keeps none"
    )


def gigabytes(num_bytes: int) -> str:
    """In GB, or in MB below one."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def short(path: Path) -> str:
    """A path with ~ for the home folder."""
    home = os.path.expanduser("~")
    return f"~{str(path)[len(home) :]}" if home != "/" and str(path).startswith(home + os.sep) else str(path)
