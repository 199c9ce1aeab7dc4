"""Pre-training with several images on one canvas against SimMIM, at equal images and at equal processor time, by what few
labels make of the encoders.

    OMP_NUM_THREADS=1 python benchmarks/canvas.py --data IMAGES --development DEVELOPMENT --labeled LABELED --minutes 10 \\
        --shared="--preset pico --image_size 64 --model.mask_unit 8" --seeds 3 --draws 2 --labels 10 50 --out canvas

DEVELOPMENT and LABELED are labeled sources with a part to validate with. That of DEVELOPMENT chooses rates, that of LABELED
judges; they must not share images. By default SimMIM that masks 0.6 and 2/3 of an image is compared with 2, 3 and 4 images
on a canvas. --candidates names a YAML file with others, a line of words for `simmim pretrain` by name; the first is the one
that all are compared with. After `then SHARE` come the words of the last SHARE of a run, which goes on with the encoder of
the rest under a schedule of its own.

    SimMIM, 0.6: --method simmim --model.mask_ratio 0.6
    canvas, 3 images, then SimMIM: --method canvas --model.share 3 then 0.1 --method simmim

The first candidate trains for --minutes of one core. At equal images the others take as many steps, at equal time as many as
fit: the processor time of a step, loading included, relative to the first candidate's, both measured in turn, the median of
--rounds.

Each candidate has its own rates: of the pre-training the best of --pretrain-rates, factors of its learning rate, by one
pre-training each with a seed that is not judged, at equal images; of the fine-tuning the best of --rates for each number of
labels. Both are chosen by the accuracy of fine-tuning on DEVELOPMENT. A rate at an end of its grid is marked with *.

Each pre-training seed has draws of labels of its own, the same for all candidates. Frozen features are read at the stage and
pooling that cross-validation on the drawn labels chooses. The table has means over all, and differences to the first
candidate with 95 % intervals over pre-training seeds, paired by seed (Student's t; none for one seed).

--kinds leaves read-outs out: frozen features of many labels take longer than a pre-training of a few minutes. A later call
does not repeat what OUT holds. Two calls with different --only may work on one OUT at the same time; a call without it
completes the rest and prints the table.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from recipe_search import Search, file_name, finetune_once, in_process, measure_step, pretrain_steps, stored

CANDIDATES = {
    "SimMIM, 0.6": "--method simmim --model.mask_ratio 0.6",
    "SimMIM, 2/3": "--method simmim --model.mask_ratio 0.6667",
    **{f"canvas, {share} images": f"--method canvas --model.share {share}" for share in (2, 3, 4)},
}
THEN = "then"
KINDS = {"knn": "k-NN", "probe": "probe", "fine-tuned": "fine-tuned"}  # of scores, and their columns
CHOICE_SEED = 1000  # of pre-trainings that choose rates and are not judged
BUDGETS = ("images", "time")
FIRST_COLUMNS = "candidate", "at equal", "steps", "minutes", "pre-training's rate", "labels per class", "fine-tuning's rate"


@dataclass(frozen=True)
class Candidate:
    """A way of pre-training.

    Args:
        name: in the table.
        words: for simmim pretrain.
        lr: learning rate per 512 images that factors multiply.
        last_share: of the run that has `last_words` in place of `words`.
        shown: the words as they were given.
    """

    name: str
    words: tuple[str, ...]
    lr: float
    last_share: float
    last_words: tuple[str, ...]
    shown: str


@dataclass(frozen=True)
class Contest:
    """What all candidates share.

    Args:
        search: images, labels that judge, folder, minutes of the first candidate, batch size, steps of a fine-tuning.
        development: labeled source whose validating part chooses rates.
        pretrain_rates, rates: factors of the learning rates of pre-training and fine-tuning that are tried.
        labels: per class.
        draws: of labels for each pre-training.
        seeds: pre-trainings of a candidate.
        rounds: in which steps are measured.
        kinds: of scores, some of `KINDS`.
    """

    search: Search
    development: str
    pretrain_rates: tuple[float, ...]
    rates: tuple[float, ...]
    labels: tuple[int, ...]
    draws: int
    seeds: int
    rounds: int
    kinds: tuple[str, ...]


def parse_candidate(search: Search, name: str, shared: str, text: str) -> Candidate:
    """A candidate with the words that all share.

    Raises:
        ValueError: for words that simmim pretrain refuses, no preset, and a batch that does not divide.
    """
    from simmim.cli.train import pretrain_settings
    from simmim.encoders.registry import preset_config
    from simmim.pretrain.resolve import resolve_optim

    first, _, rest = text.partition(f" {THEN} ")
    share, *second = rest.split() or ["0"]
    words, last_words = (tuple(f"{shared} {part}".split()) for part in (first, " ".join(second)))
    parts = [pretrain_settings([*part, "--data", search.data, "--out", str(search.out)]) for part in (words, last_words)]
    if parts[0].preset is None:
        raise ValueError(f"{name}: the size of the encoder is open, give --shared='--preset pico --image_size 64'")
    multiple = math.lcm(*(part.model.images_per_input for part in parts))
    if search.batch_size % multiple:
        raise ValueError(f"{name}: a batch of {search.batch_size} images is no multiple of {multiple}: give --batch-size")
    is_small = preset_config(parts[0].preset).is_small
    lr = resolve_optim(parts[0].optim, 1.0, search.batch_size, is_small).lr
    return Candidate(name, words, lr, float(share), last_words, f"{shared} {text}")


# --- pre-training ------------------------------------------------------------------------------------------------------


def step_seconds(search: Search, candidate: Candidate) -> float:
    """Processor time of a step, loading included."""
    trial = search.out / file_name(candidate.name) / f"measured-{os.getpid()}"
    share, seconds = candidate.last_share, measure_step(search, candidate.words, trial)
    return (1 - share) * seconds + share * measure_step(search, candidate.last_words, trial) if share else seconds


def relative_cost(contest: Contest, first: Candidate, candidate: Candidate) -> float:
    """Processor time of a candidate's step over that of the first one."""
    ratios = []
    for _ in range(contest.rounds):
        seconds = step_seconds(contest.search, candidate)
        ratios.append(seconds / step_seconds(contest.search, first))
    return statistics.median(ratios)


