"""The commands that look at images: check-data, reconstruct, predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simmim.cli.arguments import parse
from simmim.cli.features import print_unreadable

TILES_AT_ONCE = 16  # of a forward pass in predict, whose logits are in memory


@dataclass(frozen=True)
class CheckDataOptions:
    """Count, measure and try to read every image before hours are spent. Exit code 1 when one cannot be read.

    Args:
        path: folder of images, or any other source that pretrain reads; also without its flag.
        column: holds the images, in sources with columns; detected by default.
        images_per_second: throughput of the model, for the number of loading processes that keep up with it.
        workers: reading processes; by default one per core.
        json: print JSON and nothing else.
        range: of deep values, as data.range of pretrain.
        transform: of deep values, as data.transform of pretrain.
        pages: as data.pages of pretrain.
        channel_files: as data.channel_files of pretrain.
        channels_used: as data.channels_used of pretrain.
        tile: as data.tile of pretrain.
        tile_level: as data.tile_level of pretrain.
        pixel_size: as data.pixel_size of pretrain.
        max_background: as data.max_background of pretrain.
    """

    path: str
    column: str | None = None
    tile: int | None = None
    tile_level: int | None = None
    pixel_size: float | None = None
    max_background: float = 0.95
    range: tuple[tuple[float, float], ...] | str = "auto"
    transform: str = "none"
    pages: str | None = None
    channel_files: str | None = None
    channels_used: tuple[int | str, ...] | None = None
    images_per_second: float | None = None
    workers: int | None = None
    json: bool = False


def run_check_data(words: Sequence[str]) -> int:
    """simmim check-data PATH"""
    options = parse("check-data", CheckDataOptions, words, positional="path")
    from simmim.cli.check_report import as_json, render
    from simmim.data import available_cores, open_images
    from simmim.data.check import check_images
    from simmim.data.label_map_sources import note_on_label_maps
    from simmim.reading import Reading, tile_settings
    from simmim.training.devices import device_type
    from simmim.training.settings import KEEP_DECODED_MIB

    reading = Reading(
        options.range, options.transform, options.pages, options.channel_files, channels_used=options.channels_used
    )
    report = check_images(
        open_images(options.path, options.column, reading),
        workers=available_cores() if options.workers is None else options.workers,
        path=options.path,
        device=device_type(),
        images_per_second=options.images_per_second,
        progress=not options.json,
        reading=reading,
        tiles=tile_settings(options.tile, options.tile_level, options.pixel_size, options.max_background),
        in_memory_mib=KEEP_DECODED_MIB,
    )
    print(as_json(report) if options.json else render(report))
    note = note_on_label_maps(options.path)
    if note and not options.json:
        print(f"\nnote         {note}")
    return 0 if report.sound else 1


@dataclass(frozen=True)
class ReconstructOptions:
    """Original, masked, prediction pasted and full prediction of some images, side by side.

    Args:
        run: run folder of simmim pretrain.
        images: folder of images.
        out: picture to write; must not exist yet.
        count: number of images.
        seed: of the choice of images and of the masks.
    """

    run: str
    images: str
    out: str = "reconstructions.png"
    count: int = 8
    seed: int = 0


def run_reconstruct(words: Sequence[str]) -> None:
    """simmim reconstruct"""
    options = parse("reconstruct", ReconstructOptions, words)
    from simmim.pretrain.reconstruct import reconstruct

    path = reconstruct(options.run, options.images, options.out, options.count, options.seed)
    print(f"reconstructions: {path}")


@dataclass(frozen=True)
class PredictOptions:
    """Classes, label maps or boxes of a folder of images, by a fine-tuned encoder.

    Args:
        run: run folder of simmim finetune.
        images: folder of images.
        out: CSV file to write, predictions.csv by default; a folder, predictions by default, in segmentation and
            detection. Must not exist yet.
        batch_size: images per forward pass.
        workers: processes that load images, in classification; by default what suits the machine.
        views: in classification, crops of each image over which the prediction is averaged: 1, 5 or 10, as
            data.evaluation_views of finetune, which is the default.
        crop: in classification, share of the sides of each; by default as data.evaluation_crop of finetune, and 0.75 where
            that is 1 and views are several.
        overlays: in segmentation and detection, write the label maps' colors or the boxes over the images too.
        tile: in segmentation, side in pixels of tiles, by which images of any size are read and label maps written, as TIFF
            in tiles; by default images are read whole.
        overlap: of neighboring tiles, as a share of their sides.
        tile_level: as data.tile_level of pretrain; label maps have the level's size.
        pixel_size: as data.pixel_size of pretrain.
    """

    run: str
    images: str
    out: str | None = None
    batch_size: int = 64
    workers: int | None = None
    views: int | None = None
    crop: float | None = None
    overlays: bool = True
    tile: int | None = None
    overlap: float = 0.25
    tile_level: int | None = None
    pixel_size: float | None = None


def run_predict(words: Sequence[str]) -> None:
    """simmim predict"""
    options = parse("predict", PredictOptions, words)
    from simmim.finetune.registry import task_of_model
    from simmim.reading import tile_settings

    task = task_of_model(options.run)
    tiles = tile_settings(options.tile, options.tile_level, options.pixel_size)
    of_crops = (options.views, options.crop)
    if any(value is not None for value in of_crops):
        if tiles is not None:
            raise ValueError("views and crop are of whole images, tile reads parts of them: give one or the other")
        predictions = task.predict_views(
            options.run, options.images, options.out, options.batch_size, options.workers, *of_crops
        )
    elif tiles is None:
        predictions = task.predict(
            options.run, options.images, options.out, options.batch_size, options.workers, options.overlays
        )
    else:
        of_tiles = (min(options.batch_size, TILES_AT_ONCE), tiles, options.overlap)
        predictions = task.predict_tiles(options.run, options.images, options.out, *of_tiles)
    print_unreadable(predictions.unreadable)
    print(predictions.summary)
