"""The commands about a frozen encoder's features: embed, probe, knn."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from simmim.cli.arguments import UsageError, parse
from simmim.messages import counted

if TYPE_CHECKING:
    from simmim.checkpoints.checkpoint import SavedEncoder

MAX_LINES = 20  # of images that cannot be read, on a terminal


@dataclass(frozen=True)
class EmbedOptions:
    """One vector per image, to Parquet.

    Args:
        run: run folder, or an encoder in any known format.
        images: folder of images, or any other source that pretrain reads.
        out: Parquet file to write, with columns path and vector; must not exist yet.
        stage: stage whose feature map is pooled, from 0; by default the last one after the final norm.
        pooling: mean of the map, or 2x2 for the means of its quarters.
        batch_size: images per forward pass.
        workers: processes that load images; by default what suits the machine.
        views: crops of each image over which its vector is averaged: 1; 5, the central one and those in the corners; 10,
            these and their mirror images. By default the encoder's, which is 1 after pre-training.
        crop: share of the sides of each; by default the encoder's, and 0.75 where that is 1 and views are several.
        tile: side in pixels of tiles, each of which gets a vector, with columns x, y, width and height in pixels of the full
            resolution; by default images are read whole.
        overlap: of neighboring tiles, as a share of their sides.
        tile_level: as data.tile_level of pretrain.
        pixel_size: as data.pixel_size of pretrain.
        max_background: as data.max_background of pretrain; 1 leaves out no tile.
    """

    run: str
    images: str
    out: str = "embeddings.parquet"
    stage: int | None = None
    pooling: str = "mean"
    batch_size: int = 64
    workers: int | None = None
    views: int | None = None
    crop: float | None = None
    tile: int | None = None
    overlap: float = 0.25
    tile_level: int | None = None
    pixel_size: float | None = None
    max_background: float = 0.95


def run_embed(words: Sequence[str]) -> None:
    """simmim embed"""
    options = parse("embed", EmbedOptions, words)
    from simmim.checkpoints import read_encoder
    from simmim.evaluate import EncoderPass, see_crops, write_embeddings
    from simmim.reading import tile_settings
    from simmim.training.devices import device_type

    if options.tile is not None and (options.views, options.crop) != (None, None):
        raise UsageError("views and crop are of whole images, tile reads parts of them: give one or the other")
    result = write_embeddings(
        see_crops(read_encoder(options.run), options.views, options.crop),
        options.images,
        options.out,
        stage=options.stage,
        pooling=options.pooling,
        options=EncoderPass(options.batch_size, options.workers, device_type()),
        tiles=tile_settings(options.tile, options.tile_level, options.pixel_size, options.max_background),
        overlap=options.overlap,
    )
    print_unreadable(result.unreadable)
    noun = "images" if options.tile is None else "tiles"
    empty = f"{counted(result.num_empty, 'tile')} of background left out, " if result.num_empty else ""
    print(
        f"{counted(result.count, 'vector')} of {counted(result.dim, 'value')}, {empty}{len(result.unreadable):,} {noun} "
        f"unreadable: {options.out}"
    )


@dataclass(frozen=True)
class CompareOptions:
    """The stages of a frozen encoder compared on labeled images, and the encoder with others.

    Args:
        run: run folder, an encoder in any known format, or a folder of a network of timm or transformers.
        against: further encoders on the same labels, paths separated by commas; a table then says what each is and costs,
            and the paired difference.
        vectors: Parquet files, separated by commas, of vectors that others have computed, with columns path and vector, as
            embed writes them.
        data: labeled images, in any form that finetune reads.
        labels_per_class: training images per class, all of a class that has fewer; all by default.
        seed: of the random choice of labels, which is the same as finetune's with this seed.
        seeds: number of random choices of labels, from seed on; gives standard errors.
        stage: one stage, from 0, or final for the last one after the final norm.
        pooling: of each feature map, mean, or 2x2 for the means of its quarters.
        k: neighbors that vote.
        out: file that receives the results too, .json, .csv or .md; must not exist yet.
        batch_size: images per forward pass.
        workers: processes that load images; by default what suits the machine.
        column: holds the images, in sources with columns; detected by default.
        label_column: holds the labels; detected by default.
        views: crops of each image over which its features are averaged: 1; 5, the central one and those in the corners; 10,
            these and their mirror images. By default the encoder's, which is 1 after pre-training. Plain pixels are averaged
            alike.
        crop: share of the sides of each; by default the encoder's, and 0.75 where that is 1 and views are several.
        untrained: compare with the same encoder with random weights, which doubles the time of encoding.
        scaling: of the pooled features by the training images: none, standardized, whitened; or auto for the one that
            cross-validation on the training labels chooses. Logistic regression standardizes in any case.
    """

    data: str
    run: str | None = None
    against: str = ""
    vectors: str = ""
    labels_per_class: int | None = None
    seed: int = 0
    seeds: int = 1
    stage: str = "all"
    pooling: str = "all"
    k: int = 20
    out: str | None = None
    batch_size: int = 64
    workers: int | None = None
    column: str | None = None
    label_column: str | None = None
    views: int | None = None
    crop: float | None = None
    untrained: bool = True
    scaling: str = "none"


@dataclass(frozen=True)
class ProbeOptions(CompareOptions):
    """As `CompareOptions`.

    Args:
        head: linear, on the pooled map; attentive, learned queries over the tokens of each stage, which takes longer; or
            auto for the one that cross-validation on the training labels chooses.
    """

    head: str = "linear"


def run_probe(words: Sequence[str]) -> None:
    """simmim probe"""
    compare_stages(
        "probe", ProbeOptions, words, "Linear probe and k-NN of every stage of a frozen encoder, and the best stage."
    )


def run_knn(words: Sequence[str]) -> None:
    """simmim knn"""
    compare_stages(
        "knn", CompareOptions, words, "k-NN of every stage of a frozen encoder, and the best stage; nothing is fitted."
    )


def compare_stages(method: str, kind: type[CompareOptions], words: Sequence[str], purpose: str) -> None:
    """`simmim probe` and `simmim knn`."""
    options = parse(method, kind, words, purpose=purpose)
    encoders = [path for path in (options.run, *split_paths(options.against)) if path]
    files = split_paths(options.vectors)
    if not encoders and not files:
        raise UsageError(f"missing: give --run ENCODER, --vectors FILE, or both; simmim {method} --help lists all")
    from simmim.evaluate import (
        Comparison,
        Contest,
        EncoderPass,
        check_report_file,
        check_scipy,
        compare,
        compare_vectors,
        names_of,
        read_vectors,
        see_crops,
        write_contest,
    )
    from simmim.training.devices import device_type

    comparison = Comparison(
        options.data,
        method,
        options.labels_per_class,
        options.seed,
        options.seeds,
        options.stage,
        options.pooling,
        options.k,
        column=options.column,
        label_column=options.label_column,
        untrained=options.untrained,
        head=getattr(options, "head", "linear"),
        scaling=options.scaling,
    )
    if options.out:
        check_report_file(options.out)
    if len(encoders) + len(files) > 1 and options.seeds > 1:
        check_scipy()
    encoder_pass = EncoderPass(options.batch_size, options.workers, device_type())
    # All are read before the first is used: a wrong path must not cost the time of the others.
    reads = [partial(compare, see_crops(encoder_of(path), options.views, options.crop)) for path in encoders]
    reads += [partial(compare_vectors, read_vectors(path)) for path in files]
    contest = Contest(names_of([*encoders, *files]), tuple(read(comparison, encoder_pass) for read in reads))
    for report in contest.reports:
        print_unreadable(report.unreadable)
    print(contest.reports[0].table())
    if len(contest.reports) > 1:
        print(f"\n{contest.table()}")
    unreadable = contest.reports[0].unreadable
    if unreadable:
        print(f"\n{counted(len(unreadable), 'image')} unreadable and left out")
    if options.out:
        print(f"\nresults: {write_contest(contest, options.out)}")


def encoder_of(path: str) -> SavedEncoder:
    """The encoder at a path, with its preprocessing."""
    from simmim.checkpoints import read_encoder

    return read_encoder(path)


def split_paths(text: str) -> list[str]:
    """Paths separated by commas."""
    return [path.strip() for path in text.split(",") if path.strip()]


def print_unreadable(unreadable: Mapping[str, str]) -> None:
    """Print on stderr which images could not be read, and why; on a terminal the first of many."""
    most = MAX_LINES if sys.stderr.isatty() else len(unreadable)
    for path, reason in islice(unreadable.items(), most):
        print(f"not read: {path}: {reason}", file=sys.stderr)
    if len(unreadable) > most:
        print(f"not read: … and {len(unreadable) - most:,} more: simmim check-data --json lists all", file=sys.stderr)