def pretrained(contest: Contest, candidate: Candidate, steps: int, factor: float, seed: int) -> tuple[Path, float]:
    """The run of a candidate, and its processor time in seconds."""
    search = replace(contest.search, seed=seed)
    run = search.out / file_name(candidate.name) / f"{steps}-steps-rate-{factor:g}-seed-{seed}"
    rate = ("--optim.lr", f"{candidate.lr * factor:.6g}")

    def work() -> float:
        last = round(candidate.last_share * steps)
        if not last:
            return in_process(pretrain_steps, search, [*candidate.words, *rate], steps, run)
        before, words = Path(f"{run}-first"), list(candidate.last_words)
        at = words.index("--preset")  # the encoder is there
        words = [*words[:at], *words[at + 2 :], *rate, "--init", str(before)]
        seconds = in_process(pretrain_steps, search, [*candidate.words, *rate], steps - last, before)
        seconds += in_process(pretrain_steps, search, words, last, run)
        shutil.rmtree(before)
        return seconds

    return run, stored(Path(f"{run}.json"), work)


# --- judging -----------------------------------------------------------------------------------------------------------


def accuracies(contest: Contest, labeled: str, run: Path, labels: int, factor: float, seed: int) -> list[float]:
    """After fine-tuning on each draw of labels that belongs to a seed, from 0 to 1."""
    part = "development" if labeled == contest.development else "labeled"
    search = replace(contest.search, labeled=labeled, labels=labels)
    return [
        stored(
            Path(f"{run}-{part}-{labels}-rate-{factor:g}-draw-{draw}.json"),
            lambda: in_process(finetune_once, search, ["--init", str(run)], factor, draw, Path(f"{run}-finetuned")),  # noqa: B023
        )
        for draw in range(seed * contest.draws, (seed + 1) * contest.draws)
    ]


