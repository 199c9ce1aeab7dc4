"""The cost of loading images against the usual pipeline: decoding, waiting for data, indexing, memory.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/loading.py --out loading.json

Prints a Markdown table and writes JSON. Both sides of each comparison run in turn within each round, so that other load on
the machine affects both. The figures are medians over the rounds. No network is used, and all files are temporary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from loading_pipelines import SIDE_PX, FirstEpoch, SamplesWithHeap, UsualPipeline, heap_mib, photographs, toolkit_samples

from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD

# Memory is measured before indexing: imagefolder enlarges the process that the workers are forked from.
PARTS = ("decoding", "waiting", "memory", "indexing")
# Height and width in pixels of the photographs, and the goal for the ratio of our rate to the usual one.
PHOTOS = {(375, 500): 1.0, (1200, 1600): 4.0, (3000, 4000): 10.0}
CONTENTS = ("tiled", "resized")
INDEXING_GOAL, GROWTH_GOAL_PERCENT, GROWTH_SAMPLES = 50.0, 2.0, 20_000


@dataclass(frozen=True)
class Scale:
    """Sizes and lengths of the measurements.

    Attributes:
        reduction: by which the sides of the photographs are divided.
        photos: number of different files of each size.
        images: images of each size that each side loads in a round; fewer of large ones.
        step_images: batch size of the simulated step.
        step_s: time of the simulated step: 128 images/s, a GPU's rate on a large encoder.
        waiting_s: time for which each loop is measured, after its queue has drained.
        tiny_files: number of files to index.
        memory_rows: rows of the index that the workers read from.
        warm_up, memory_samples: samples drawn before the first reading of the workers' memory, and from it to the last.
        num_readings: readings of their memory. A single reading varies by 2.5 %, so two would not show a growth of 2 %.
        settle_s: time until the workers have filled their queue, before each reading.
    """

    rounds: int = 5
    reduction: int = 1
    photos: int = 8
    images: int = 64
    step_images: int = 16
    step_s: float = 0.125
    waiting_s: float = 6.0
    tiny_files: int = 20_000
    memory_rows: int = 1_000_000
    warm_up: int = 20_000
    memory_samples: int = 40_000
    num_readings: int = 11
    settle_s: float = 3.0


QUICK = Scale(
    rounds=1,
    reduction=4,
    photos=1,
    images=1,
    step_images=1,
    step_s=0.01,
    waiting_s=0.2,
    tiny_files=100,
    memory_rows=1_000,
    warm_up=64,
    memory_samples=256,
    num_readings=3,
    settle_s=0.2,
)


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen parts, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; all by default")
    parser.add_argument("--quick", action="store_true", help="a smoke run whose figures mean nothing")
    options = parser.parse_args(arguments)
    scale = QUICK if options.quick else Scale()
    with tempfile.TemporaryDirectory(prefix="simmim-loading-") as folder:
        # Set before datasets is imported: no network, and caches in the temporary folder. XDG_CACHE_HOME holds the index.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf", "XDG_CACHE_HOME": f"{folder}/cache"}
        import torch

        torch.set_num_threads(1)
        random.seed(0)
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # on fewer cores, as intended
        results: dict = {"quick": options.quick, "machine": describe_machine()}
        measure = {
            "decoding": measure_decoding,
            "waiting": measure_waiting,
            "indexing": measure_indexing,
            "memory": measure_memory,
        }
        for part in options.only:
            print(f"measuring {part}", file=sys.stderr, flush=True)
            results[part] = measure[part](Path(folder), scale)
    print(as_markdown(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def describe_machine() -> dict[str, str | int]:
    """Cores and versions that the figures were measured with."""
    import datasets
    import PIL
    import torch

    from simmim.data import available_cores

    return {
        "cores": available_cores(),
        "system": platform.system(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "datasets": datasets.__version__,
    }


# --- Decoding -----------------------------------------------------------------------------------------------------


def measure_decoding(folder: Path, scale: Scale) -> list[dict]:
    """Images per second of processor time, which other jobs on the machine do not change."""
    from simmim.data import normalize

    rows = []
    for (size, goal), content in itertools.product(PHOTOS.items(), CONTENTS):
        paths = photographs(folder, reduced(size, scale), scale.photos, content)
        usual, ours = UsualPipeline(paths), toolkit_samples(paths)
        count = max(len(paths), round(scale.images * min(1.0, 1600 * 1200 / math.prod(size))))

        def normalized(epoch: int, index: int, ours=ours):
            return normalize(ours[epoch, index]["image"][None], IMAGENET_MEAN, IMAGENET_STD)

        kept = toolkit_samples(paths, folder / "kept")
        first_epoch = FirstEpoch(paths, folder)

        loaders: dict[str, Callable[[int, int], object]] = {
            "usual": lambda epoch, index, usual=usual: usual[index],
            "ours": lambda epoch, index, ours=ours: ours[epoch, index % len(ours)],
            "ours_first": first_epoch,
            "ours_kept": lambda epoch, index, kept=kept: kept[epoch, index % len(kept)],
            "ours_normalized": lambda epoch, index, ours=ours: normalized(epoch, index % len(ours)),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for load in loaders.values():
            load(0, 0)
        apart = [levels_apart(ours, kept, (0, index)) for index in range(len(paths))]  # and all images are kept from now on
        for number in range(scale.rounds):
            first_epoch.prepare(count)
            for name, load in loaders.items():
                started = time.process_time()
                for index in range(count):
                    load(number * count + index, index)
                rates[name].append(count / max(time.process_time() - started, 1e-9))
        rows.append(
            {
                "width_px": size[1],
                "height_px": size[0],
                "content": content,
                "mean_kib": round(statistics.mean(map(os.path.getsize, paths)) / 1024),
                "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
                "ratio": median_ratio(rates["ours"], rates["usual"]),
                "ratio_normalized": median_ratio(rates["ours_normalized"], rates["usual"]),
                "ratio_kept": median_ratio(rates["ours_kept"], rates["usual"]),
                "first_to_ours": median_ratio(rates["ours_first"], rates["ours"]),
                "levels_apart": statistics.mean(apart),
                "goal": goal,
                "rounds": rates,
            }
        )
    return rows


def reduced(size: tuple[int, int], scale: Scale) -> tuple[int, int]:
    """Height and width of the files that stand for photographs of a size: its own but in a smoke run."""
    return size[0] // scale.reduction, size[1] // scale.reduction


def levels_apart(direct, kept, key: tuple[int, int]) -> float:
    """The mean difference of a sample's pixels, 0 to 255, from its file and as it is kept."""
    return float((direct[key]["image"].float() - kept[key]["image"].float()).abs().mean())


