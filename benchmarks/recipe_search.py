"""Pre-training recipes at equal processor time, judged by what few labels make of their encoders.

    OMP_NUM_THREADS=1 python benchmarks/recipe_search.py --candidates candidates.yaml --data IMAGES --labeled LABELED \
        --minutes 8 --out search

LABELED is any labeled source with a part to validate with, and that part judges: it must not be the part by which the winner
will be judged. candidates.yaml has a line of words for `simmim pretrain` by the name of each candidate:

    micro at 96 px: --preset micro --image_size 96
    micro at 64 px: --preset micro --image_size 64 --model.mask_unit 8

A short run measures the processor time of a candidate's step, loading included; its length is then what fits in --minutes of
one core. The encoder is judged frozen, by nearest neighbors and by logistic regression, at the best of its stages and
poolings, so that each candidate has its best read-out. It is fine-tuned with the same draws of --labels per class and judged
at the last step, at the best of the --rates, factors of the default learning rate. The same architecture from scratch is
fine-tuned likewise.

Prints a row per candidate when it is ready. A later call does not repeat what OUT holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CALIBRATION_STEPS = (8, 32)  # what their times differ by is without start-up
HEADER = (
    "| candidate | steps | ms per step | k-NN | probe | fine-tuned | from scratch |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


@dataclass(frozen=True)
class Search:
    """What all candidates share.

    Args:
        data, labeled: images, and labeled images with a part that judges.
        out: folder to make or to continue in.
        minutes: of one core for each pre-training.
        batch_size: images per step of it.
        seed: of it.
        labels: per class.
        draws: of these labels.
        steps: of a fine-tuning.
        rates: factors of the default learning rate of a fine-tuning.
    """

    data: str
    labeled: str
    out: Path
    minutes: float = 8.0
    batch_size: int = 64
    seed: int = 0
    labels: int = 10
    draws: int = 2
    steps: int = 250
    rates: tuple[float, ...] = (1.0,)


def judge(search: Search, name: str, words: Sequence[str]) -> str:
    """A candidate's row."""
    folder = search.out / file_name(name)
    run = folder / f"pretrained-{search.seed}"
    facts = stored(run.with_suffix(".json"), lambda: pretrain_for(search, words, run))
    frozen = stored(folder / f"frozen-{search.seed}.json", lambda: in_process(score_frozen, search, run))
    tuned = finetuned(search, folder, f"finetuned-{search.seed}", ["--init", str(run)])
    scratch = finetuned(search, folder, "scratch", ["--init", "none", "--encoder.like", str(run)])
    return (
        f"| {name} | {facts['steps']:,} | {1000 * facts['seconds_per_step']:.0f} | {frozen['knn']} | {frozen['probe']} "
        f"| {tuned} | {scratch} |"
    )


def pretrain_for(search: Search, words: Sequence[str], run: Path) -> dict[str, float]:
    """Pre-train for the processor time of the search: steps, seconds per step, and minutes in all."""
    seconds_per_step = measure_step(search, words, Path(f"{run}-calibration"))
    steps = max(1, int(60 * search.minutes / seconds_per_step))
    minutes = in_process(pretrain_steps, search, words, steps, run) / 60
    return {"steps": steps, "seconds_per_step": seconds_per_step, "minutes": minutes}


def measure_step(search: Search, words: Sequence[str], trial: Path) -> float:
    """Processor time of a step in seconds, loading included, by two short runs in the folder `trial`, which is removed."""
    short, long = (in_process(pretrain_steps, search, words, steps, trial) for steps in CALIBRATION_STEPS)
    shutil.rmtree(trial)
    return (long - short) / (CALIBRATION_STEPS[1] - CALIBRATION_STEPS[0])


def pretrain_steps(search: Search, words: Sequence[str], steps: int, run: Path) -> float:
    """Pre-train for a number of steps; processor time in seconds, that of loading included."""
    from simmim.cli.train import pretrain_settings
    from simmim.data import open_images
    from simmim.pretrain import pretrain

    epochs = steps * search.batch_size / len(open_images(search.data))
    shared = ["--data", search.data, "--out", str(run), "--overwrite", "--workers", "0", "--seed", str(search.seed)]
    words = [*words, *shared, "--batch_size", str(search.batch_size), "--epochs", str(epochs)]
    started = time.process_time()
    with silenced():
        pretrain(pretrain_settings(words))
    return time.process_time() - started


