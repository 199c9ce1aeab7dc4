"""`simmim probe` and `simmim knn`: every feature of an encoder on labeled images, over several draws of labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from simmim.checkpoints.checkpoint import SavedEncoder
from simmim.data import LabeledSource, open_labeled_source
from simmim.data.duplicates import report_shared
from simmim.encoders.base import Encoder, EncoderConfig, Size
from simmim.encoders.heads import HEADS
from simmim.evaluate.attentive import Tokens
from simmim.evaluate.embeddings import DEFAULT_PASS, Embeddings, EncoderPass
from simmim.evaluate.facts import EncoderFacts, facts_of, trained_on
from simmim.evaluate.features import AnyFeature, Pixels, select_features
from simmim.evaluate.labeled import Draw, Pools, draw_labels, embed_pools, pool_draws, unreadable_images
from simmim.evaluate.neighbors import check_knn_settings
from simmim.evaluate.probe import check_scikit_learn
from simmim.evaluate.scaling import SCALINGS, scaled_split
from simmim.evaluate.scores import METHODS, FeatureScores, best_score, estimate, mean_scores, score_features, scores_table
from simmim.evaluate.single_files import suit_model
from simmim.evaluate.untrained import score_untrained, untrained_encoder
from simmim.evaluate.vectors import VectorFile
from simmim.files import atomic_write
from simmim.messages import counted, did_you_mean

SUFFIXES = (".json", ".csv", ".md")


@dataclass(frozen=True)
class Comparison:
    """What is compared, on which images.

    Args:
        data: labeled images, as of `simmim.data.read_labeled_images`.
        method: probe, with k-NN beside it, or knn alone.
        labels_per_class: training images per class, all of a class that has fewer; None for all.
        seed: of the first draw of labels, which is that of fine-tuning with the same seed.
        seeds: number of draws, with the seeds seed, seed + 1, ….
        stage, pooling: of which features, as of `select_features`.
        k, temperature: as of `knn_predict`.
        column, label_column: names of the columns with image and label; found by default.
        untrained: compare with the same encoder with random weights, too.
        head: of the probe: linear, on pooled features; attentive, on the tokens of each stage; auto for both, of which
            cross-validation on the training labels chooses.
        scaling: one of `SCALINGS` for the pooled features; auto for all, of which cross-validation chooses.

    Raises:
        ValueError: for values out of range.
    """

    data: str
    method: str = "probe"
    labels_per_class: int | None = None
    seed: int = 0
    seeds: int = 1
    stage: str = "all"
    pooling: str = "all"
    k: int = 20
    temperature: float = 0.07
    column: str | None = None
    label_column: str | None = None
    untrained: bool = True
    head: str = "linear"
    scaling: str = "none"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: give {' or '.join(METHODS)}")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(f"labels_per_class is {self.labels_per_class}: give 1 or more, or leave it out for all")
        check_knn_settings(self.k, self.temperature)
        for name, known in (("head", (*HEADS, "auto")), ("scaling", (*SCALINGS, "auto"))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}{did_you_mean(getattr(self, name), known)}")
        if self.head != "linear" and self.method == "knn":
            raise ValueError(f"head is {self.head}: k-NN fits nothing, so leave it out or use the method probe")

    @property
    def scalings(self) -> tuple[str, ...]:
        """The scalings to compare. The probe standardizes in any case."""
        if self.scaling != "auto":
            return (self.scaling,)
        return SCALINGS if self.method == "knn" else tuple(name for name in SCALINGS if name != "standardized")

    def features(self, config: EncoderConfig, image_size: Size) -> tuple[AnyFeature, ...]:
        """The features of an encoder that are compared.

        Raises:
            ValueError: as `select_features`.
        """
        pooled = select_features(config, image_size, self.stage, self.pooling)
        tokens = (Tokens(image_size, stage) for stage in dict.fromkeys(feature.stage for feature in pooled))
        return (*(pooled if self.head != "attentive" else ()), *(tokens if self.head != "linear" else ()))


@dataclass(frozen=True)
class Report:
    """The result of a comparison.

    Attributes:
        comparison: what was asked for.
        encoder: where the encoder was read from.
        provenance: how the encoder was trained, as far as its files tell.
        classes: names, in the order of the labels.
        counts: number of training and of test images that could be read, on average over the draws.
        draws: scores of each draw.
        seeds: of the draws.
        facts: what the encoder is and costs.
        unreadable: reason by path of each image that could not be read.
    """

    comparison: Comparison
    encoder: str
    provenance: Mapping
    classes: tuple[str, ...]
    counts: tuple[float, float]
    draws: tuple[FeatureScores, ...]
    seeds: tuple[int, ...]
    facts: EncoderFacts
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """A line about the images, one about the encoder, then `scores_table`."""
        count, (train, test) = self.comparison.labels_per_class, self.counts
        labels = "all labels" if count is None else f"{counted(count, 'label')} per class"
        draws = f", mean ± standard error over {len(self.draws)} draws" if len(self.draws) > 1 else ""
        table = scores_table(*self.draws, num_images=self.provenance.get("images"))
        return (
            f"Accuracy in percent on {test:,.0f} images; {train:,.0f} to train on, {len(self.classes)} classes, "
            f"{labels}{draws}.\nEncoder: {self.facts.sentence()}.\n\n{table}"
        )

    def as_dict(self) -> dict:
        """Everything as plain values for JSON; accuracies in [0, 1]."""
        best = best_score(mean_scores(self.draws), self.draws[0].baseline)
        return {
            "encoder": self.encoder,
            "facts": self.facts.as_dict(),
            "provenance": dict(self.provenance),
            **asdict(self.comparison),
            "classes": list(self.classes),
            "train_images": self.counts[0],
            "test_images": self.counts[1],
            "unreadable": dict(self.unreadable),
            "chosen": best.name if best else None,
            "baseline": self.draws[0].baseline,
            "untrained": [scores.untrained and scores.untrained._asdict() for scores in self.draws],
            "features": [
                {
                    "feature": row.name,
                    "values": row.dim,
                    "converged": row.converged,
                    **{name: self.statistics(row.name, name) for name in ("knn", "probe", "cross_validated")},
                    "c": [scores.row(row.name).c for scores in self.draws],
                }
                for row in self.draws[0].rows
            ],
        }

    def statistics(self, feature: str, field: str) -> dict | None:
        """Mean, standard error and each value over the draws of a field of `FeatureScore`; None where one is missing."""
        each = [getattr(scores.row(feature), field) for scores in self.draws]
        return None if None in each else {**estimate(each)._asdict(), "each": each}


def compare(saved: SavedEncoder, comparison: Comparison, options: EncoderPass = DEFAULT_PASS, quiet: bool = False) -> Report:
    """Encode the images of all draws, each once, and score every feature and plain pixels with every draw. Once more with
    random weights, where the comparison asks for it.

    All features of all these images are in memory: 45 KB per image for SwinV2-T with every feature, twice where it is
    compared with random weights.

    Args:
        quiet: show no progress bars.

    Raises:
        ValueError: for labeled data that cannot be used, an unknown stage, or more draws than there are; when scikit-learn
            is needed and not installed.
    """
    if comparison.method == "probe":
        check_scikit_learn()
    saved = suit_model(saved, comparison.data)
    config, preprocessing = saved.encoder.config, saved.preprocessing
    features = (*comparison.features(config, preprocessing.image_size), pixels := Pixels(preprocessing.image_size))
    attentive = {feature.name: feature.channels(config) for feature in features if isinstance(feature, Tokens)}
    columns = comparison.column, comparison.label_column
    source = open_labeled_source(comparison.data, *columns, preprocessing.reading_or_default)
    draws = draw_all(source, comparison)
    pools = pool_draws(source, draws)
    passes: list[tuple[Encoder, tuple[AnyFeature, ...]]] = [(saved.encoder, features)]
    if comparison.untrained:
        passes.append((untrained_encoder(config, saved.provenance.get("seed", comparison.seed)), features[:-1]))
    num_images = sum(len(part.rows) for part in pools.parts) * len(passes)
    with tqdm(total=num_images, desc="embedding", unit="image", disable=quiet) as bar:
        embedded, *untrained = [
            embed_pools(encoder, preprocessing, pools, chosen, options, bar.update) for encoder, chosen in passes
        ]
    return score_draws(
        comparison,
        source,
        draws,
        pools,
        Scored(embedded, untrained[0] if untrained else None, attentive, pixels.name),
        (str(saved.report.source), saved.provenance, facts_of(config, preprocessing, saved.provenance)),
        options,
        quiet,
    )


def compare_vectors(
    file: VectorFile, comparison: Comparison, options: EncoderPass = DEFAULT_PASS, quiet: bool = False
) -> Report:
    """As `compare`, of vectors that exist already: one feature, on the same draws, without plain pixels and without an
    untrained encoder beside it.

    Raises:
        ValueError: as `compare`, and when images of the labels have no vector.
    """
    if comparison.method == "probe":
        check_scikit_learn()
    source = open_labeled_source(comparison.data, comparison.column, comparison.label_column)
    draws = draw_all(source, comparison)
    pools = pool_draws(source, draws)
    origin = file.origin.get("provenance", {})
    known = (
        str(file.source),
        origin,
        EncoderFacts(f"vectors of {file.vectors.shape[1]:,} values", trained_on=trained_on(origin)),
    )
    scored = Scored(file.of_pools(pools), None, {}, None)
    return score_draws(comparison, source, draws, pools, scored, known, options, quiet)


class Scored(NamedTuple):
    """Vectors to be scored.

    Attributes:
        embedded: of each of the pools' parts.
        untrained: the same of the encoder with random weights; None where it was not asked for.
        attentive: as of `score_features`.
        baseline: name of the feature to compare with; None for none.
    """

    embedded: Sequence[Embeddings]
    untrained: Sequence[Embeddings] | None
    attentive: Mapping[str, int]
    baseline: str | None


def score_draws(
    comparison: Comparison,
    source: LabeledSource,
    draws: Sequence[Draw],
    pools: Pools,
    scored: Scored,
    known: tuple[str, Mapping, EncoderFacts],
    options: EncoderPass,
    quiet: bool,
) -> Report:
    """The report on vectors that have been computed.

    Args:
        known: where they come from, the provenance, and the facts.
    """
    scores, counts = [], []
    attentive, fixed = scored.attentive, (*scored.attentive, *((scored.baseline,) if scored.baseline else ()))
    num_features = len(scored.embedded[0].vectors)
    num_fits = len(fixed) + (num_features - len(fixed)) * len(comparison.scalings)
    with tqdm(total=len(draws) * num_fits, desc=comparison.method, unit="fit", disable=quiet) as bar:
        for draw in draws:
            how = (comparison.method, comparison.k, comparison.temperature)
            split = scaled_split(pools.split(draw, scored.embedded), comparison.scalings, fixed)
            found = score_features(
                split,
                *how,
                progress=lambda row: bar.update(),
                baseline=scored.baseline,
                device=options.device,
                attentive=attentive,
            )
            if scored.untrained is not None:
                random = scaled_split(pools.split(draw, scored.untrained), comparison.scalings, tuple(attentive))
                found = replace(found, untrained=score_untrained(random, *how, options.device, attentive))
            scores.append(found)
            counts.append((len(split.train_labels), len(split.test_labels)))
    origin, provenance, facts = known
    return Report(
        comparison,
        origin,
        provenance,
        source.classes,
        (sum(train for train, _ in counts) / len(counts), sum(test for _, test in counts) / len(counts)),
        tuple(scores),
        tuple(draw.seed for draw in draws),
        facts,
        unreadable_images(scored.embedded),
    )


def draw_all(source: LabeledSource, comparison: Comparison) -> list[Draw]:
    """The draws of a comparison. Test images that are also among the training images of the first one are a `Notice`.

    Raises:
        ValueError: when all draws would be the same; as `draw_labels`.
    """
    most = max(map(len, source.rows.values()))
    takes_all = comparison.labels_per_class is None or comparison.labels_per_class >= most
    if comparison.seeds > 1 and takes_all and source.validation is not None:
        fewer = "labels_per_class" if comparison.labels_per_class is None else f"labels_per_class below {most:,}"
        raise ValueError(
            f"seeds is {comparison.seeds}, but with all labels of {comparison.data!r} and its own test images every draw is "
            f"the same: give {fewer}, or one seed"
        )
    seeds = range(comparison.seed, comparison.seed + comparison.seeds)
    draws = [draw_labels(source, comparison.labels_per_class, seed) for seed in seeds]
    test = source.train if source.validation is None else source.validation
    train, tested = source.train.select(draws[0].train.rows), test.select(draws[0].test.rows)
    report_shared(tested, {"the training images": train}, "test images")
    return draws


def check_report_file(out: str | Path) -> Path:
    """The path of a report to be written, checked before the results are computed.

    Raises:
        ValueError: when it exists, or its suffix is not one of `SUFFIXES`.
    """
    path = Path(out).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{str(out)!r} is of no known format: end it in {', '.join(SUFFIXES)}")
    if path.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    return path


def write_report(report: Report, out: str | Path) -> Path:
    """Write `out`, whole or not at all, in the format of its suffix: everything as JSON, a row per draw and feature as CSV,
    or the table as Markdown.

    Raises:
        ValueError: as `check_report_file`.
    """
    path = check_report_file(out)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            file.write(json.dumps(report.as_dict(), indent=2, default=str) + "\n")
        elif path.suffix == ".md":
            file.write(report.table() + "\n")
        else:
            writer = csv.writer(file)
            writer.writerow(["seed", "feature", "values", "knn", "probe", "c", "cross_validated", "converged", "chosen"])
            for seed, scores in zip(report.seeds, report.draws):
                writer.writerows([seed, *row, int(row == scores.best)] for row in scores.rows)
                if scores.untrained:
                    writer.writerow([seed, "untrained", *scores.untrained[1:], 0])
    return path
