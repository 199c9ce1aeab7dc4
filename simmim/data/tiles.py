"""Tiles: parts of images that are larger than a picture, drawn at random or in rows.

A tile is a record whose path names a part of an image (`addresses`), so that whatever reads images reads tiles. Images are
counted by their area: each gives as many tiles to an epoch as would cover it.

Sizes are (height, width). Tiles are squares.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from simmim.data.addresses import Tile, address_tile
from simmim.data.decode import MAX_PIXELS, STRETCHED, open_picture, open_windows
from simmim.data.headers import KeptHeaders
from simmim.data.image_statistics import ImageStatistics, measure_images
from simmim.data.orientation import Size
from simmim.data.pictures import Picture
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.data.records import Record, record_name
from simmim.data.rows import Rows
from simmim.data.samples import ImageSamples, View, further_views
from simmim.data.sources import dataset_of
from simmim.messages import counted, notify
from simmim.reading import Reading, TileSettings

if TYPE_CHECKING:
    import datasets

# Background: pixels without data, or within this share of the range of the tile's median in every channel. JPEG's and a
# camera's noise on an empty slide stay below it.
BACKGROUND_WITHIN = 1 / 32
LOOKED_AT_PX = 64  # pixels along a side by which a tile is judged
DRAWS_PER_IMAGE, MAX_DRAWS = 32, 256
SAMPLED_TILES = 256


class TiledImage(NamedTuple):
    """Where the tiles of one image lie.

    Attributes:
        size: of the full resolution.
        level: that they are read from.
        level_size: its size.
        side: of a tile, in the level's pixels.
    """

    size: Size
    level: int
    level_size: Size
    side: int

    @property
    def count(self) -> int:
        """Tiles that an epoch has of the image: as many as cover its area."""
        height, width = self.level_size
        return max(1, round(height * width / self.side**2))

    def at(self, top: int, left: int) -> Tile:
        """The tile whose corner lies there."""
        return Tile(self.level, left, top, self.side, self.side)

    def draw(self, generator: random.Random) -> Tile:
        """A tile anywhere in the image."""
        height, width = self.level_size
        return self.at(generator.randint(0, height - self.side), generator.randint(0, width - self.side))

    def full_resolution(self, tile: Tile) -> tuple[int, int, int, int]:
        """(x, y, width, height) of a tile in pixels of the full resolution."""
        down, across = self.size[0] / self.level_size[0], self.size[1] / self.level_size[1]
        left, top = round(tile.left * across), round(tile.top * down)
        right, bottom = round((tile.left + tile.width) * across), round((tile.top + tile.height) * down)
        return left, top, right - left, bottom - top


class TilePlan:
    """The tiles of a source's images.

    Args:
        settings: which part of an image is a tile.
        rows: of the source, whose images have tiles.
        images: one for each of `rows`.
    """

    def __init__(self, settings: TileSettings, rows: Sequence[int], images: Sequence[TiledImage]) -> None:
        self.settings, self.rows, self.images = settings, list(rows), list(images)
        self.numbers = {row: number for number, row in enumerate(self.rows)}
        self.ends = np.cumsum([image.count for image in images])

    def __len__(self) -> int:
        """Tiles of an epoch."""
        return int(self.ends[-1])

    def image_of(self, index: int) -> int:
        """The number of the image that the `index`-th tile of an epoch is of."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def tile_of(self, row: int, record: Record) -> Record:
        """A tile of a row's image, always the same one; of an image that could not be opened the record itself."""
        if row not in self.numbers:
            return record
        return tile_record(record, self.images[self.numbers[row]].draw(random.Random(row)))

    def draw(self, source: datasets.Dataset, image: int, generator: random.Random) -> Record:
        """A tile anywhere in an image of `source`."""
        return tile_record(source[self.rows[image]]["image"], self.images[image].draw(generator))


def tile_record(record: Record, tile: Tile) -> Record:
    """The record of a part of an image."""
    return {"bytes": record["bytes"], "path": address_tile(record["path"], tile)}


