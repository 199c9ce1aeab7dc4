"""What `simmim probe` and `simmim knn` do: every feature of an encoder on labeled images, over several draws of labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from simmim.checkpoints.checkpoint import SavedEncoder
from simmim.data import open_labeled_source
from simmim.evaluate.features import Pixels, chosen_features
from simmim.evaluate.labeled import all_unreadable, draw, embed_pools, pooled
from simmim.evaluate.neighbors import check_vote
from simmim.evaluate.probe import check_installed
from simmim.evaluate.stages import StageScores, estimate, knn_stages, mean_rows, probe_stages, stages_table, winner
from simmim.evaluate.vectors import DEFAULT_PASS, EncoderPass
from simmim.files import atomic_write

METHODS = ("probe", "knn")
ENDINGS = (".json", ".csv", ".md")


@dataclass(frozen=True)
class Comparison:
    """What is compared, on which images.

    Args:
        data: labeled images, as `simmim.data.read_labeled_images` takes them.
        method: probe, with k-NN beside it, or knn alone.
        labels_per_class: training images of each class; None for all.
        seed, seeds: so many draws of labels, with the seeds seed, seed + 1, …, each as fine-tuning draws them.
        stage, pooling: of which features, as of `chosen_features`.
        k, temperature: as of `knn_predict`.
        column, label_column: which columns hold image and label; found by default.

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

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: give {' or '.join(METHODS)}")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(f"labels_per_class is {self.labels_per_class}: give 1 or more, or leave it out for all")
        check_vote(self.k, self.temperature)


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        comparison: what was asked.
        encoder: where it was read from.
        provenance: where it comes from, as far as its files tell.
        classes: names, in the labels' order.
        counts: training and test images of a draw, on average over the draws, of those that could be read.
        draws: a score each.
        seeds: of the draws.
        unreadable: reason by path.
    """

    comparison: Comparison
    encoder: str
    provenance: Mapping
    classes: tuple[str, ...]
    counts: tuple[float, float]
    draws: tuple[StageScores, ...]
    seeds: tuple[int, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """As Markdown, with a line about the images."""
        asked, (train, test) = self.comparison, self.counts
        labels = "all labels" if asked.labels_per_class is None else f"{asked.labels_per_class} labels a class"
        draws = f", mean ± standard error over {len(self.draws)} draws" if len(self.draws) > 1 else ""
        said = f"Accuracy in percent on {test:,.0f} images; {train:,.0f} to train on, {len(self.classes)} classes, {labels}"
        return f"{said}{draws}.\n\n{stages_table(*self.draws)}"

    def as_dict(self) -> dict:
        """Everything, as JSON takes it; accuracies in [0, 1]."""
        best = winner(mean_rows(self.draws), self.draws[0].baseline)
        return {
            "encoder": self.encoder,
            "provenance": dict(self.provenance),
            **{name: getattr(self.comparison, name) for name in vars(self.comparison)},
            "classes": list(self.classes),
            "train_images": self.counts[0],
            "test_images": self.counts[1],
            "unreadable": dict(self.unreadable),
            "chosen": best.name if best else None,
            "baseline": self.draws[0].baseline,
            "features": [
                {
                    "feature": row.name,
                    "values": row.dim,
                    "converged": row.converged,
                    **{name: self.figures(row.name, name) for name in ("knn", "probe", "cross_validated")},
                    "c": [scores.row(row.name).c for scores in self.draws],
                }
                for row in self.draws[0].rows
            ],
        }

    def figures(self, feature: str, name: str) -> dict | None:
        """One figure of a feature: mean, standard error and each draw's; None where there is none."""
        each = [getattr(scores.row(feature), name) for scores in self.draws]
        return None if None in each else {**estimate(each)._asdict(), "each": each}


def compare(saved: SavedEncoder, asked: Comparison, how: EncoderPass = DEFAULT_PASS, quiet: bool = False) -> Report:
    """Encode the images of all draws, each once, and judge every feature by every draw, plain pixels beside them.

    In memory are all features of all images drawn: for SwinV2-T and every feature 45 KB an image.

    Args:
        quiet: show no bars.

    Raises:
        ValueError: for labeled data, an encoder's stage or draws that cannot be; scikit-learn not installed and asked for.
    """
    if asked.method == "probe":
        check_installed()
    preprocessing = saved.preprocessing
    pixels = Pixels(preprocessing.image_size)
    features = (*chosen_features(saved.encoder.config, preprocessing.image_size, asked.stage, asked.pooling), pixels)
    source = open_labeled_source(asked.data, asked.column, asked.label_column)
    if asked.seeds > 1 and asked.labels_per_class is None and source.validation is not None:
        raise ValueError(
            f"seeds is {asked.seeds}, and all labels of {asked.data!r} with its own test images are one draw and no more: "
            "give labels_per_class, or one seed"
        )
    draws = [draw(source, asked.labels_per_class, asked.seed + number) for number in range(asked.seeds)]
    pools = pooled(source, draws)
    with tqdm(total=sum(len(part.rows) for part in pools.parts), desc="embedding", unit="image", disable=quiet) as bar:
        embedded = embed_pools(saved.encoder, preprocessing, pools, features, how, bar.update)
    scores, counts = [], []
    with tqdm(total=len(draws) * len(features), desc=asked.method, unit="fit", disable=quiet) as bar:
        for drawn in draws:
            split = pools.split(drawn, embedded)
            given = (split.train, split.train_labels, split.test, split.test_labels, asked.k, asked.temperature)
            common = {"progress": lambda row: bar.update(), "baseline": pixels.name}
            if asked.method == "probe":
                scores.append(probe_stages(*given, seed=drawn.seed, **common))
            else:
                scores.append(knn_stages(*given, **common, device=how.device))
            counts.append((len(split.train_labels), len(split.test_labels)))
    return Report(
        asked,
        str(saved.report.source),
        saved.provenance,
        source.classes,
        tuple(sum(column) / len(counts) for column in zip(*counts)),
        tuple(scores),
        tuple(drawn.seed for drawn in draws),
        all_unreadable(embedded),
    )


def check_out(out: str | Path) -> Path:
    """The file that results are to go to, before they are computed.

    Raises:
        ValueError: when it exists, or its ending is of no kind that can be written.
    """
    path = Path(out).expanduser()
    if path.suffix not in ENDINGS:
        raise ValueError(f"{str(out)!r} is of no known kind: end it in {', '.join(ENDINGS)}")
    if path.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    return path


def write_report(report: Report, out: str | Path) -> Path:
    """Write `out`, whole or not at all: everything as JSON, a row for each draw and feature as CSV, or the table as
    Markdown, by its ending.

    Raises:
        ValueError: as `check_out`.
    """
    path = check_out(out)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            file.write(json.dumps(report.as_dict(), indent=2, default=str) + "\n")
        elif path.suffix == ".md":
            file.write(report.table() + "\n")
        else:
            writer = csv.writer(file)
            writer.writerow(["seed", "feature", "values", "knn", "probe", "c", "cross_validated", "converged", "chosen"])
            for seed, scores in zip(report.seeds, report.draws):
                writer.writerows([seed, *row, int(row == scores.winner)] for row in scores.rows)
    return path