def choose_rates(contest: Contest, candidate: Candidate, steps: int) -> tuple[float, dict[int, float]]:
    """Factors of the learning rates of pre-training and, for each number of labels, of fine-tuning."""
    rates = contest.rates
    if len(contest.pretrain_rates) == len(rates) == 1:
        return contest.pretrain_rates[0], dict.fromkeys(contest.labels, rates[0])
    best: tuple[float, float, dict[int, float]] | None = None
    for factor in contest.pretrain_rates:
        print(f"{candidate.name}: {steps:,} steps to choose, rate × {factor:g}", file=sys.stderr, flush=True)
        run, _ = pretrained(contest, candidate, steps, factor, CHOICE_SEED)
        chosen, reached = {}, []
        for labels in contest.labels:
            means = {
                rate: statistics.fmean(accuracies(contest, contest.development, run, labels, rate, CHOICE_SEED))
                for rate in rates
            }
            chosen[labels] = max(means, key=means.__getitem__)
            reached.append(means[chosen[labels]])
        if best is None or statistics.fmean(reached) > best[0]:
            best = statistics.fmean(reached), factor, chosen
    assert best is not None
    return best[1:]


def score_frozen(search: Search, run: Path, draws: int) -> dict[str, float]:
    """Accuracy of nearest neighbors and of logistic regression, means over draws of labels from `search.seed` on, at the
    feature that cross-validation chooses."""
    from simmim.checkpoints import read_encoder
    from simmim.evaluate import Comparison, EncoderPass, compare

    comparison = Comparison(search.labeled, labels_per_class=search.labels, seed=search.seed, seeds=draws, untrained=False)
    report = compare(read_encoder(run), comparison, EncoderPass(workers=0), quiet=True).as_dict()
    (row,) = [row for row in report["features"] if row["feature"] == report["chosen"]]
    return {method: row[method]["mean"] for method in ("knn", "probe")}


def score(contest: Contest, run: Path, labels: int, rate: float, seed: int, kind: str) -> float:
    """The score of one kind, the mean over the draws of labels that belong to a seed, from 0 to 1."""
    if kind == "fine-tuned":
        return statistics.fmean(accuracies(contest, contest.search.labeled, run, labels, rate, seed))
    search = replace(contest.search, labels=labels, seed=seed * contest.draws)
    file = Path(f"{run}-frozen-{labels}-draws-{contest.draws}.json")
    return stored(file, lambda: in_process(score_frozen, search, run, contest.draws))[kind]


def judge(contest: Contest, candidate: Candidate, steps: int, rates: tuple[float, dict[int, float]]) -> dict[str, Any]:
    """Minutes of the pre-trainings, and scores by number of labels and kind: one for each seed, from 0 to 1."""
    minutes = []
    scores: dict[int, dict[str, list[float]]] = {labels: {kind: [] for kind in contest.kinds} for labels in contest.labels}
    for seed in range(contest.seeds):
        print(f"{candidate.name}: {steps:,} steps, seed {seed}", file=sys.stderr, flush=True)
        run, seconds = pretrained(contest, candidate, steps, rates[0], seed)
        minutes.append(seconds / 60)
        for labels, own in scores.items():
            for kind in contest.kinds:
                own[kind].append(score(contest, run, labels, rates[1][labels], seed, kind))
    return {"minutes": statistics.fmean(minutes), "scores": scores}


# --- the table ---------------------------------------------------------------------------------------------------------


def table(contest: Contest, candidates: Sequence[Candidate], only: Sequence[str] = ()) -> Iterator[str]:
    """The table's rows, each when it is known. With `only` these candidates' results are made and there are no rows."""
    search, first, reference = contest.search, candidates[0], None
    seconds = stored(search.out / "seconds.json", lambda: step_seconds(search, first))
    steps_of_first = max(1, int(60 * search.minutes / seconds))
    for candidate in candidates:
        if only and candidate.name not in only:
            continue
        rates, lengths = choose_rates(contest, candidate, steps_of_first), {" and ".join(BUDGETS): steps_of_first}
        if candidate is not first:
            file = search.out / file_name(candidate.name) / "cost.json"
            cost = stored(file, lambda: relative_cost(contest, first, candidate))  # noqa: B023
            lengths = dict(zip(BUDGETS, (steps_of_first, max(1, int(steps_of_first / cost))), strict=True))
        for budget, steps in lengths.items():
            judged = judge(contest, candidate, steps, rates)
            reference = reference or judged
            if not only:
                start = f"| {candidate.name} | {budget} | {steps:,} | {judged['minutes']:.1f} "
                yield from (start + row for row in rows_of(contest, rates, judged["scores"], reference["scores"]))


