"""Fine-tuning from a pre-trained encoder against training from scratch with few labeled scenes: mean IoU, paired by seed.

    python benchmarks/scenes.py --out scenes
    simmim pretrain --config configs/pretrain/scenes.yaml --data scenes/unlabeled --out scenes/pretrain
    python benchmarks/segmentation.py --scenes scenes --init scenes/pretrain --out scenes/study

Both arms have the same architecture, labels, views, steps and batches. Each arm's learning rate and layer decay are the best
of the same grid, by training scenes that are held out for this. The scenes of labeled/val judge the arms and choose nothing.
The training scenes are divided: no scene is in the draws of two seeds, or in a draw and in the tuning. The arms are compared
at the last step, not at the best one.

Writes OUT/draws (the scenes of every draw), OUT/results (a file for each fine-tuning) and OUT/results.csv, and prints the
table. A later call does not repeat a fine-tuning whose settings, scenes, label maps and encoder are the same. Others are
computed anew.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from simmim.files import atomic_write
from simmim.finetune.label_study.pool import run_in_pool, trial_pool
from simmim.finetune.label_study.report import check_libraries, comparison_table
from simmim.finetune.segmentation.settings import SegmentationSettings

ARMS = ("pre-trained", "from scratch")
METRICS = ("mean_iou", "pixel_accuracy")


# --- Scenes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneParts:
    """The training scenes by what they serve for; names of files, no name in two parts.

    Attributes:
        tuning_validation: judge the learning rates and layer decays.
        tuning: one part for each tuning seed, in the order in which labels are taken.
        comparison: one part for each seed of the comparison.
    """

    tuning_validation: tuple[str, ...]
    tuning: tuple[tuple[str, ...], ...]
    comparison: tuple[tuple[str, ...], ...]


def divide_scenes(
    names: Sequence[str], labels: int, num_seeds: int, num_tuning_seeds: int, num_validation: int
) -> SceneParts:
    """Divide training scenes at random, the same way in every call.

    Args:
        labels: scenes of each draw, the largest number that is compared; a draw of fewer is the first ones of it.

    Raises:
        ValueError: when there are too few.
    """
    needed = num_validation + labels * (num_seeds + num_tuning_seeds)
    if len(names) < needed:
        raise ValueError(
            f"{len(names)} training scenes, {needed} needed: {num_validation} to judge the tuning, and "
            f"{num_seeds + num_tuning_seeds} draws of {labels} that share no scene: benchmarks/scenes.py "
            f"--train {needed}, or fewer --labels or --seeds"
        )
    shuffled = [str(name) for name in np.random.default_rng(0).permutation(sorted(names))]
    draws = [tuple(shuffled[num_validation + labels * draw :][:labels]) for draw in range(num_tuning_seeds + num_seeds)]
    return SceneParts(tuple(shuffled[:num_validation]), tuple(draws[:num_tuning_seeds]), tuple(draws[num_tuning_seeds:]))


def write_draw(labeled: Path, train: Sequence[str], validation: Sequence[str] | None, folder: Path) -> Path:
    """Copy the scenes of a draw to FOLDER/train and FOLDER/val, which `simmim finetune segmentation` reads.

    Args:
        labeled: folder of `benchmarks/scenes.py`.
        train: names of training scenes.
        validation: names of training scenes that judge; None for the scenes of labeled/val.
    """
    if folder.exists():
        shutil.rmtree(folder)
    judges = labeled / ("val" if validation is None else "train")
    names = sorted(file.name for file in (judges / "images").iterdir()) if validation is None else validation
    for part, source, scenes in (("train", labeled / "train", train), ("val", judges, names)):
        for content in ("images", "masks"):
            (folder / part / content).mkdir(parents=True)
            for scene in scenes:
                shutil.copy(source / content / scene, folder / part / content)
    shutil.copy(labeled / "classes.txt", folder)
    return folder


def checksum_of_files(folder: Path) -> str:
    """SHA-256 of the names and contents of all files: images, label maps and class names."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