def median_ratio(ours: list[float], usual: list[float]) -> float:
    """The median of the rounds' ratios of ours to usual."""
    return statistics.median(mine / theirs for mine, theirs in zip(ours, usual))


# --- Waiting -------------------------------------------------------------------------------------------------------


def measure_waiting(folder: Path, scale: Scale) -> list[dict]:
    """The share of a training loop's time that is spent waiting for the next batch.

    The step is simulated by a sleep, because a GPU's step leaves the processor to the loading. Our batches come from the
    toolkit's loader, those of the usual pipeline from a plain DataLoader with the same number of workers and length of
    queue.
    """
    from torch.utils.data import DataLoader

    from simmim.data import EndlessBatchSampler, build_loader

    class Repeated(UsualPipeline):
        """An epoch that does not end while it is measured."""

        def __len__(self) -> int:
            return 10_000_000

    rows = []
    for size in PHOTOS:
        paths = photographs(folder, reduced(size, scale), scale.photos)
        for workers in (1, 2):
            samples = toolkit_samples(paths * 1000)  # an epoch of a realistic length
            loaders = {
                "usual": DataLoader(
                    Repeated(paths), scale.step_images, num_workers=workers, prefetch_factor=4, persistent_workers=True
                ),
                "ours": build_loader(
                    samples, workers=workers, order=EndlessBatchSampler(len(samples), scale.step_images, seed=0)
                ),
            }
            measured = {name: waiting_share(loader, scale) for name, loader in loaders.items()}
            rows.append(
                {
                    "width_px": size[1],
                    "height_px": size[0],
                    "workers": workers,
                    "step_images_per_second": scale.step_images / scale.step_s,
                    "waiting_percent": {name: 100 * share for name, (share, _) in measured.items()},
                    "worker_cores": {name: cores for name, (_, cores) in measured.items()},
                }
            )
    return rows


def waiting_share(loader: Iterable, scale: Scale) -> tuple[float, float]:
    """Time spent waiting for batches over the total time, and the number of cores that the workers used meanwhile.

    Measuring begins when the batches loaded ahead of the first step are used up. If the loop waits for workers that used
    fewer cores than there are workers, other jobs on the machine limited them.
    """
    stream = iter(loader)
    next(stream)
    ahead = loader.num_workers * loader.prefetch_factor
    for _ in range(ahead):
        next(stream)
        time.sleep(scale.step_s)
    pids = [worker.pid for worker in stream._workers]
    waited, worked, started = 0.0, sum(map(processor_s, pids)), time.perf_counter()
    while (now := time.perf_counter()) - started < scale.waiting_s:
        next(stream)
        waited += time.perf_counter() - now
        time.sleep(scale.step_s)
    lasted, worked = time.perf_counter() - started, sum(map(processor_s, pids)) - worked
    stop(stream)
    return waited / lasted, worked / lasted


