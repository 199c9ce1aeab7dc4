"""`simmim pretrain` on JPEG photographs against the bare training step: what share of its rate is left.

    .venv/bin/python benchmarks/end_to_end.py --preset tiny --size 192 --window 12 --batch 16

Every round runs the command for some steps and then as many bare steps (benchmarks/step.py's: forward, backward, AdamW, on
one batch that stays in memory), one after the other on the same cores. The command decodes, crops and flips 500 × 375 px
crops of scikit-learn's two photographs, draws masks, clips, watches, logs. Its rate is the median of what it logs, without
the first rows, which hold the start and the first picture; the last one and the encoder that it saves at the end are not in
it. Prints Markdown.
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
from pathlib import Path

from contenders import Work
from processes import Worker
from step import ROOT, write_weights

CROP = (500, 375)  # pixels, as ImageNet's images have on average
LOGGED_EVERY, FIRST_ROWS = 2, 2


def main() -> int:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=192, help="pixels")
    parser.add_argument("--window", type=int, default=12, help="tokens a side")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16, help="of either in a round")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    work = Work(chosen.preset, chosen.size, chosen.window, chosen.batch, chosen.precision, chosen.device, "", 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "images", chosen.images)
        write_weights(folder, chosen.preset, chosen.size, chosen.window)
        work = Work(**{**vars(work), "weights": str(folder)})
        rates: list[tuple[float, float]] = []
        for number in range(chosen.rounds):
            command = command_rate(folder / f"run{number}", folder / "images", work, chosen.steps, chosen.workers)
            rates.append((command, bare_rate(work, chosen.steps)))
            print(f"round {number + 1}: {rates[-1][0]:.2f} of {rates[-1][1]:.2f} images/s", file=sys.stderr, flush=True)
    whole, bare = (statistics.median(side) for side in zip(*rates))
    share = statistics.median(command / step for command, step in rates)
    print("| | bare step, images/s | simmim pretrain, images/s | share, median of rounds |\n| --- | ---: | ---: | ---: |")
    print(
        f"| {chosen.preset}, {chosen.size} px, batch {chosen.batch}, {chosen.precision}, {chosen.device}, "
        f"{chosen.workers} workers | {bare:.2f} | {whole:.2f} | {share:.0%} |"
    )
    return 0


def write_photographs(folder: Path, count: int) -> None:
    """JPEG crops of two photographs, each of its own place."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(count):
        photo = photos[number % len(photos)]
        left, top = (int(generator.integers(whole - side + 1)) for whole, side in zip(photo.size, CROP))
        photo.crop((left, top, left + CROP[0], top + CROP[1])).save(folder / f"{number:05d}.jpg", quality=90)


def command_rate(run: Path, images: Path, work: Work, steps: int, workers: int) -> float:
    """Images a second of `simmim pretrain`, as it logs them."""
    all_steps = steps + FIRST_ROWS * LOGGED_EVERY
    settings = {
        "--preset": work.preset,
        "--image_size": work.size,
        "--model.encoder.window_size": work.window,
        "--batch_size": work.batch,
        "--workers": workers,
        "--log_every_steps": LOGGED_EVERY,
        "--epochs": all_steps * work.batch / len(list(images.iterdir())),
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
    return statistics.median(rows[FIRST_ROWS:])


def bare_rate(work: Work, steps: int) -> float:
    """Images a second of the step alone."""
    worker = Worker([str(ROOT / "benchmarks/step.py"), "--serve", "ours"])
    try:
        worker.ask(json.dumps(vars(work)))
        worker.read()  # the peak of memory
        question = f"steps {LOGGED_EVERY}"
        return statistics.median(work.batch / worker.ask(question)["seconds"] for _ in range(steps // LOGGED_EVERY))
    finally:
        worker.close()


if __name__ == "__main__":
    sys.exit(main())
