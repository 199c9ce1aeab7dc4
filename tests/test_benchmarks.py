"""Benchmarks run as scripts: short measurements, and reports of earlier runs."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

from PIL import Image
from scipy.stats import ttest_rel

from simmim.finetune.label_study.results import Rates, Trial, write_trials

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--preset nano --size 64 --window 4 --batch 2 --precision float32 --threads 1 --rounds 2"
OURS, THEIRS = (0.30, 0.28, 0.31), (0.27, 0.28, 0.25)


def run_benchmark(file, *words):
    """The standard output of a benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / file), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table_row(output):
    """The cells of a table's last row."""
    return [cell.strip() for cell in output.splitlines()[-1].strip("|").split("|")]


def test_the_step_is_measured(tmp_path):
    output = run_benchmark("step.py", *SMALL.split(), "--contenders", "ours", "--json", tmp_path / "step.json")
    name, rate, _, ratio, *_ = table_row(output)
    assert name == "ours" and float(rate) > 0 and ratio == "1.00 ×"
    figures = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["float32"]
    assert len(figures["ours"]["seconds"]) == len(figures["gemm"]["gflops"]) == 2
    assert math.isfinite(figures["ours"]["loss"])


def test_a_version_equals_itself():
    """The losses of two processes with the same version are equal, step by step."""
    precision, old, new, ratio, difference = table_row(
        run_benchmark("compare_versions.py", "--old", ROOT, "--new", ROOT, *SMALL.split())
    )
    assert precision == "float32" and min(float(old), float(new), float(ratio)) > 0 and difference == "0"


def test_segmentation_reports_trials_that_are_done(tmp_path):
    """Nothing is trained: no scenes and no encoder exist. Each arm uses the learning rate that its own tuning chose."""
    rows = [
        (arm, 20, 1000, lr, 0.9, True, 0.1 + lr * sign)
        for arm, sign in (("pre-trained", 1), ("from scratch", -1))
        for lr in (0.01, 0.02)
    ]
    rows += [("pre-trained", 20, seed, 0.02, 0.9, False, value) for seed, value in enumerate(OURS)]
    rows += [("from scratch", 20, seed, 0.01, 0.9, False, value) for seed, value in reversed([*enumerate(THEIRS)])]
    with (tmp_path / "trials.csv").open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(["arm", "labels", "seed", "lr", "layer_decay", "tuning", "mean_iou", "pixel_accuracy"])
        writer.writerows([*row, 0.9] for row in rows)
    before = (tmp_path / "trials.csv").read_bytes()
    words = ["--scenes", "none", "--init", "none", "--labels", 20, "--seeds", 3, "--lrs", 0.01, 0.02, "--layer-decays", 0.9]
    *_, head, _, row = run_benchmark("segmentation.py", *words, "--out", tmp_path).splitlines()
    assert head == "| labeled scenes | pre-trained | from scratch | paired gain | seeds won |"
    # Gains 3, 0, 6: mean 3, deviation 3.
    gain = f"+3.0 ± {3 / math.sqrt(3):.1f} (p = {ttest_rel(OURS, THEIRS).pvalue:.2g})"
    assert row == f"| 20 | 29.7 ± 0.9 | 26.7 ± 0.9 | {gain} | 2 of 3 |"
    assert (tmp_path / "trials.csv").read_bytes() == before


def test_the_picture_shows_a_run_and_its_study(tmp_path):
    """The picture has the size that the README shows, and curves in both halves."""
    (tmp_path / "metrics.csv").write_text("step,loss\n" + "".join(f"{step},{1 / (step + 1)}\n" for step in range(40)))
    trials = [
        Trial(arm, labels, seed, Rates(1.0, 0.7), value + labels / 50, 1.0)
        for arm, values in (("pre-trained", OURS), ("from scratch", THEIRS))
        for labels in (1, 20)
        for seed, value in enumerate(values)
    ]
    write_trials(tmp_path / "results.csv", trials)
    run_benchmark("fashion_picture.py", "--run", tmp_path, "--study", tmp_path, "--out", tmp_path / "picture.png")
    picture = Image.open(tmp_path / "picture.png").convert("RGB")
    assert picture.size == (1100, 418)
    blue, orange = (31, 119, 180), (255, 127, 14)  # the first two colors of lines
    for box, colors in (((0, 0, 550, 418), {blue}), ((550, 0, 1100, 418), {blue, orange})):
        present = {color for _, color in picture.crop(box).getcolors(maxcolors=1 << 16)}
        assert present & {blue, orange} == colors
