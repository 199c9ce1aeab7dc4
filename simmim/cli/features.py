"""The commands about a frozen encoder's features: embed, probe, knn."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmim.cli.arguments import parse


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
    tile: int | None = None
    overlap: float = 0.25
    tile_level: int | None = None
    pixel_size: float | None = None
    max_background: float = 0.95


def run_embed(words: Sequence[str]) -> None:
    """simmim embed"""
    options = parse("embed", EmbedOptions, words)
    from simmim.checkpoints import read_encoder
    from simmim.evaluate import EncoderPass, write_embeddings
    from simmim.reading import tile_settings
    from simmim.training.trainer import device_type

    result = write_embeddings(
        read_encoder(options.run),
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
    empty = f"{result.num_empty:,} tiles of background left out, " if result.num_empty else ""
    print(
        f"{result.count:,} vectors of {result.dim:,} values, {empty}{len(result.unreadable):,} {noun} unreadable: "
        f"{options.out}"
    )


@dataclass(frozen=True)
class CompareOptions:
    """The stages of a frozen encoder compared on labeled images.

    Args:
        run: run folder, or an encoder in any known format.
        data: labeled images, in any form that finetune reads.
        labels_per_class: training images per class; all by default.
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
        untrained: compare with the same encoder with random weights, which doubles the time of encoding.
        scaling: of the pooled features by the training images: none, standardized, whitened; or auto for the one that
            cross-validation on the training labels chooses. Logistic regression standardizes in any case.
    """

    run: str
    data: str
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
    from simmim.checkpoints import read_encoder
    from simmim.evaluate import Comparison, EncoderPass, check_report_file, compare, write_report
    from simmim.training.trainer import device_type

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
    encoder_pass = EncoderPass(options.batch_size, options.workers, device_type())
    report = compare(read_encoder(options.run), comparison, encoder_pass)
    print_unreadable(report.unreadable)
    print(report.table())
    if report.unreadable:
        print(f"\n{len(report.unreadable):,} images unreadable and left out")
    if options.out:
        print(f"\nresults: {write_report(report, options.out)}")


def print_unreadable(unreadable: Mapping[str, str]) -> None:
    """Print on stderr which images could not be read, and why."""
    for path, reason in unreadable.items():
        print(f"not read: {path}: {reason}", file=sys.stderr)