def plan_tiles(
    source: datasets.Dataset,
    settings: TileSettings,
    reading: Reading = STRETCHED,
    max_pixels: int = MAX_PIXELS,
    max_unreadable: float = 1.0,
) -> TilePlan:
    """Find where the tiles of every image lie. Only files that are new or have changed are opened, as headers are kept
    (`KeptHeaders`). Images that cannot be opened are left out, which is a `Notice`.

    Args:
        max_unreadable: share of the images; more of them stop it.

    Raises:
        ValueError: for images smaller than a tile, without that level, or whose file does not tell the size of a pixel; when
            too many or all images cannot be opened.
    """
    rows, images, unreadable, smaller, unfit = [], [], [], [], []
    # Without OpenSlide tifffile reads what it can of some slides.
    headers = KeptHeaders(source, (reading.pages, max_pixels, find_spec("openslide") is not None))
    for row in range(len(source)):
        record = source[row]["image"]
        name = record_name(record, row)
        try:
            header = headers.read(record, functools.partial(open_windows, record, max_pixels, reading))
        except UNREADABLE as error:
            unreadable.append(f"{name}: {describe_error(error)}")
            continue
        try:
            image = place_tiles(header.levels, header.pixel_size, settings)
        except ValueError as error:
            unfit.append(f"{name}: {error}")
            continue
        if min(image.level_size) < image.side:
            smaller.append((min(image.level_size) * settings.size_px // image.side, name, image))
        rows.append(row)
        images.append(image)
    headers.save()
    of_all = counted(len(source), "image")
    if len(unreadable) > max_unreadable * len(source) or not (images or unfit):
        raise ValueError(f"{len(unreadable):,} of {of_all} cannot be opened; the first, {unreadable[0]}")
    if unfit:
        raise ValueError(f"{len(unfit):,} of {of_all} have no such tiles; the first, {unfit[0]}")
    if smaller:
        limit, name, image = min(smaller, key=lambda entry: entry[:2])
        height, width = image.level_size
        raise ValueError(
            f"data.tile is {settings.size_px} and {len(smaller):,} of {of_all} are smaller, such as "
            f"{name} of {height}x{width} pixels (height x width): give at most {limit}, or leave them out"
        )
    if unreadable:
        notify(f"{counted(len(unreadable), 'image')} cannot be opened and left out; the first, {unreadable[0]}")
    return TilePlan(settings, rows, images)


def place_tiles(levels: Sequence[Size], pixel_size: float | None, settings: TileSettings) -> TiledImage:
    """The level and the side of an image's tiles.

    Args:
        levels: sizes of its pyramid.
        pixel_size: of its full resolution.

    Raises:
        ValueError: for a level that it does not have, and when the file does not tell the size of its pixels.
    """
    if settings.pixel_size is None:
        level = settings.level or 0
        if level >= len(levels):
            raise ValueError(f"data.tile_level is {level}, and it has {counted(len(levels), 'level')}, from 0 on")
        return TiledImage(levels[0], level, levels[level], settings.size_px)
    if pixel_size is None:
        raise ValueError("data.pixel_size is given, and it tells no size of a pixel: give data.tile_level")
    factor = settings.pixel_size / pixel_size
    downsampling = [levels[0][1] / width for _, width in levels]
    # The coarsest level that is no coarser than asked for; levels are rounded to whole pixels.
    level = max(index for index, down in enumerate(downsampling) if index == 0 or down <= factor * 1.01)
    return TiledImage(levels[0], level, levels[level], max(1, round(settings.size_px * factor / downsampling[level])))


def background_share(picture: Picture) -> float:
    """The share of a tile's pixels that lack data, or are within `BACKGROUND_WITHIN` of the range of the median, in every
    channel."""
    height, width = picture.size
    size = min(height, LOOKED_AT_PX), min(width, LOOKED_AT_PX)
    pixels = picture.crop((0, 0, width, height), size, "nearest").flatten(1)
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    missing = values.isnan()
    apart = (values - values.nanmedian(dim=1, keepdim=True).values).abs() > BACKGROUND_WITHIN
    return 1 - float((apart & ~missing).any(dim=0).float().mean())


def is_empty(picture: Picture, settings: TileSettings) -> bool:
    """Whether a tile is left out."""
    return settings.max_background < 1 and background_share(picture) > settings.max_background


class DrawnTile(NamedTuple):
    """A tile that is not empty.

    Attributes:
        record, picture: of it.
        num_empty: tiles that were drawn before, and left out.
    """

    record: Record
    picture: Picture
    num_empty: int


def draw_tile(
    source: datasets.Dataset,
    plan: TilePlan,
    index: int,
    generator: random.Random,
    how: tuple[int | None, int, Reading],
) -> DrawnTile:
    """The `index`-th tile of an epoch: anywhere in its image where there is something. An image in which nothing is found
    in `DRAWS_PER_IMAGE` draws gives its place to another one.

    Args:
        generator: of all draws.
        how: `open_picture`'s arguments but for the record.

    Raises:
        One of `UNREADABLE`, and ValueError where `MAX_DRAWS` tiles were empty.
    """
    image = plan.image_of(index)
    for number in range(MAX_DRAWS):
        if number and not number % DRAWS_PER_IMAGE:
            image = plan.image_of(generator.randrange(len(plan)))
        record = plan.draw(source, image, generator)
        picture = open_picture(record, *how)
        if not is_empty(picture, plan.settings):
            return DrawnTile(record, picture, number)
    raise ValueError(f"{MAX_DRAWS} tiles in a row are background: give a higher data.max_background; 1 leaves out none")


def sample_tiles(
    source: datasets.Dataset, plan: TilePlan, most: int, seed: int, how: tuple[int | None, int, Reading]
) -> tuple[datasets.Dataset, float]:
    """Up to `most` tiles that are not empty, spread over all images, as rows of records; and the share of empty ones among
    those drawn. A function of its arguments.

    Raises:
        ValueError: when no tile can be read.
    """
    indices = np.unique(np.linspace(0, len(plan) - 1, min(most, len(plan))).round().astype(int))
    rows, num_empty, error = [], 0, None
    for index in indices:
        try:
            drawn = draw_tile(source, plan, int(index), random.Random(f"{seed}/tiles/{index}"), how)
        except UNREADABLE as failure:
            error = error or describe_error(failure)
            continue
        rows.append({"image": drawn.record})
        num_empty += drawn.num_empty
    if not rows:
        raise ValueError(f"none of {counted(len(indices), 'tile')} can be read; the first, {error}")
    return dataset_of(rows), num_empty / (num_empty + len(rows))


class MeasuredTiles(NamedTuple):
    """A sample of the tiles of a source.

    Attributes:
        tiles: rows of records.
        statistics: of them.
        empty_share: of the tiles drawn, which were left out.
    """

    tiles: datasets.Dataset
    statistics: ImageStatistics
    empty_share: float


def measure_tiles(
    source: datasets.Dataset,
    plan: TilePlan,
    seed: int,
    reading: Reading,
    channels: int | None = None,
    max_pixels: int = MAX_PIXELS,
    measure: Callable[..., ImageStatistics] = measure_images,
) -> MeasuredTiles:
    """Statistics of up to `SAMPLED_TILES` tiles that are not empty, from which a run's defaults follow.

    Args:
        seed: of the draws.
        reading, channels, max_pixels: as of `measure_images`.
        measure: `measure_images` or one like it.

    Raises:
        ValueError: as `sample_tiles` and `measure_images`.
    """
    options = {"channels": channels, "max_pixels": max_pixels, "num_images": len(plan)}
    how = (channels, max_pixels, replace(reading, range="image", transform="none"))
    tiles, share = sample_tiles(source, plan, SAMPLED_TILES, seed, how)
    statistics = measure(tiles, reading=reading, **options)
    if statistics.reading.is_deep:  # which tiles are empty depends on the range
        how = (statistics.channels, max_pixels, statistics.reading)
        tiles, share = sample_tiles(source, plan, SAMPLED_TILES, seed, how)
        statistics = measure(tiles, reading=statistics.reading, **options)
    return MeasuredTiles(tiles, statistics, share)


class TiledSamples(ImageSamples):
    """Samples of tiles by (epoch, index): as of `ImageSamples`, with `empty_tiles`, the number of empty ones that were drawn
    before.

    Args:
        source: of the images that the plan was made for.
        plan: their tiles.
        view, channels, seed, max_pixels, reading, further: as of `ImageSamples`.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        plan: TilePlan,
        view: View,
        channels: int,
        seed: int,
        max_pixels: int = MAX_PIXELS,
        reading: Reading = STRETCHED,
        further: Sequence[View] = (),
    ) -> None:
        super().__init__(source, view, channels, seed, False, max_pixels, reading, further)
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def source_row(self, index: int) -> int:
        return self.plan.rows[self.plan.image_of(index)]

    def replacement(self, generator: random.Random) -> int:
        return generator.randrange(len(self.plan))

    def name_of(self, index: int) -> str:
        return super().name_of(self.source_row(index))

    def view_of(self, index: int, generator: random.Random) -> dict:
        how = (self.channels, self.max_pixels, self.reading)
        tile = draw_tile(self.source, self.plan, index, generator, how)
        gray_copies = [self.name_of(index)] if tile.picture.loses_color else []
        sample = {"image": self.view(tile.picture, generator), "gray_copies": gray_copies, "empty_tiles": tile.num_empty}
        return sample | further_views(tile.picture, self.further, generator)


class TileWalk:
    """The tiles that cover each image of a source, row by row, as rows of records, by their numbers. A tile is made where
    it is asked for: the slides of a study have millions.

    Args:
        source: of the images that the plan was made for.
        plan: their tiles.
        overlap: of neighbors, as a share of their sides, or more.
    """

    def __init__(self, source: datasets.Dataset, plan: TilePlan, overlap: float) -> None:
        self.rows, self.plan = Rows(source), plan
        self.starts = [
            tuple(tile_starts(length, image.side, overlap) for length in image.level_size) for image in plan.images
        ]
        self.ends = np.cumsum([len(tops) * len(lefts) for tops, lefts in self.starts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> dict[str, Record]:
        image, tile = self.find(number)
        return {"image": tile_record(self.rows[self.plan.rows[image]]["image"], tile)}

    def place(self, number: int) -> tuple[int, int, int, int]:
        """(x, y, width, height) of a tile in pixels of the full resolution."""
        image, tile = self.find(number)
        return self.plan.images[image].full_resolution(tile)

    def find(self, number: int) -> tuple[int, Tile]:
        """The number of a tile's image, and the tile.

        Raises:
            IndexError: beyond the last one.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"tile {number} of {len(self)}")
        image = int(np.searchsorted(self.ends, number, side="right"))
        tops, lefts = self.starts[image]
        down, across = divmod(number - (int(self.ends[image - 1]) if image else 0), len(lefts))
        return image, self.plan.images[image].at(tops[down], lefts[across])


def check_overlap(overlap: float) -> None:
    """Refuse an overlap of tiles that is none.

    Raises:
        ValueError: naming it.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap:g}: give the share of a tile's side that neighbors share, 0 or more, below 1")


def tile_starts(length: int, side: int, overlap: float) -> list[int]:
    """First pixels of tiles that cover a length: evenly spread, the last one at its end."""
    if length <= side:
        return [0]
    count = math.ceil((length - side) / max(1, math.floor(side * (1 - overlap)))) + 1
    return [round(number * (length - side) / (count - 1)) for number in range(count)]
