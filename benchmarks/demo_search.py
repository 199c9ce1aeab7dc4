"""Search for the demo's recipe, on digits that do not judge it.

    OMP_NUM_THREADS=1 python benchmarks/demo_search.py --out demo-search

Of the 4,000 digits that the demo trains on, 1,000 are held out here, to judge settings by. The demo's 1,000 test digits are
not even written. The labels are drawn by seeds that the demo does not use.

First each arm, pre-trained and from scratch, tries the learning rates with the recipe's layer decay, then the layer decays
with the best of these rates, after a pre-training by configs/pretrain/demo.yaml. With what an arm chose, other lengths and
augmentations are tried, one at a time; with what the pre-trained arm chose, other learning rates, lengths and mask units of
the pre-training. A score is the mean accuracy over seeds and numbers of labels, at the last step.

Prints all scores, with the standard error of the paired difference to the recipe where one setting differs from it, and what
to adopt, and says where a choice is the smallest or largest value that was tried. A later call does not repeat what OUT
holds of the same settings and weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from simmim.cli.demo import recipe_path
from simmim.cli.train import finetune_settings, pretrain_settings
from simmim.data.digits import DigitFolders, write_digits
from simmim.finetune.label_study.arms import Arm, fingerprint_of, scratch_settings
from simmim.finetune.label_study.pool import trial_pool
from simmim.finetune.label_study.results import Rates, Trial
from simmim.finetune.label_study.trials import build_job, run_jobs, run_trial

FIRST_SEED = 100  # the demo's seeds count from 0
ARMS = ("pre-trained", "from scratch")
RECIPE = "recipe"


def affine_words(factor: float) -> tuple[str, ...]:
    """The recipe's rotations, zooms, shears and shifts by a factor."""
    recipe = yaml.safe_load(recipe_path("finetune/demo.yaml").read_text(encoding="utf-8"))["data"]["affine"]
    return tuple(word for name, value in recipe.items() for word in (f"--data.affine.{name}", f"{factor * value:g}"))


# What differs from the recipes, each tried alone: words of the command line by what the tables call them.
PRETRAINING = {
    "learning rate 0.016": ("--optim.lr", "0.016"),
    "learning rate 0.064": ("--optim.lr", "0.064"),
    "mask units of 8 px": ("--model.mask_unit", "8"),
    "21 epochs": ("--epochs", "21"),
    "85 epochs": ("--epochs", "85"),
}
FINETUNING = {
    "350 steps": ("--steps", "350"),
    "1,400 steps": ("--steps", "1400"),
    "1,750 steps of 10": ("--steps", "1750", "--batch_size", "10"),
    "no affine": affine_words(0),
    "half the affine": affine_words(0.5),
    "twice the affine": affine_words(2),
}


