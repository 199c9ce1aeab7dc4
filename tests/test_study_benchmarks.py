"""Benchmarks that end in a study's table, from what an earlier call has left."""
import csv
import math
import subprocess
import sys
from pathlib import Path

from scipy.stats import ttest_rel

ROOT = Path(__file__).resolve().parent.parent
OURS, THEIRS = (0.30, 0.28, 0.31), (0.27, 0.28, 0.25)


def called(file, *words):
    """What a benchmark writes to standard output."""
    command = [sys.executable, str(ROOT / "benchmarks" / file), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_segmentation_tells_of_trials_that_are_done(tmp_path):
    """Neither scenes nor an encoder are there: nothing is run. Each arm has the rate that its own tuning found best."""
    rows = [(arm, 20, 1000, lr, True, 0.1 + lr * sign) for arm, sign in (("pre-trained", 1), ("from scratch", -1))
            for lr in (0.01, 0.02)]  # fmt: skip
    rows += [("pre-trained", 20, seed, 0.02, False, value) for seed, value in enumerate(OURS)]
    rows += [("from scratch", 20, seed, 0.01, False, value) for seed, value in reversed([*enumerate(THEIRS)])]
    with (tmp_path / "trials.csv").open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(["arm", "labels", "seed", "lr", "tuning", "mean_iou", "pixel_accuracy"])
        writer.writerows([*row, 0.9] for row in rows)
    before = (tmp_path / "trials.csv").read_bytes()
    words = ["--scenes", "none", "--init", "none", "--labels", 20, "--seeds", 3, "--tuning-seeds", 1, "--lrs", 0.01, 0.02]
    *_, head, _, row = called("segmentation.py", *words, "--out", tmp_path).splitlines()
    assert head == "| labeled scenes | pre-trained | from scratch | paired gain | seeds won |"
    # Gains 3, 0, 6: mean 3, deviation 3.
    gain = f"+3.0 ± {3 / math.sqrt(3):.1f} (p = {ttest_rel(OURS, THEIRS).pvalue:.2g})"
    assert row == f"| 20 | 29.7 ± 0.9 | 26.7 ± 0.9 | {gain} | 2 of 3 |"
    assert (tmp_path / "trials.csv").read_bytes() == before
