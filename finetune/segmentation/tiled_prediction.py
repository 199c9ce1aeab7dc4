"""Label maps of images of any size, predicted and written tile by tile: TIFF files in tiles, with the images' georeference.

Of each tile what lies near its edges is not used, where neighbors overlap: the model sees what surrounds a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from simmim.data import UNREADABLE, describe_error, open_images, open_picture
from simmim.data.decode import open_windows
from simmim.data.label_maps import CLASSES_FILE, ClassScheme
from simmim.data.orientation import Size
from simmim.data.records import Record, paths_of, record_name
from simmim.data.tiff_windows import PIXEL_SCALE
from simmim.data.tiles import TiledImage, check_overlap, plan_tiles, tile_record
from simmim.data.windows import WindowedImage
from simmim.evaluate.single_files import suit_model
from simmim.files import atomic_write
from simmim.finetune.dense.pictures import palette
from simmim.finetune.dense.prediction import check_any_read, check_new_folder, output_names
from simmim.finetune.dense.views import scaled_size
from simmim.finetune.segmentation.model import SavedSegmenter, load_segmenter
from simmim.finetune.segmentation.prediction import LABEL_MAPS, SegmentedImages
from simmim.finetune.segmentation.sliding import most_likely_class
from simmim.reading import TileSettings
from simmim.training.devices import device_type

MULTIPLE_PX = 16  # of the sides of a TIFF's tiles
TIE_POINTS, TRANSFORMATION = 33922, 34264
UM_PER_CM = 10_000.0
BIG_TIFF_BYTES = 2**31


class Piece(NamedTuple):
    """A piece of a label map, and the tile that it is predicted from.

    Attributes:
        top, left: of the tile, in the level's pixels.
        inside: (top, left) of the piece in the tile.
        size: of the piece, (height, width).
    """

    top: int
    left: int
    inside: tuple[int, int]
    size: Size


def segment_tiles(
    run: str | Path, images: str | Path, out: str | Path, tiles: TileSettings, overlap: float, batch_size: int = 16
) -> SegmentedImages:
    """Write a label map for every image below `images`, OUT/masks/NAME.tif, of the size of the level that tiles are of, and
    OUT/classes.txt. No image or label map is in memory as a whole.

    Args:
        run, images, out: as of `segment`.
        tiles: their size and resolution. Each is predicted as an image of its own.
        overlap: of neighboring tiles, as a share of their sides.
        batch_size: tiles per forward pass.

    Raises:
        ValueError: as `segment`, and as `plan_tiles`; for tiles that are too small.
    """
    check_overlap(overlap)
    out = check_new_folder(out)
    saved, device = suit_model(load_segmenter(run), images), device_type()
    saved.model.to(device)
    reading = saved.preprocessing.reading_or_default
    source = open_images(images, reading=reading)
    names = output_names(paths_of(source), Path(images))
    plan = plan_tiles(source, tiles, reading)
    for tiled in plan.images:
        piece_side(tiled.side, overlap)  # one that is too small is told before anything is predicted
    counts = np.zeros(len(saved.scheme.classes), np.int64)
    unreadable: dict[str, str] = {}
    with saved.model.encoder.fixed_weights():
        for row, tiled in zip(plan.rows, plan.images):
            record = source[row]["image"]
            try:
                counts += write_tiles(
                    out / LABEL_MAPS / f"{names[row]}.tif", record, tiled, saved, tiles, overlap, batch_size
                )
            except UNREADABLE as error:
                unreadable[record_name(record, row)] = describe_error(error)
    check_any_read(len(plan.rows) - len(unreadable), unreadable)
    with atomic_write(out / CLASSES_FILE) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in saved.scheme.classes), encoding="utf-8")
    pixels = dict(zip(saved.scheme.classes, counts.tolist()))
    return SegmentedImages(len(plan.rows) - len(unreadable), unreadable, pixels)


def write_tiles(
    file: Path,
    record: Record,
    tiled: TiledImage,
    saved: SavedSegmenter,
    tiles: TileSettings,
    overlap: float,
    batch_size: int,
) -> np.ndarray:
    """Write the label map of one image, whole or not at all, and return the pixels of each class.

    Raises:
        One of `UNREADABLE` for an image that turns out to be broken.
    """
    import tifffile

    step = piece_side(tiled.side, overlap)
    values = np.array(saved.scheme.values, np.uint16 if max(saved.scheme.values) > 255 else np.uint8)
    counts = np.zeros(len(values), np.int64)

    def pieces() -> Iterator[np.ndarray]:
        for piece, label_map in predict_pieces(record, tiled, saved, tiles, step, batch_size):
            (top, left), (height, width) = piece.inside, piece.size
            classes = label_map[top : top + height, left : left + width]
            counts[:] += np.bincount(classes.ravel(), minlength=len(values))
            written = np.zeros((step, step), values.dtype)
            written[:height, :width] = values[classes]
            yield written

    image = open_windows(record, reading=saved.preprocessing.reading_or_default)
    try:
        options = file_options(image, tiled, saved.scheme, values.dtype)
    finally:
        image.close()
    with atomic_write(file) as temporary:
        tifffile.imwrite(
            temporary, pieces(), shape=tiled.level_size, dtype=values.dtype, tile=(step, step), compression="zlib", **options
        )
    return counts


def piece_side(side: int, overlap: float) -> int:
    """The side of the pieces that are written, of tiles of `side` pixels.

    Raises:
        ValueError: for tiles that are smaller than a TIFF's may be.
    """
    step = int(side * (1 - overlap)) // MULTIPLE_PX * MULTIPLE_PX
    if side < MULTIPLE_PX:
        raise ValueError(f"a tile is {side} px: give {MULTIPLE_PX} or more, of which label maps are written")
    return max(MULTIPLE_PX, step)


def piece_places(size: Size, side: int, step: int) -> Iterator[Piece]:
    """The pieces of a label map of `size`, row by row, each in the middle of its tile, but at the image's edges."""
    margin = (side - step) // 2
    for top, left in product(range(0, size[0], step), range(0, size[1], step)):
        tile_top, tile_left = (min(max(0, start - margin), length - side) for start, length in zip((top, left), size))
        inside = (top - tile_top, left - tile_left)
        yield Piece(tile_top, tile_left, inside, (min(step, size[0] - top), min(step, size[1] - left)))