def processor_s(pid: int) -> float:
    """Processor time of a process so far, in seconds."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def stop(stream) -> None:
    """End a loader's workers now, so that they do not disturb the next measurement. torch has no public function for this
    where workers persist."""
    stream._shutdown_workers()


# --- Indexing -----------------------------------------------------------------------------------------------------


def measure_indexing(folder: Path, scale: Scale) -> dict:
    """Files per second of our index, without and with a kept one, and of `load_dataset("imagefolder")`."""
    import datasets
    from PIL import Image

    from simmim.data.index import index_folder

    datasets.disable_progress_bars()
    root = folder / "tiny"
    first = None
    for number in range(scale.tiny_files):
        path = root / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        if first is None or number % 1000 == 0:
            path.parent.mkdir(parents=True)
        if first is None:
            Image.new("RGB", (16, 16), "teal").save(path)
            first = path.read_bytes()
        else:
            path.write_bytes(first)
    time.sleep(2.5)  # folders that changed within the last two seconds are always read again
    cache = folder / "cache"

    def cold() -> int:
        shutil.rmtree(cache, ignore_errors=True)
        return len(index_folder(root))

    def warm() -> int:
        return len(index_folder(root))

    def imagefolder() -> int:
        imagefolder_cache = folder / "imagefolder-cache"
        shutil.rmtree(imagefolder_cache, ignore_errors=True)
        return len(datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(imagefolder_cache)))

    rates: dict[str, list[float]] = {"cold": [], "warm": [], "imagefolder": []}
    for number in range(min(scale.rounds, 3)):  # imagefolder takes half a minute each time
        for name, run in {"cold": cold, "warm": warm, "imagefolder": imagefolder}.items():
            started = time.perf_counter()
            count = run()
            rates[name].append(count / (time.perf_counter() - started))
            assert count == scale.tiny_files, (name, number, count)
    return {
        "files": scale.tiny_files,
        "files_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_cold": median_ratio(rates["cold"], rates["imagefolder"]),
        "ratio_warm": median_ratio(rates["warm"], rates["imagefolder"]),
        "goal": INDEXING_GOAL,
        "rounds": rates,
    }


# --- Memory --------------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, scale: Scale) -> dict:
    """Memory of four workers that load many samples from a large index, and its growth.

    The index is a memory-mapped Arrow file, as `index_folder` keeps it; its rows repeat a few real files. There are three
    numbers for all processes together: resident (shared pages count in each), proportional (shared pages are divided among
    those that share them), and anonymous, the allocated part of proportional. A leak makes the anonymous part grow; unlike
    pages of a mapped file, the system cannot drop it. Two more tell a leak from what the C library keeps of freed blocks: a
    leak makes blocks in use grow.
    """
    import datasets

    from simmim.data import EndlessBatchSampler, ImageSamples, RandomView, build_loader
    from simmim.data.index import write_paths

    paths = photographs(folder, (375, 500), scale.photos)
    index = folder / "large-index.arrow"
    write_paths(index, (paths[row % len(paths)] for row in range(scale.memory_rows)))
    source = datasets.Dataset.from_file(str(index))
    samples = SamplesWithHeap(ImageSamples(source, RandomView((SIDE_PX, SIDE_PX)), channels=3, seed=0))
    batch, workers = 32, 4
    loader = build_loader(samples, workers=workers, order=EndlessBatchSampler(len(samples), batch, seed=0))
    stream = iter(loader)
    counts, readings, heaps = [], [], {}
    between = math.ceil(scale.memory_samples / (scale.num_readings - 1) / batch)
    for number in range(scale.num_readings):
        for _ in range(between if number else math.ceil(scale.warm_up / batch)):
            heaps |= dict(filter(None, next(stream)["row"]))
        time.sleep(scale.settle_s)
        counts.append(number * between * batch)
        heap = {f"{name} of the heap": sum(held[name] for held in heaps.values()) for name in heap_mib()}
        readings.append(workers_mib(worker.pid for worker in stream._workers) | heap)
    stop(stream)
    growth = {name: slope(counts, [reading[name] for reading in readings]) for name in readings[0]}
    of_mean = {name: 100 * GROWTH_SAMPLES / statistics.mean(reading[name] for reading in readings) for name in readings[0]}
    return {
        "workers": workers,
        "index_rows": scale.memory_rows,
        "samples": counts,
        "mib": {name: [reading[name] for reading in readings] for name in readings[0]},
        "growth_percent": {name: value * of_mean[name] for name, (value, _) in growth.items()},
        "growth_error_percent": {name: error * of_mean[name] for name, (_, error) in growth.items()},
        "growth_samples": GROWTH_SAMPLES,
        "goal_percent": GROWTH_GOAL_PERCENT,
    }


def slope(x: list[int], y: list[float]) -> tuple[float, float]:
    """The slope of the least-squares line through the points, and its standard error."""
    fit = statistics.linear_regression(x, y)
    residual = sum((b - fit.slope * a - fit.intercept) ** 2 for a, b in zip(x, y))
    return fit.slope, math.sqrt(residual / (len(x) - 2) / (statistics.pvariance(x) * len(x)))


def workers_mib(pids: Iterable[int]) -> dict[str, float]:
    """Memory of all processes together in MiB: resident, proportional and anonymous."""
    names = {"Rss": "resident", "Pss": "proportional", "Pss_Anon": "anonymous"}
    total = dict.fromkeys(names.values(), 0.0)
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                total[names[name]] += int(value.split()[0]) / 1024
    return total


# --- The table --------------------------------------------------------------------------------------------------------


def as_markdown(results: dict) -> str:
    """The figures, one row each, with the goals."""
    rows = [*map(decoding_row, results.get("decoding", ())), *map(waiting_row, results.get("waiting", ()))]
    if "indexing" in results:
        rows += indexing_rows(results["indexing"])
    if "memory" in results:
        rows += memory_rows(results["memory"])
    head = ("measured", "usual", "ours", "ratio or growth", "wanted")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---", *["---:"] * 4), *rows)]
    return "\n".join(lines)


def decoding_row(row: dict) -> tuple[str, ...]:
    """One size and content of photographs."""
    rate = row["images_per_second"]
    return (
        f"images/s per core, {row['width_px']}×{row['height_px']}, {row['content']} ({row['mean_kib']:,} KiB)",
        f"{rate['usual']:,.1f}",
        f"{rate['ours']:,.1f}; normalized too {rate['ours_normalized']:,.1f}; first epoch {rate['ours_first']:,.1f}, then "
        f"{rate['ours_kept']:,.1f}",
        f"{row['ratio']:.2f}×; {row['ratio_normalized']:.2f}×; {row['first_to_ours']:.2f} of ours, "
        f"{row['ratio_kept']:.1f}×, {row['levels_apart']:.2f} levels apart",
        f"≥ {row['goal']:g}×",
    )


def waiting_row(row: dict) -> tuple[str, ...]:
    """One size of photographs and number of workers."""
    share, cores = row["waiting_percent"], row["worker_cores"]
    return (
        f"waiting for data, {row['width_px']}×{row['height_px']}, {row['workers']} worker"
        f"{'s' * (row['workers'] > 1)}, step of {row['step_images_per_second']:,.0f} images/s",
        f"{share['usual']:.1f} % on {cores['usual']:.1f} cores",
        f"{share['ours']:.1f} % on {cores['ours']:.1f} cores",
        "",
        "",
    )


def indexing_rows(row: dict) -> list[tuple[str, ...]]:
    """Without and with a kept index."""
    rate = row["files_per_second"]
    return [
        (
            f"indexing {row['files']:,} files, files/s, {name}",
            f"{rate['imagefolder']:,.0f}",
            f"{rate[name]:,.0f}",
            f"{row[f'ratio_{name}']:,.0f}×",
            f"≥ {row['goal']:g}×",
        )
        for name in ("cold", "warm")
    ]


def memory_rows(row: dict) -> list[tuple[str, ...]]:
    """One row per kind of memory."""
    return [
        (
            f"memory of {row['workers']} workers, {name}, growth in {row['growth_samples']:,} samples, index of "
            f"{row['index_rows']:,}",
            "",
            f"{min(row['mib'][name]):,.0f} to {max(row['mib'][name]):,.0f} MiB",
            f"{growth:+.1f} ± {row['growth_error_percent'][name]:.1f} %",
            f"< {row['goal_percent']:g} %",
        )
        for name, growth in row["growth_percent"].items()
    ]


if __name__ == "__main__":
    sys.exit(main())