# --- Fine-tunings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One fine-tuning.

    Attributes:
        labels: number of labeled scenes.
        lr: learning rate per 512 images.
        tuning: the trial serves only to choose the learning rate and layer decay.
    """

    arm: str
    labels: int
    seed: int
    lr: float
    layer_decay: float
    tuning: bool

    @property
    def draw(self) -> str:
        """Name of the folder of its scenes."""
        return f"{'tuning' if self.tuning else 'comparison'}-{self.labels}-labels-seed-{self.seed}"

    @property
    def name(self) -> str:
        """Unique in the benchmark; names its files."""
        return f"{self.draw}-{self.arm.replace(' ', '-')}-lr-{self.lr:g}-decay-{self.layer_decay:g}"


@dataclass(frozen=True)
class Study:
    """What all fine-tunings share.

    Args:
        out: folder to make or to continue in.
        scenes: folder of `benchmarks/scenes.py`.
        init: the encoder, as for `--init`.
        config: recipe of the fine-tuning.
    """

    out: Path
    scenes: Path
    init: str
    config: Path
    steps: int

    def settings(self, trial: Trial) -> SegmentationSettings:
        """Settings of a trial."""
        from simmim.cli.train import finetune_settings

        words = ["--config", str(self.config), "--data", str(self.out / "draws" / trial.draw)]
        words += ["--out", str(self.out / "runs" / trial.name), "--seed", str(trial.seed), "--overwrite"]
        words += ["--steps", str(self.steps), "--validations", "1"]
        words += ["--optim.lr", str(trial.lr), "--optim.layer_decay", str(trial.layer_decay)]
        words += ["--init", self.init] if trial.arm == ARMS[0] else ["--init", "none", "--encoder.like", self.init]
        settings = finetune_settings("segmentation", words)
        assert isinstance(settings, SegmentationSettings)
        return settings

    def write_draws(self, trials: Sequence[Trial], parts: SceneParts) -> dict[str, str]:
        """Write the scenes of all trials, and return the checksum of each draw by its name."""
        labeled, checksums = self.scenes / "labeled", {}
        for trial in {trial.draw: trial for trial in trials}.values():
            train = (parts.tuning if trial.tuning else parts.comparison)[trial.seed][: trial.labels]
            folder = self.out / "draws" / trial.draw
            write_draw(labeled, train, parts.tuning_validation if trial.tuning else None, folder)
            checksums[trial.draw] = checksum_of_files(folder)
        return checksums

    def identities(self, trials: Sequence[Trial], parts: SceneParts) -> dict[Trial, dict[str, Any]]:
        """All that the result of each trial depends on, as it reads back from JSON."""
        from simmim import __version__
        from simmim.checkpoints import read
        from simmim.finetune.label_study.arms import fingerprint_of
        from simmim.training.run_folder import MAY_CHANGE_ON_RESUME, plain

        checksums, fingerprint = self.write_draws(trials, parts), fingerprint_of(read(self.init).encoder)
        found = {}
        for trial in trials:
            settings = {
                name: value for name, value in plain(self.settings(trial)).items() if name not in MAY_CHANGE_ON_RESUME
            }
            settings["data"]["path"] = None  # its content counts, not its place
            identity = {
                "settings": settings,
                "scenes": checksums[trial.draw],
                "encoder": fingerprint,
                "version": __version__,
            }
            found[trial] = json.loads(json.dumps(identity))
        return found

    def run(self, trials: Sequence[Trial], parts: SceneParts, pool: Executor | None) -> dict[Trial, dict[str, float]]:
        """The metrics of each trial: those that OUT/results holds of the same identity, the others computed."""
        identities = self.identities(trials, parts)
        done = {trial: metrics for trial in trials if (metrics := self.stored(trial, identities[trial])) is not None}
        missing = [trial for trial in trials if trial not in done]
        outdated = sum(self.result_file(trial).is_file() for trial in missing)
        if outdated:
            print(f"computed anew: {outdated} results of other settings, scenes or weights", flush=True)
        with tqdm(total=len(missing), unit="run") as bar:
            for trial, metrics in run_in_pool(pool, partial(run_trial, self), missing):
                done[trial] = metrics
                with atomic_write(self.result_file(trial)) as temporary:
                    content = {"identity": identities[trial], "metrics": metrics}
                    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
                bar.set_postfix_str(f"{trial.arm}, {trial.labels} labels: {metrics['mean_iou']:.1%}")
                bar.update()
        return {trial: done[trial] for trial in trials}

    def stored(self, trial: Trial, identity: dict[str, Any]) -> dict[str, float] | None:
        """The metrics that an earlier call stored; None where there are none, or they are of another identity."""
        if not self.result_file(trial).is_file():
            return None
        stored = json.loads(self.result_file(trial).read_text(encoding="utf-8"))
        return stored["metrics"] if stored["identity"] == identity else None

    def result_file(self, trial: Trial) -> Path:
        """Where the metrics of a trial are stored."""
        folder = self.out / "results"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{trial.name}.json"


def run_trial(study: Study, trial: Trial) -> dict[str, float]:
    """Fine-tune, and return the validation metrics of the last step."""
    from simmim.finetune.run import finetune

    metrics = finetune(study.settings(trial), quiet=True).metrics
    return {name: metrics[name] for name in METRICS}


# --- Comparison --------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """A trial as `comparison_table` takes it; the score is mean IoU in [0, 1]."""

    arm: str
    labels: int
    seed: int
    score: float


def results_table(done: dict[Trial, dict[str, float]]) -> str:
    """A Markdown table, one row per number of labels: mean IoU ± standard error of both arms and their paired gain, in
    percent."""
    scores = [Score(trial.arm, trial.labels, trial.seed, metrics["mean_iou"]) for trial, metrics in done.items()]
    labels = sorted({score.labels for score in scores})
    return comparison_table(scores, ARMS, labels, unit="labeled scenes", show_won=True)


def write_csv(file: Path, done: dict[Trial, dict[str, float]]) -> None:
    """One row for each fine-tuning."""
    with file.open("w", newline="", encoding="utf-8") as text:
        rows = [{**asdict(trial), **metrics} for trial, metrics in done.items()]
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune both arms, compare them, and print the table. Exit code 2 if there are too few scenes."""
    options = parse(arguments)
    check_libraries()
    study = Study(options.out, options.scenes, options.init, options.config, options.steps)
    names = [file.name for file in (options.scenes / "labeled/train/images").iterdir()]
    num_tuning = options.tuning_seeds if len(options.lrs) * len(options.layer_decays) > 1 else 0
    num_validation = options.tuning_scenes if num_tuning else 0
    try:
        parts = divide_scenes(names, max(options.labels), options.seeds, num_tuning, num_validation)
    except ValueError as error:
        print(f"segmentation: {error}", file=sys.stderr)
        return 2
    grid = [
        Trial(arm, labels, seed, lr, layer_decay, True)
        for labels in options.labels
        for arm in ARMS
        for lr in options.lrs
        for layer_decay in options.layer_decays
        for seed in range(num_tuning)
    ]
    with trial_pool(options.processes) as pool:
        tuned = study.run(grid, parts, pool)
        trials = []
        for labels in options.labels:
            for arm in ARMS:
                best, means = best_rates(tuned, arm, labels) if tuned else ((options.lrs[0], options.layer_decays[0]), {})
                listed = ", ".join(f"{lr:g} and {decay:g}: {mean:.1%}" for (lr, decay), mean in means.items())
                print(
                    f"{arm}, {labels} labels: learning rate {best[0]:g} per 512 images and layer decay {best[1]:g}, "
                    f"of {listed or 'these alone'}",
                    flush=True,
                )
                trials += [Trial(arm, labels, seed, *best, False) for seed in range(options.seeds)]
        compared = study.run(trials, parts, pool)
    write_csv(options.out / "results.csv", {**tuned, **compared})
    print(f"\nmean IoU in percent, mean ± standard error\n\n{results_table(compared)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=Path, required=True, help="folder of benchmarks/scenes.py")
    parser.add_argument("--init", required=True, help="run folder of the pre-training")
    parser.add_argument("--out", type=Path, required=True, help="folder to make or to continue in")
    parser.add_argument("--config", type=Path, default=root / "configs/finetune/scenes-segmentation.yaml")
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.24, 0.48, 0.96], help="grid, per 512 images")
    parser.add_argument("--layer-decays", type=float, nargs="+", default=[0.65, 0.9], help="grid")
    parser.add_argument("--tuning-seeds", type=int, default=1)
    parser.add_argument("--tuning-scenes", type=int, default=100, help="training scenes that judge the tuning")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--processes", type=int, default=2, help="fine-tunings at a time; 0: in this process")
    return parser.parse_args(arguments)


def best_rates(
    tuned: dict[Trial, dict[str, float]], arm: str, labels: int
) -> tuple[tuple[float, float], dict[tuple[float, float], float]]:
    """Learning rate and layer decay with the highest mean IoU over the seeds, and the means of all pairs in the order of the
    grid."""
    values: dict[tuple[float, float], list[float]] = {}
    for trial, metrics in tuned.items():
        if (trial.arm, trial.labels) == (arm, labels):
            values.setdefault((trial.lr, trial.layer_decay), []).append(metrics["mean_iou"])
    means = {rates: statistics.fmean(of_rates) for rates, of_rates in values.items()}
    return max(means, key=means.__getitem__), means


if __name__ == "__main__":
    sys.exit(main())