def rows_of(contest: Contest, rates: tuple[float, dict[int, float]], scores: dict, reference: dict) -> list[str]:
    """The rates and scores of each number of labels, and differences to the reference where this is another."""
    rows = []
    for labels, own in scores.items():
        cells = [with_end(rates[0], contest.pretrain_rates), str(labels), with_end(rates[1][labels], contest.rates)]
        cells += [score_cell(own[kind], None if scores is reference else reference[labels][kind]) for kind in own]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def with_end(rate: float, rates: Sequence[float]) -> str:
    """A rate, with * where it is the smallest or largest of several."""
    return f"× {rate:g}" + "*" * (len(rates) > 1 and rate in (min(rates), max(rates)))


def score_cell(values: Sequence[float], reference: Sequence[float] | None) -> str:
    """The mean in percent, with the paired difference to the reference and half of its interval."""
    from simmim.evaluate.paired import t_interval

    text = f"{100 * statistics.fmean(values):.1f}"
    if reference is None:
        return text
    mean, half = t_interval([ours - theirs for ours, theirs in zip(values, reference, strict=True)])
    return f"{text} ({100 * mean:+.1f}" + (")" if math.isnan(half) else f" ± {100 * half:.1f})")


# --- the command -------------------------------------------------------------------------------------------------------


def keep_settings(contest: Contest, candidates: Sequence[Candidate]) -> None:
    """Write down what a folder's results depend on.

    Raises:
        ValueError: when the folder holds results of other settings.
    """
    search = contest.search
    shared = ("data", "labeled", "minutes", "batch_size", "steps")
    now = {name: str(getattr(search, name)) for name in shared} | {"draws": str(contest.draws)}
    now |= {"development": contest.development, "first candidate": candidates[0].name}
    before = stored(search.out / "settings.json", lambda: now)
    for candidate in candidates:
        now[candidate.name] = candidate.shown
        file = search.out / file_name(candidate.name) / "words.json"
        before[candidate.name] = stored(file, lambda: candidate.shown)  # noqa: B023
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(f"{search.out} has results of {name} {before[name]!r}, not {value!r}: give another --out")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images to pre-train on")
    parser.add_argument("--development", required=True, help="labeled images, with a part that chooses rates")
    parser.add_argument("--labeled", required=True, help="labeled images, with a part that judges")
    parser.add_argument("--out", type=Path, required=True, help="folder to make or to continue in")
    parser.add_argument("--shared", default="", help="words for simmim pretrain of all candidates")
    parser.add_argument("--candidates", type=Path, help="YAML: words for simmim pretrain by name")
    parser.add_argument("--only", nargs="+", default=[], help="names of candidates to work on, without the table")
    parser.add_argument("--minutes", type=float, default=10.0, help="of one core for a pre-training of the first candidate")
    parser.add_argument("--batch-size", type=int, default=60, help="of pre-training")
    parser.add_argument("--pretrain-rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="factors to choose from")
    parser.add_argument("--seeds", type=int, default=3, help="pre-trainings of a candidate")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50], help="per class")
    parser.add_argument("--draws", type=int, default=2, help="of the labels, for each pre-training")
    parser.add_argument("--steps", type=int, default=250, help="of a fine-tuning")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 3.0], help="factors to choose from, of fine-tuning")
    parser.add_argument("--rounds", type=int, default=3, help="in which steps are measured")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of scores")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge all candidates and print the table."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    given = yaml.safe_load(options.candidates.read_text()) if options.candidates else CANDIDATES
    search = Search(options.data, options.labeled, options.out, options.minutes, options.batch_size, steps=options.steps)
    grids = (tuple(options.pretrain_rates), tuple(options.rates), tuple(options.labels))
    contest = Contest(
        search, options.development, *grids, options.draws, options.seeds, options.rounds, tuple(options.kinds)
    )
    if options.development == options.labeled:
        parser.error("--development is --labeled: what judges must not choose rates")
    if unknown := [name for name in options.only if name not in given]:
        parser.error(f"no candidate {unknown[0]!r}: give some of {', '.join(given)}")
    try:
        candidates = [parse_candidate(search, name, options.shared, text) for name, text in given.items()]
        keep_settings(contest, candidates)
    except ValueError as error:
        parser.error(str(error))
    if not options.only:
        columns = (*FIRST_COLUMNS, *(KINDS[kind] for kind in contest.kinds))
        print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}", flush=True)
    for row in table(contest, candidates, options.only):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
