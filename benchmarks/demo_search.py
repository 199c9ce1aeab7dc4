"""Search for the demo's recipe, on digits that do not judge it.

    OMP_NUM_THREADS=1 python benchmarks/demo_search.py --out demo-search

Of the 4,000 digits that the demo trains on, 1,000 are held out here, to judge settings by. The demo's 1,000 test digits are
not even written. The labels are drawn by seeds that the demo does not use.

First each arm, pre-trained and from scratch, tries the learning rates with the recipe's layer decay, then the layer decays
with the best of these rates, after a pre-training by configs/pretrain/demo.yaml. Then other learning rates of the
pre-training are tried, with what the pre-trained arm chose. A score is the mean accuracy over seeds and numbers of labels,
at the last step.

Prints all scores and what to adopt, and says where a choice is the smallest or largest value that was tried. A later call
does not repeat what OUT holds of the same settings and weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from simmim.cli.demo import recipe_path
from simmim.cli.train import finetune_settings, pretrain_settings
from simmim.data.digits import DigitFolders, write_digits
from simmim.finetune.label_study.arms import Arm, fingerprint_of, scratch_settings
from simmim.finetune.label_study.pool import trial_pool
from simmim.finetune.label_study.results import Rates, Trial
from simmim.finetune.label_study.trials import build_job, run_jobs, run_trial

FIRST_SEED = 100  # the demo's seeds count from 0


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

    def encoder(self, lr: float | None) -> Path:
        """The run of a pre-training at a learning rate per 512 images, by default the recipe's."""
        from simmim.pretrain import pretrain

        run = self.out / f"pretrain-lr-{'of-the-recipe' if lr is None else f'{lr:g}'}"
        if not (run / "finished").is_file():
            words = ["--config", str(recipe_path("pretrain/demo.yaml")), *self.pretrain]
            words += [] if lr is None else ["--optim.lr", str(lr)]
            pretrain(pretrain_settings([*words, "--data", str(self.digits.unlabeled), "--out", str(run), "--overwrite"]))
            (run / "finished").touch()
        return run

    def arms(self, run: Path, name: str) -> tuple[Arm, Arm]:
        """The encoder of a run, and its twin from scratch.

        Args:
            name: of the first, unique in the search: the names of stored results begin with it.
        """
        from simmim.checkpoints import read

        words = ["--config", str(recipe_path("finetune/demo.yaml")), *self.finetune, "--data", str(self.digits.labeled)]
        settings = finetune_settings("classification", [*words, "--out", str(self.out), "--init", str(run)])
        fingerprint = fingerprint_of(read(run).encoder)
        return Arm(name, settings, fingerprint), Arm("from scratch", scratch_settings(settings), fingerprint)

    def accuracies(self, arm: Arm, grid: Iterable[Rates]) -> dict[Rates, float]:
        """The mean accuracy of an arm over labels and seeds with each of the rates, from 0 to 1."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.num_seeds)
        jobs = [
            named_by_rates(build_job(arm, labels, seed, rates)) for rates in grid for labels in self.labels for seed in seeds
        ]
        run = partial(run_trial, out=self.out, keep_weights=False)
        with tqdm(total=len(jobs), desc=arm.name, unit="trial") as bar, trial_pool(self.processes) as pool:
            trials = list(run_jobs(jobs, self.out, pool, bar, run).values())
        return mean_accuracies(trials)


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


def search(what: Search, factors: Sequence[float], layer_decays: Sequence[float], pretraining: Sequence[float]) -> str:
    """Both parts of the search, as Markdown with what to adopt."""
    run = what.encoder(None)
    arms = what.arms(run, "pre-trained")
    lr, own = arms[0].settings.optim.lr, arms[0].settings.optim.layer_decay
    lines = ["| arm | learning rate per 512 | layer decay | accuracy |", "| --- | ---: | ---: | ---: |"]
    chosen, best = [], {}
    for arm in arms:
        found = tune(what, arm, factors, layer_decays)
        rates = best[arm.name] = max(found, key=found.__getitem__)
        lines += [
            f"| {arm.name} | {tried.lr_factor * lr:g} | {tried.layer_decay:g} | {100 * accuracy:.1f} |"
            for tried, accuracy in found.items()
        ]
        at = edges(rates, factors, sorted({own, *layer_decays}))
        edge = f"; at the edge of what was tried: {' and '.join(at)}" if at else ""
        chosen.append(f"{arm.name}: learning rate {rates.lr_factor * lr:g}, layer decay {rates.layer_decay:g}{edge}")
    lines += ["", *chosen, "", "| learning rate of the pre-training per 512 | accuracy |", "| ---: | ---: |"]
    rates = best["pre-trained"]
    lines.append(f"| the recipe's | {100 * what.accuracies(arms[0], [rates])[rates]:.1f} |")
    for other in pretraining:
        arm = what.arms(what.encoder(other), f"pre-trained at {other:g}")[0]
        lines.append(f"| {other:g} | {100 * what.accuracies(arm, [rates])[rates]:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make or to continue in")
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10], help="numbers of labels per class")
    parser.add_argument("--seeds", type=int, default=3, help="draws of labels")
    parser.add_argument("--lr-factors", type=float, nargs="+", default=[0.5, 1, 2], help="of the recipe's learning rate")
    parser.add_argument("--layer-decays", type=float, nargs="+", default=[0.65, 0.8, 1.0])
    parser.add_argument("--pretrain-lrs", type=float, nargs="*", default=[0.016, 0.064], help="besides the recipe's")
    parser.add_argument("--processes", type=int, default=0, help="fine-tunings at a time; 0: in this process")
    options = parser.parse_args(arguments)
    digits = write_digits(options.out / "digits", development=True)
    what = Search(options.out, digits, options.labels, options.seeds, options.processes)
    print(search(what, options.lr_factors, options.layer_decays, options.pretrain_lrs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
