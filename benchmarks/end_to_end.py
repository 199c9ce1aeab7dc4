"""The rate of `simmim pretrain` on JPEG photographs, as a share of the bare training step's rate.

    .venv/bin/python benchmarks/end_to_end.py --preset tiny --size 192 --window 12 --batch 16

Each round runs the command for some steps, and then the same number of bare steps on the same cores: those of
benchmarks/step.py (forward, backward, AdamW) on one batch that stays in memory. The command decodes, crops and flips
500 × 375 px crops of scikit-learn's two photographs, draws masks, clips gradients, monitors activations and logs. Its rate
is the median of the logged rates without the first rows, which include the start and the first picture. The last picture and
the export at the end are not included. Prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from contenders import Work, write_weights
from processes import Worker
from step import ROOT

CROP_PX = (375, 500)  # height, width: the mean of ImageNet's images
LOG_EVERY_STEPS, SKIPPED_ROWS = 2, 2


def main() -> int:
    """Compare both rates and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=192, help="side of the images in pixels")
    parser.add_argument("--window", type=int, default=12, help="side of a window in tokens")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=512, help="number of photographs")
    parser.add_argument("--steps", type=int, default=16, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = Work(options.preset, options.size, options.window, options.batch, options.precision, options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "images", options.images)
        write_weights(folder, options.preset, options.size, options.window)
        work = replace(work, weights=str(folder))
        rates: list[tuple[float, float]] = []
        for number in range(options.rounds):
            command = command_rate(folder / f"run{number}", folder / "images", work, options.steps, options.workers)
            rates.append((command, bare_rate(work, options.steps)))
            print(f"round {number + 1}: {rates[-1][0]:.2f} of {rates[-1][1]:.2f} images/s", file=sys.stderr, flush=True)
    whole, bare = (statistics.median(side) for side in zip(*rates))
    share = statistics.median(command / step for command, step in rates)
    print("| | bare step, images/s | simmim pretrain, images/s | share, median of rounds |\n| --- | ---: | ---: | ---: |")
    print(
        f"| {options.preset}, {options.size} px, batch {options.batch}, {options.precision}, {options.device}, "
        f"{options.workers} workers | {bare:.2f} | {whole:.2f} | {share:.0%} |"
    )
    return 0


def write_photographs(folder: Path, count: int) -> None:
    """Write `count` random crops of two photographs as JPEG files."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    height, width = CROP_PX
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(count):
        photo = photos[number % len(photos)]
        left, top = (int(generator.integers(whole - side + 1)) for whole, side in zip(photo.size, (width, height)))
        photo.crop((left, top, left + width, top + height)).save(folder / f"{number:05d}.jpg", quality=90)


def command_rate(run: Path, images: Path, work: Work, steps: int, workers: int) -> float:
    """Images per second of `simmim pretrain`, from its log."""
    num_steps = steps + SKIPPED_ROWS * LOG_EVERY_STEPS
    settings = {
        "--preset": work.preset,
        "--image_size": work.size,
        "--model.encoder.window_size": work.window,
        "--batch_size": work.batch,
        "--workers": workers,
        "--log_every_steps": LOG_EVERY_STEPS,
        "--epochs": num_steps * work.batch / len(list(images.iterdir())),
        "--precision": "bf16-mixed" if work.precision == "bf16" else "32-true",
        "--trainer.accelerator": work.device,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    command = [str(Path(sys.executable).parent / "simmim"), "pretrain", "--data", str(images), "--out", str(run), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(f"simmim pretrain ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as text:
        rows = [float(row["images_per_s"]) for row in csv.DictReader(text) if row["images_per_s"]]
    return statistics.median(rows[SKIPPED_ROWS:])


def bare_rate(work: Work, steps: int) -> float:
    """Images per second of the bare step."""
    worker = Worker([str(ROOT / "benchmarks/step.py"), "--serve", "ours"])
    try:
        worker.ask(json.dumps(vars(work)))
        worker.read()  # the peak of memory
        question = f"steps {LOG_EVERY_STEPS}"
        return statistics.median(work.batch / worker.ask(question)["seconds"] for _ in range(steps // LOG_EVERY_STEPS))
    finally:
        worker.close()


if __name__ == "__main__":
    sys.exit(main())
