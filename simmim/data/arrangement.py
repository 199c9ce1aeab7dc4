"""What an image is where that is not a file: rows of files to rows of images, one a page, or one of several files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from simmim.data.addresses import address_channels, address_page
from simmim.data.decode import count_images
from simmim.data.pillow_guard import UNREADABLE
from simmim.data.records import iterate_records, paths_of
from simmim.data.zarr_folders import is_zarr
from simmim.messages import counted, name_some, notify
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

CHANNEL = "channel"
# Other files hold one image, or are read by their first.
PAGED_ENDINGS = (".tif", ".tiff", ".btf", ".qptiff", ".dcm", "")


def arrange(images: datasets.Dataset, reading: Reading) -> datasets.Dataset:
    """The images of rows of files; other columns stay with them.

    Args:
        images: with a column `image`, undecoded.

    Raises:
        ValueError: when a pattern of channel files matches nothing, or leaves channels missing.
    """
    if reading.channel_files:
        return group_channels(images, reading.channel_files)
    return divide_files(images, reading) if reading.rearranges else images


def arrange_labeled(images: datasets.Dataset, labels: list[str], reading: Reading) -> tuple[datasets.Dataset, list[str]]:
    """The images of rows of files, and their labels; as `arrange`."""
    arranged = arrange(images.add_column("label", labels), reading) if reading.rearranges else None
    return (images, labels) if arranged is None else (arranged.remove_columns("label"), arranged["label"][:])


def divide_files(images: datasets.Dataset, reading: Reading) -> datasets.Dataset:
    """A row for each image in a file of several."""
    rows: list[int] = []
    addresses: list[str | None] = []
    for row, record in enumerate(iterate_records(images)):
        count = images_in(record, reading)
        rows += [row] * count
        addresses += [record["path"]] if count == 1 else [address_page(record["path"], page) for page in range(count)]
    if len(rows) == len(images):
        return images
    notify_of_pages(len(set(rows)), len(rows))
    return with_addresses(images, rows, addresses)


def notify_of_pages(num_files: int, num_images: int) -> None:
    """A notice of files that hold several images."""
    notify(f"{counted(num_files, 'file')} {'holds' if num_files == 1 else 'hold'} {num_images:,} images: each page is one")


def images_in(record: Any, reading: Reading) -> int:
    """How many images a file holds; 1 for one that cannot be read or says nothing, which is told where it is opened."""
    path = record["path"] or ""
    if os.path.splitext(path)[1].lower() not in PAGED_ENDINGS and not is_zarr(path):
        return 1
    try:
        return count_images(record, reading)
    except UNREADABLE:
        return 1


def with_addresses(images: datasets.Dataset, rows: Sequence[int], addresses: Sequence[str | None]) -> datasets.Dataset:
    """Rows of `images`, each with another path."""
    import datasets

    chosen = images.select(rows)
    column = [{"bytes": record["bytes"], "path": path} for record, path in zip(iterate_records(chosen), addresses)]
    others = chosen.remove_columns("image")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    arranged = datasets.Dataset.from_dict({"image": column}, features=features)
    for name in others.column_names:
        arranged = arranged.add_column(name, others[name][:])
    return arranged


# --- channels in files of their own --------------------------------------------------------------------------------------


def group_channels(images: datasets.Dataset, pattern: str) -> datasets.Dataset:
    """A row for each image whose channels are files, in the order of the channels' names.

    Args:
        pattern: as of `find_channel_groups`.

    Raises:
        ValueError: as `find_channel_groups`; when labels of an image's files differ.
    """
    paths = [path or "" for path in paths_of(images)]
    groups = find_channel_groups(paths, pattern)
    check_labels(images, groups.rows)
    addresses = [address_channels([paths[row] for row in of_image], groups.names) for of_image in groups.rows]
    return with_addresses(images, [first for first, *_ in groups.rows], addresses)


class ChannelGroups(NamedTuple):
    """Files that are the channels of images.

    Attributes:
        names: of the channels.
        rows: of the files of each image, in the order of the channels.
    """

    names: list[str]
    rows: list[list[int]]


def find_channel_groups(paths: Sequence[str], pattern: str) -> ChannelGroups:
    """Which files are the channels of which image; files that do not match are left out, with a notice.

    Args:
        pattern: of the files' names without their endings: {well}_s{site}_w{channel}. {channel} tells the channel; files
            that agree in all other parts are one image. * stands for what does not matter.

    Raises:
        ValueError: when no file matches, or an image lacks a channel or has it twice.
    """
    groups, unmatched = group_paths(paths, pattern_expression(pattern), pattern)
    if not groups:
        raise ValueError(
            f"data.channel_files {pattern!r} matches none of {counted(len(paths), 'file')}, such as {paths[0]!r}: give one "
            "that does, or leave it out where each file is an image"
        )
    names = sorted({name for files in groups.values() for name in files}, key=natural_order)
    lacking = [(key, [name for name in names if name not in files]) for key, files in groups.items()]
    lacking = [(key, missing) for key, missing in lacking if missing]
    if lacking:
        key, missing = lacking[0]
        verb = "lacks" if len(lacking) == 1 else "lack"
        raise ValueError(
            f"data.channel_files {pattern!r}: {len(lacking):,} of {counted(len(groups), 'image')} {verb} some of the "
            f"channels {', '.join(names)}; the first, {' '.join(key[1:]) or key[0]!r}, has no {', '.join(missing)}: add the "
            "files, or leave the image out"
        )
    if unmatched:
        notify(
            f"data.channel_files leaves out {counted(len(unmatched), 'file')} that it does not match: {name_some(unmatched)}"
        )
    return ChannelGroups(names, [[files[name] for name in names] for files in groups.values()])


def match_channels(paths: Sequence[str], pattern: str) -> bool:
    """Whether any file is a channel by a pattern, as of `find_channel_groups`."""
    expression = pattern_expression(pattern)
    return any(expression.search(os.path.splitext(path)[0]) for path in paths)


def group_paths(
    paths: Sequence[str], expression: re.Pattern[str], pattern: str
) -> tuple[dict[tuple[str, ...], dict[str, int]], list[str]]:
    """For each image the row of each channel's file, and the paths that do not match.

    Raises:
        ValueError: when two files are the same channel of an image.
    """
    groups: dict[tuple[str, ...], dict[str, int]] = {}
    unmatched = []
    for row, path in enumerate(paths):
        found = expression.search(os.path.splitext(path)[0])
        if not found:
            unmatched.append(path)
            continue
        parts = found.groupdict()
        channel = parts.pop(CHANNEL)
        # The same well of another plate lies in another folder.
        files = groups.setdefault((path[: found.start()], *parts.values()), {})
        if channel in files:
            other = paths[files[channel]]
            raise ValueError(
                f"data.channel_files {pattern!r}: {other!r} and {path!r} are both channel {channel} of one image: name in "
                "braces what tells them apart"
            )
        files[channel] = row
    return groups, unmatched


def pattern_expression(pattern: str) -> re.Pattern[str]:
    """A pattern of names as a regular expression that matches at the end of a path.

    Raises:
        ValueError: for a pattern without {channel}, or that is none.
    """
    parts = re.split(r"(\{\w+\}|\*)", pattern)
    names = [part[1:-1] for part in parts if part.startswith("{")]
    if names.count(CHANNEL) != 1 or len(set(names)) < len(names):
        raise ValueError(
            f"data.channel_files is {pattern!r}: give parts of names in braces, each once, with {{channel}} among them, as "
            "in {well}_s{site}_w{channel}"
        )
    text = "".join(
        "[^/]*?" if part == "*" else f"(?P<{part[1:-1]}>[^/]+?)" if part.startswith("{") else re.escape(part)
        for part in parts
    )
    return re.compile(rf"(?:(?<=/)|^){text}$")


def name_without_channel(name: str, pattern: str) -> str | None:
    """What names an image whose channels are files: A1_s1 of A1_s1_w2 by {well}_s{site}_w{channel}. With the channel what
    stands before it is left out, or what stands after it where it begins the file's or folder's name. None where the pattern
    does not match.

    Args:
        name: of one of the files, without its ending.
    """
    found = pattern_expression(pattern).search(name)
    if not found:
        return None
    before, _, after = pattern.partition(f"{{{CHANNEL}}}")
    before, after = re.split(r"\{\w+\}|\*|/", before)[-1], re.split(r"\{\w+\}|\*", after)[0]
    start, end = found.span(CHANNEL)
    if before:
        start -= len(before)
    else:
        folder, slash, _ = after.partition("/")
        end += len(folder + slash)
    return (name[:start] + name[end:]).rstrip("/") or None


def natural_order(name: str) -> tuple:
    """So that w2 comes before w10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part)


def check_labels(images: datasets.Dataset, rows: Sequence[Sequence[int]]) -> None:
    """Check that the files of an image have one label.

    Raises:
        ValueError: naming them.
    """
    if "label" not in images.column_names:
        return
    labels = images["label"][:]
    for of_image in rows:
        if len({labels[row] for row in of_image}) > 1:
            raise ValueError(
                f"data.channel_files: labels of {images[of_image[0]]['image']['path']!r} and its other channels differ"
            )
