"""The first epoch that keeps images shrunk, against a version that keeps none: processor time, interleaved.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/first_epoch.py --old DIR --new DIR --content resized

DIR is a checkout of this repository; more than one may be new. Each runs in a process of its own, which keeps freed
memory as the command does. A round asks each, in random order, for the same samples of images not kept yet. Prints the
median time an image and the median of the rounds' ratios of rates, with its 95 % interval (bootstrap over rounds), and stops
where samples of the new versions differ. On ext4 new files are slower where other jobs have just removed some: let TMPDIR be
on a file system of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from processes import Worker, answer

RESAMPLES = 4000


def main(arguments: list[str] | None = None) -> int:
    """Compare the versions and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, metavar="DIR", help="checkout of the version that keeps nothing")
    parser.add_argument("--new", type=Path, nargs="+", metavar="DIR", help="checkouts of those that keep images")
    parser.add_argument("--content", choices=("tiled", "resized"), default="resized", help="as of benchmarks/loading.py")
    parser.add_argument("--size", type=int, nargs=2, default=(1200, 1600), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=4, help="of each version in a round")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, json.loads(sys.stdin.readline()))
        return 0
    checkouts = [options.old, *(options.new or ())]
    if wrong := [path for path in checkouts if path is None or not (path / "simmim/__init__.py").is_file()]:
        parser.error(f"--old and --new: {wrong[0]} is no checkout of this repository")
    rows = [(options.old, False), *((path, True) for path in options.new)]
    work = {"content": options.content, "size": options.size, "images": options.images}
    times = measure([(path.resolve(), keeps) for path, keeps in rows], work, options.rounds)
    print("| version | ms an image | rate to the old one's |\n| --- | ---: | ---: |")
    for (path, keeps), own in zip(rows, times):
        middle, low, high = rate(times[0], own)
        name = f"{path}, {'first epoch that keeps' if keeps else 'without keeping'}"
        print(f"| {name} | {1000 * statistics.median(own):.3f} | {middle:.3f} [{low:.3f}, {high:.3f}] |")
    return 0


def measure(rows: list[tuple[Path, bool]], work: dict, rounds: int) -> list[list[float]]:
    """Seconds of processor time an image, by row and round."""
    times: list[list[float]] = [[] for _ in rows]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="simmim-first-epoch-"))
        workers = []
        for number, (checkout, keeps) in enumerate(rows):
            environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
            environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf"}
            workers.append(Worker([__file__, "--serve", str(checkout)], environment))
            stack.callback(workers[-1].close)
            kept = f"{folder}/kept-{number}" if keeps else None
            workers[-1].ask(json.dumps({**work, "folder": folder, "kept": kept}))
        for number in range(rounds):
            digests = {}
            for row in random.sample(range(len(rows)), len(rows)):
                done = workers[row].ask(str(number))
                times[row].append(done["seconds"])
                digests[row] = done["digest"]
            if len({digest for row, digest in digests.items() if row}) > 1:
                raise SystemExit(f"round {number}: samples differ")
    return times


def rate(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """The median of the rounds' ratios of rates, and the ends of its 95 % interval."""
    ratios = [before / after for before, after in zip(old, new)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return statistics.median(ratios), medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


# --- A version's process -----------------------------------------------------------------------------------------------


def serve(checkout: Path, work: dict) -> None:
    """Run one version: load images for each line on standard input, until the input ends."""
    import simmim

    if Path(simmim.__file__).resolve().parents[1] != checkout:
        raise SystemExit(f"simmim was imported from {simmim.__file__} and not from {checkout}")
    import torch
    import xxhash
    from loading_pipelines import FirstEpoch, photographs, toolkit_samples

    try:
        from simmim.cli.allocator import keep_freed_memory
    except ModuleNotFoundError:  # version 0.1
        from simmim.allocator import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    paths = photographs(Path(work["folder"]), tuple(work["size"]), 8, work["content"])
    load = FirstEpoch(paths, Path(work["kept"])) if work["kept"] else toolkit_samples(paths)

    def take(number: int) -> dict:
        if work["kept"]:
            load.prepare(work["images"])
        hasher, seconds = xxhash.xxh3_64(), 0.0
        for index in range(work["images"]):
            key = number, index % len(paths)
            started = time.process_time()
            image = (load(number, index) if work["kept"] else load[key])["image"]
            seconds += time.process_time() - started
            hasher.update(image.numpy())
        return {"seconds": seconds / work["images"], "digest": hasher.hexdigest()}

    take(0)
    answer(take(0))
    for line in sys.stdin:
        answer(take(int(line)))


if __name__ == "__main__":
    sys.exit(main())
