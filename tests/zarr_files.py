"""Writing OME-Zarr for tests."""

import json

import pytest

zarr = pytest.importorskip("zarr", reason="Zarr needs the extra zarr")

FORMATS = {"0.4": 2, "0.5": 3}  # OME-NGFF's version by Zarr's


def write_group(folder, attributes, version="0.5"):
    """A group with attributes of OME-NGFF."""
    group = zarr.open_group(str(folder), mode="w", zarr_format=FORMATS[version])
    group.attrs.update({"ome": {"version": version, **attributes}} if version == "0.5" else attributes)
    return group


def write_array(folder, values, version="0.5", **options):
    """An array of a store, in chunks of at most 16 × 16 pixels by default."""
    chunks = options.pop("chunks", tuple(1 if size < 9 and values.ndim > 2 else 16 for size in values.shape))
    array = zarr.create_array(
        str(folder), shape=values.shape, dtype=values.dtype, chunks=chunks, zarr_format=FORMATS[version], **options
    )
    array[...] = values
    return array


def levels_of(values, axes, num_levels):
    """Values of a pyramid's levels: every second pixel of the one above."""
    selected = [slice(None, None, 2) if axis in "yx" else slice(None) for axis in axes]
    levels = [values]
    for _ in range(1, num_levels):
        levels.append(levels[-1][tuple(selected)])
    return levels


def write_ome_zarr(folder, values, axes, version="0.5", num_levels=2, unit="micrometer", length=0.5, names=(), **options):
    """An image: levels 0, 1, … with pixels of `length`, and the channels' names. Gives the values of its levels."""
    levels = levels_of(values, axes, num_levels)
    units = {"unit": unit} if unit else {}
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    scales = [[length * 2**level if axis in "yx" else 1.0 for axis in axes] for level in range(num_levels)]
    multiscales = {
        "axes": [{"name": axis, **kinds.get(axis, {"type": "space", **units})} for axis in axes],
        "datasets": [
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
            for level, scale in enumerate(scales)
        ],
    }
    omero = {"omero": {"channels": [{"label": name} for name in names]}} if names else {}
    write_group(folder, {"multiscales": [multiscales], **omero}, version)
    for level, stored in enumerate(levels):
        write_array(folder / str(level), stored, version, **options)
    return levels


def edit_metadata(folder, version, change):
    """Apply a function to the attributes of OME-NGFF in a folder's JSON file."""
    file = folder / (".zattrs" if version == "0.4" else "zarr.json")
    described = json.loads(file.read_text())
    change(described if version == "0.4" else described["attributes"]["ome"])
    file.write_text(json.dumps(described))