def predict_pieces(
    record: Record, tiled: TiledImage, saved: SavedSegmenter, tiles: TileSettings, step: int, batch_size: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The pieces of an image's label map, with the class ids of their tiles, (side, side)."""
    device = next(saved.model.parameters()).device
    how = (saved.model.encoder.config.in_channels, saved.preprocessing.reading_or_default)
    size = scaled_size((tiles.size_px, tiles.size_px), saved.short_side)
    places = list(piece_places(tiled.level_size, tiled.side, step))
    with tqdm(total=len(places), desc=f"predicting {Path(record['path'] or '').name}", unit="tile") as bar:
        for first in range(0, len(places), batch_size):
            batch = places[first : first + batch_size]
            pixels = torch.stack([tile_pixels(record, tiled, piece, size, *how) for piece in batch]).to(device)
            for logits, piece in zip(saved.logits(pixels).split(1), batch):
                yield piece, most_likely_class(logits, (tiled.side, tiled.side))[0].cpu().numpy()
            bar.update(len(batch))


def tile_pixels(record: Record, tiled: TiledImage, piece: Piece, size: Size, channels: int, reading: Any) -> torch.Tensor:
    """A tile at the model's scale: (channels, height, width), uint8 or float32."""
    picture = open_picture(tile_record(record, tiled.at(piece.top, piece.left)), channels, reading=reading)
    return picture.crop((0, 0, tiled.side, tiled.side), size)


# --- what a file says beside its pixels ----------------------------------------------------------------------------------


def file_options(image: WindowedImage, tiled: TiledImage, scheme: ClassScheme, dtype: np.dtype) -> dict[str, Any]:
    """What `tifffile.imwrite` writes: colors, georeference, or the size of a pixel."""
    down, across = tiled.size[0] / tiled.level_size[0], tiled.size[1] / tiled.level_size[1]
    height, width = tiled.level_size
    options: dict[str, Any] = {"metadata": None, "bigtiff": height * width * dtype.itemsize > BIG_TIFF_BYTES}
    if dtype == np.uint8:
        colors = np.zeros((3, 256), np.uint16)
        colors[:, list(scheme.values)] = palette(len(scheme.classes)).T.astype(np.uint16) * 257
        options |= {"photometric": "palette", "colormap": colors}
    else:
        options |= {"photometric": "minisblack"}
    if image.georeference:
        tags = scaled_georeference(image.georeference, down, across)
        options["extratags"] = [(code, *tag, True) for code, tag in tags.items()]
    elif image.pixel_size:
        per_cm = (UM_PER_CM / (image.pixel_size * across), UM_PER_CM / (image.pixel_size * down))
        options |= {"resolution": per_cm, "resolutionunit": "CENTIMETER"}
    return options


def scaled_georeference(tags: Mapping[int, tuple], down: float, across: float) -> dict[int, tuple]:
    """The tags of a GeoTIFF for a level of its pyramid.

    Args:
        tags: (type, count, value) by code, of the full resolution.
        down, across: pixels of the full resolution in one of the level.
    """

    def scaled(code: int, value: Sequence[float]) -> tuple[float, ...]:
        if code == PIXEL_SCALE:
            return value[0] * across, value[1] * down, *value[2:]
        if code == TIE_POINTS:  # (column, row, depth, x, y, z), repeatedly
            shrink = (across, down, 1.0, 1.0, 1.0, 1.0)
            return tuple(number / shrink[index % 6] for index, number in enumerate(value))
        # Rows of a 4 × 4 matrix, which columns and rows of the image are multiplied by.
        stretch = (across, down, 1.0, 1.0)
        return tuple(number * stretch[index % 4] for index, number in enumerate(value))

    moved = (PIXEL_SCALE, TIE_POINTS, TRANSFORMATION)
    return {
        code: (kind, count, scaled(code, value) if code in moved else value) for code, (kind, count, value) in tags.items()
    }
