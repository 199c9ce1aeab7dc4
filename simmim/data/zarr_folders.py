"""Folders that are Zarr stores: which of them are images, and what their metadata tell. Their JSON files alone are read.

OME-Zarr is OME-NGFF 0.4 (https://ngff.openmicroscopy.org/0.4) in Zarr format 2, 0.5 in format 3, and their predecessors:
an image is a group with `multiscales`, whose arrays are the levels of its pyramid.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from simmim.data.lengths import UM_PER
from simmim.messages import counted

_IN_STORE = re.compile(r"\.zarr(?=[/\\]|$)", re.IGNORECASE)
NODE_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
AXES = "tczyx"
UNNAMED_AXES = {5: tuple(AXES)}  # of OME-NGFF 0.1 and 0.2
DEEPEST = 3  # groups in groups that are looked through for images: those of SpatialData lie two below

Visit = Callable[[str], None]
Deny = Callable[[str, OSError], None]


def is_zarr(path: str) -> bool:
    """Whether a path is of a Zarr folder, or of something in one, by its name."""
    return _IN_STORE.search(path) is not None


class Node(NamedTuple):
    """A group or an array of a store.

    Attributes:
        is_array: whether it is an array.
        attributes: of OME-NGFF, or all where these are not set apart.
        axes: names of an array's axes where it tells them all.
    """

    is_array: bool
    attributes: dict[str, Any]
    axes: tuple[str, ...] = ()


def read_node(folder: str, visit: Visit = lambda file: None) -> Node | None:
    """What lies in a folder of a store; None for a folder without Zarr's metadata.

    Args:
        visit: is called with the folder, and each file that is read.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for metadata that are no JSON of an object.
    """
    visit(folder)
    found = {name: file for name in NODE_FILES if _is_there(file := os.path.join(folder, name))}
    if not found:
        return None
    read = {}
    for name, file in found.items():
        visit(file)
        read[name] = read_object(file)
    if described := read.get("zarr.json"):
        attributes = described.get("attributes") or {}
        names = described.get("dimension_names") or ()
        is_array = described.get("node_type") == "array"
    else:
        attributes = read.get(".zattrs") or {}
        names, is_array = attributes.get("_ARRAY_DIMENSIONS") or (), ".zarray" in found  # xarray's
    axes = tuple(str(name).lower() for name in names)
    known = len(set(axes)) == len(axes) and {"y", "x"} <= set(axes) <= set(AXES)
    return Node(is_array, attributes.get("ome") or attributes, axes if known else ())


def _is_there(file: str) -> bool:
    """Whether a file is there. `os.path.isfile` also says no where that is unknown.

    Raises:
        OSError: where the folder cannot be read.
    """
    try:
        return stat.S_ISREG(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_object(file: str) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for anything else in it.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            value = json.load(stream)
    except ValueError as error:
        raise ValueError(f"{os.path.basename(file)} is broken: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{os.path.basename(file)} is broken: it holds no object")
    return value


# --- the images of a store -----------------------------------------------------------------------------------------------


def images_in_zarr(folder: str, visit: Visit = lambda file: None, deny: Deny | None = None) -> Iterator[str]:
    """Paths of the images of a store, or of a part of one: itself, the fields of a plate's or a well's images, the series
    that bioformats2raw writes, or those in a group of groups. A folder that is none of these, or broken, is given too, for
    the error that it ends in.

    Args:
        folder: as of `is_zarr`.
        visit: is called with each folder and file that is looked at.
        deny: is called with a folder that cannot be read, of which nothing is given then; by default it is given too.
    """
    denied: list[str] = []

    def refuse(path: str, error: OSError) -> None:
        denied.append(path)
        deny(path, error)  # type: ignore[misc]  # called where there is one

    yield from list(_images_below(folder, visit, DEEPEST, refuse if deny else None)) or ([] if denied else [folder])


def _images_below(folder: str, visit: Visit, depth: int, deny: Deny | None) -> Iterator[str]:
    """The images; none where nothing below is one."""
    try:
        node = read_node(folder, visit)
        if node is None:
            return
        if node.is_array or "multiscales" in node.attributes:
            yield folder
            return
        names = member_names(folder, node, visit)
        for name in names:
            yield from images_in_zarr(os.path.join(folder, name), visit, deny)
        if names or not depth:
            return
        for name in sorted(os.listdir(folder)):  # labels are no images, and arrays without multiscales may be anything
            below = os.path.join(folder, name)
            if name != "labels" and os.path.isdir(below) and not _is_array(below):
                yield from _images_below(below, visit, depth - 1, deny)
    except OSError as error:
        if deny is None:
            yield folder
        else:
            deny(folder, error)
    except (ValueError, TypeError, KeyError, AttributeError):
        yield folder


def member_names(folder: str, node: Node, visit: Visit) -> list[str]:
    """Names of the groups that metadata of a plate, a well or bioformats2raw name; none for other groups."""
    attributes = node.attributes
    if "plate" in attributes:
        return [str(well["path"]) for well in attributes["plate"]["wells"]]
    if "well" in attributes:
        return [str(field["path"]) for field in attributes["well"]["images"]]
    if "bioformats2raw.layout" not in attributes:
        return []
    listed = read_node(os.path.join(folder, "OME"), visit)
    series = listed.attributes.get("series") if listed else None
    return list(series or sorted(filter(str.isdigit, os.listdir(folder)), key=int))


def _is_array(folder: str) -> bool:
    """Whether a folder is an array, whose chunks may be many files."""
    if os.path.isfile(os.path.join(folder, ".zarray")):
        return True
    try:
        return read_object(os.path.join(folder, "zarr.json")).get("node_type") == "array"
    except (OSError, ValueError):
        return False


# --- one image -------------------------------------------------------------------------------------------------------------


class ImageLayout(NamedTuple):
    """What metadata tell of an image.

    Attributes:
        axes: names of the arrays' axes; empty for an array that tells none.
        levels: folders of the pyramid's arrays in the image's folder, the full resolution first; "" for an array itself.
        pixel_size: length of a pixel of the full resolution in µm; None where it is not told.
        names: of the channels; empty where they are not told.
        is_ome: whether it is an image of OME-Zarr.
    """

    axes: tuple[str, ...]
    levels: tuple[str, ...]
    pixel_size: float | None = None
    names: tuple[str, ...] = ()
    is_ome: bool = False


def read_layout(folder: str) -> ImageLayout:
    """What the metadata of an image's folder tell.

    Raises:
        OSError: for a folder that is missing, or files that cannot be read.
        ValueError: for one that is no image, and metadata that are broken.
    """
    node = read_node(folder)
    if node is None:
        os.stat(folder)
        raise ValueError(f"a Zarr folder without metadata: none of {', '.join(NODE_FILES)} is in it")
    if node.is_array:
        return ImageLayout(node.axes, ("",))
    if "multiscales" not in node.attributes:
        members = list(images_in_zarr(folder))
        if members != [folder]:
            raise ValueError(f"holds {counted(len(members), 'image')}: give one, such as {members[0]}")
        raise ValueError(
            "a Zarr group without multiscales in .zattrs or zarr.json, so no image of OME-Zarr: give the path of an array "
            "in it, such as " + os.path.join(folder, "0")
        )
    try:
        multiscales = node.attributes["multiscales"][0]
        levels = tuple(str(level["path"]) for level in multiscales["datasets"])
        axes, units = read_axes(multiscales.get("axes"))
        scale = read_scale(multiscales, len(axes))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its multiscales are broken ({type(error).__name__}: {error})") from error
    if not levels:
        raise ValueError("its multiscales are broken: they name no datasets")
    axes = axes or UNNAMED_AXES[5]
    per_um = UM_PER.get(units.get("x", ""))
    pixel_size = scale[axes.index("x")] * per_um if scale and per_um else None
    return ImageLayout(axes, levels, pixel_size or None, channel_labels(node.attributes), is_ome=True)


def read_axes(axes: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of the axes, and the units of those that have one; none of both where an early version names no axes.

    Raises:
        ValueError: for other axes than t, c, z, y and x, with y and x among them.
    """
    described = [{"name": axis} if isinstance(axis, str) else axis for axis in axes or ()]
    names = tuple(str(axis["name"]).lower() for axis in described)
    if names and (len(set(names)) < len(names) or not {"y", "x"} <= set(names) <= set(AXES)):
        raise ValueError(f"its axes are {', '.join(names)}: expected some of t, c, z, y, x, with y and x among them")
    return names, {name: str(axis.get("unit", "")) for name, axis in zip(names, described)}


def read_scale(multiscales: dict[str, Any], num_axes: int) -> list[float] | None:
    """The lengths of the full resolution's pixels along all axes, in their units; None where they are not told."""
    scale: list[float] | None = None
    # Those of the datasets are applied first, then those of all.
    for owner in (multiscales["datasets"][0], multiscales):
        for transformation in owner.get("coordinateTransformations") or ():
            factors = transformation.get("scale")
            if transformation.get("type") == "scale" and factors and len(factors) == num_axes:
                scale = [old * float(new) for old, new in zip(scale or [1.0] * num_axes, factors)]
    return scale


def channel_labels(attributes: dict[str, Any]) -> tuple[str, ...]:
    """The channels' labels of OMERO's metadata, where each has one."""
    try:
        labels = [str(channel.get("label") or "") for channel in attributes["omero"]["channels"]]
    except (LookupError, TypeError, AttributeError):
        return ()
    return tuple(labels) if all(labels) else ()