@dataclass(frozen=True)
class Search:
    """What is tried.

    Args:
        out: folder to make or to continue in.
        digits: of `write_digits` for development.
        labels: numbers of labels per class.
        num_seeds: draws of labels for each of them.
        processes: fine-tunings at a time, each on one core; 0 for this process.
        pretrain, finetune: words of the command line after the recipes, to shorten the runs.
    """

    out: Path
    digits: DigitFolders
    labels: Sequence[int] = (5, 10)
    num_seeds: int = 3
    processes: int = 0
    pretrain: Sequence[str] = ()
    finetune: Sequence[str] = ()

    def encoder(self, name: str = RECIPE, changes: Sequence[str] = ()) -> Path:
        """The run of a pre-training by the recipe with these changes.

        Args:
            name: of its folder.
            changes: words of the command line.
        """
        from simmim.pretrain import pretrain

        run = self.out / "pretrain" / name.replace(" ", "-")
        if not (run / "finished").is_file():
            words = ["--config", str(recipe_path("pretrain/demo.yaml")), *self.pretrain, *changes]
            pretrain(pretrain_settings([*words, "--data", str(self.digits.unlabeled), "--out", str(run), "--overwrite"]))
            (run / "finished").touch()
        return run

    def arms(self, run: Path, name: str = "", changes: Sequence[str] = ()) -> tuple[Arm, Arm]:
        """The encoder of a run, and its twin from scratch.

        Args:
            name: of what differs from the recipes, unique in the search: the names of stored results hold it.
            changes: of the fine-tuning, words of the command line.
        """
        from simmim.checkpoints import read

        words = ["--config", str(recipe_path("finetune/demo.yaml")), *self.finetune, *changes]
        words += ["--data", str(self.digits.labeled), "--out", str(self.out), "--init", str(run)]
        settings = finetune_settings("classification", words)
        fingerprint = fingerprint_of(read(run).encoder)
        names = [f"{arm}, {name}" if name else arm for arm in ARMS]
        return Arm(names[0], settings, fingerprint), Arm(names[1], scratch_settings(settings), fingerprint)

    def scores(self, arm: Arm, rates: Rates) -> dict[tuple[int, int], float]:
        """The accuracies of an arm with the rates, from 0 to 1, by number of labels and seed."""
        return {(trial.labels, trial.seed): trial.score for trial in self.trials(arm, [rates])}

    def accuracies(self, arm: Arm, grid: Iterable[Rates]) -> dict[Rates, float]:
        """The mean accuracy of an arm over labels and seeds with each of the rates, from 0 to 1."""
        return mean_accuracies(self.trials(arm, grid))

    def trials(self, arm: Arm, grid: Iterable[Rates]) -> list[Trial]:
        """The runs of an arm with each of the rates, for each number of labels and seed."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.num_seeds)
        jobs = [
            named_by_rates(build_job(arm, labels, seed, rates)) for rates in grid for labels in self.labels for seed in seeds
        ]
        run = partial(run_trial, out=self.out, keep_weights=False)
        with tqdm(total=len(jobs), desc=arm.name, unit="trial") as bar, trial_pool(self.processes) as pool:
            return list(run_jobs(jobs, self.out, pool, bar, run).values())


def named_by_rates(job):
    """A study names the trials that are compared by arm and seed alone; here rates differ too."""
    return job._replace(name=f"{job.name}-{Rates(job.settings.optim.lr_factor, job.settings.optim.layer_decay)}")


def mean_accuracies(trials: Sequence[Trial]) -> dict[Rates, float]:
    """The mean score of the trials with the same rates."""
    by_rates: dict[Rates, list[float]] = {}
    for trial in trials:
        by_rates.setdefault(trial.rates, []).append(trial.score)
    return {rates: statistics.fmean(scores) for rates, scores in by_rates.items()}


def edges(best: Rates, factors: Sequence[float], layer_decays: Sequence[float]) -> list[str]:
    """What of the best rates is the smallest or largest that was tried; a layer decay of 1, which is none, is no edge."""
    found = []
    if len(factors) > 1 and best.lr_factor in (min(factors), max(factors)):
        found.append("learning rate")
    if len(layer_decays) > 1 and best.layer_decay in (min(layer_decays), max(layer_decays)) and best.layer_decay != 1:
        found.append("layer decay")
    return found


def tune(what: Search, arm: Arm, factors: Sequence[float], layer_decays: Sequence[float]) -> dict[Rates, float]:
    """The accuracies of an arm: of all learning rates with its layer decay, then of all layer decays with the best rate."""
    own = arm.settings.optim.layer_decay
    found = what.accuracies(arm, [Rates(factor, own) for factor in factors])
    best = max(found, key=found.__getitem__)
    return found | what.accuracies(arm, [Rates(best.lr_factor, decay) for decay in layer_decays if decay != own])


def search(
    what: Search,
    factors: Sequence[float],
    layer_decays: Sequence[float],
    pretraining: Mapping[str, Sequence[str]],
    finetuning: Mapping[str, Sequence[str]],
) -> str:
    """All parts of the search, as Markdown with what to adopt."""
    run = what.encoder()
    arms = what.arms(run)
    lr, own = arms[0].settings.optim.lr, arms[0].settings.optim.layer_decay
    lines = ["| arm | learning rate per 512 | layer decay | accuracy |", "| --- | ---: | ---: | ---: |"]
    chosen, best = [], []
    for arm in arms:
        found = tune(what, arm, factors, layer_decays)
        rates = max(found, key=found.__getitem__)
        best.append(rates)
        lines += [
            f"| {arm.name} | {tried.lr_factor * lr:g} | {tried.layer_decay:g} | {100 * accuracy:.1f} |"
            for tried, accuracy in found.items()
        ]
        at = edges(rates, factors, sorted({own, *layer_decays}))
        edge = f"; at the edge of what was tried: {' and '.join(at)}" if at else ""
        chosen.append(f"{arm.name}: learning rate {rates.lr_factor * lr:g}, layer decay {rates.layer_decay:g}{edge}")
    recipes = [what.scores(arm, rates) for arm, rates in zip(arms, best)]
    lines += ["", *chosen, "", f"| fine-tuning | {' | '.join(ARMS)} |", "| --- | ---: | ---: |"]
    lines.append(f"| the recipe's | {' | '.join(score_text(recipe) for recipe in recipes)} |")
    for name, changes in finetuning.items():
        tried = [what.scores(arm, rates) for arm, rates in zip(what.arms(run, name, changes), best)]
        lines.append(f"| {name} | {' | '.join(score_text(new, recipe) for new, recipe in zip(tried, recipes))} |")
    lines += ["", "| pre-training | accuracy |", "| --- | ---: |", f"| the recipe's | {score_text(recipes[0])} |"]
    for name, changes in pretraining.items():
        arm = what.arms(what.encoder(name, changes), name)[0]
        lines.append(f"| {name} | {score_text(what.scores(arm, best[0]), recipes[0])} |")
    return "\n".join(lines)


def score_text(scores: Mapping[Any, float], recipe: Mapping[Any, float] | None = None) -> str:
    """The mean in percent, and its difference to that of the recipe with the standard error over the draws of labels.

    Args:
        scores, recipe: from 0 to 1, by number of labels and seed.
    """
    text = f"{100 * statistics.fmean(scores.values()):.1f}"
    if recipe is None:
        return text
    gains = [100 * (score - recipe[draw]) for draw, score in scores.items()]
    error = f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.1f}" if len(gains) > 1 else ""
    return f"{text} ({statistics.fmean(gains):+.1f}{error})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make or to continue in")
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10], help="numbers of labels per class")
    parser.add_argument("--seeds", type=int, default=3, help="draws of labels")
    parser.add_argument("--lr-factors", type=float, nargs="+", default=[0.5, 1, 2], help="of the recipe's learning rate")
    parser.add_argument("--layer-decays", type=float, nargs="+", default=[0.65, 0.8, 1.0])
    parser.add_argument("--pretraining", nargs="*", choices=PRETRAINING, default=[*PRETRAINING], help="what else to try")
    parser.add_argument("--finetuning", nargs="*", choices=FINETUNING, default=[*FINETUNING], help="what else to try")
    parser.add_argument("--processes", type=int, default=0, help="fine-tunings at a time; 0: in this process")
    options = parser.parse_args(arguments)
    digits = write_digits(options.out / "digits", development=True)
    what = Search(options.out, digits, options.labels, options.seeds, options.processes)
    changes = (
        {name: tried[name] for name in names}
        for tried, names in zip((PRETRAINING, FINETUNING), (options.pretraining, options.finetuning))
    )
    print(search(what, options.lr_factors, options.layer_decays, *changes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