def score_frozen(search: Search, run: Path) -> dict[str, str]:
    """The best feature by nearest neighbors and by logistic regression: its accuracy and name."""
    from simmim.checkpoints import read_encoder
    from simmim.evaluate import Comparison, EncoderPass, compare

    comparison = Comparison(search.labeled, labels_per_class=search.labels, seeds=search.draws)
    features = compare(read_encoder(run), comparison, EncoderPass(workers=0), quiet=True).as_dict()["features"]
    found = {}
    for method in ("knn", "probe"):
        best = max((row for row in features if not row["feature"].startswith("pixels")), key=lambda row: row[method]["mean"])
        found[method] = f"{100 * best[method]['mean']:.1f} ({best['feature']})"
    return found


def finetuned(search: Search, folder: Path, name: str, start: Sequence[str]) -> str:
    """Mean and standard error of the accuracies at the best rate, in percent, and that rate."""
    best: tuple[float, float, float] | None = None
    for rate in search.rates:
        scores = [
            stored(
                folder / f"{name}-{search.labels}-{rate:g}-{seed}.json",
                lambda: in_process(finetune_once, search, start, rate, seed, folder / f"{name}-run"),  # noqa: B023
            )
            for seed in range(search.draws)
        ]
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
        best = max(best or (-1.0, 0.0, 0.0), (statistics.fmean(scores), error, rate))
    assert best is not None
    return f"{100 * best[0]:.1f} ± {100 * best[1]:.1f} (rate × {best[2]:g})"


def finetune_once(search: Search, start: Sequence[str], rate: float, seed: int, run: Path) -> float:
    """Accuracy after the last step with one draw of labels, from 0 to 1."""
    from simmim.cli.train import finetune_settings
    from simmim.finetune import finetune

    words = [*start, "--data", search.labeled, "--out", str(run), "--overwrite", "--workers", "0", "--validations", "1"]
    words += ["--labels_per_class", str(search.labels), "--seed", str(seed), "--steps", str(search.steps)]
    score = finetune(finetune_settings("classification", [*words, "--optim.lr_factor", str(rate)]), quiet=True).score
    shutil.rmtree(run)
    return score


@contextlib.contextmanager
def silenced():
    """No summary and no progress of a run."""
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def in_process(work: Callable, *arguments) -> Any:
    """What `work` returns, in a process of its own, which starts without the caches of others."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def stored(file: Path, work: Callable[[], Any]) -> Any:
    """What `work` returned once; it is called where `file` is missing. Where two processes do, the first to end counts."""
    if not file.is_file():
        result = work()
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_name(f"{file.name}.{os.getpid()}")
        whole.write_text(json.dumps(result))
        with contextlib.suppress(FileExistsError):
            os.link(whole, file)
        whole.unlink()
    return json.loads(file.read_text())


def file_name(text: str) -> str:
    """`text` as the name of a folder."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge all candidates and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=Path, required=True, help="YAML: words for simmim pretrain by name")
    parser.add_argument("--data", required=True, help="images to pre-train on")
    parser.add_argument("--labeled", required=True, help="labeled images, with a part that judges")
    parser.add_argument("--out", type=Path, required=True, help="folder to make or to continue in")
    parser.add_argument("--minutes", type=float, default=8.0, help="of one core for each pre-training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the pre-training")
    parser.add_argument("--labels", type=int, default=10, help="per class")
    parser.add_argument("--draws", type=int, default=2, help="of the labels")
    parser.add_argument("--steps", type=int, default=250, help="of a fine-tuning")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="factors of its default learning rate")
    options = vars(parser.parse_args(arguments))
    candidates = yaml.safe_load(options.pop("candidates").read_text())
    search = Search(**{**options, "rates": tuple(options["rates"])})
    print(HEADER, flush=True)
    for name, words in candidates.items():
        print(judge(search, name, words.split()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
