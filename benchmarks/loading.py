"""What loading costs, against what is usual: decoding, waiting for data, indexing, memory.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/loading.py --out loading.json

Prints a Markdown table and writes JSON. Both sides of each comparison run in turn within each round, so that what else
the machine does meets both; medians over the rounds. No network, everything lies in a temporary folder.
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

from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD

# Memory before indexing: imagefolder swells the process that the workers are forked from.
PARTS = ("decoding", "waiting", "memory", "indexing")
SIDE_PX = 192
# Width and height, with the least ratio to the usual pipeline that is wanted.
PHOTOS = {(500, 375): 1.0, (1600, 1200): 4.0, (4000, 3000): 10.0}
CONTENTS = ("tiled", "resized")
INDEXING_GOAL, GROWTH_GOAL_PERCENT, GROWTH_SAMPLES = 50.0, 2.0, 20_000


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        photos: different files of each size.
        images: loaded of each size in a round, by each side; fewer of large ones.
        step_images: batch of the simulated step.
        step_s: its time: 128 images/s, some GPU's rate on a large encoder.
        waiting_s: time for which each loop is watched, after as long as its queue takes to drain.
        tiny_files: indexed.
        memory_rows: rows of the index that the workers draw from.
        warm_up, memory_samples: samples drawn before the first look at the workers' memory, and from it to the last.
        looks: at their memory. One alone swings by 2.5 %, too much to tell a growth of 2 % by two of them.
        settle_s: until the workers have filled their queue, before each look.
    """

    rounds: int = 5
    photos: int = 8
    images: int = 64
    step_images: int = 16
    step_s: float = 0.125
    waiting_s: float = 6.0
    tiny_files: int = 20_000
    memory_rows: int = 1_000_000
    warm_up: int = 20_000
    memory_samples: int = 40_000
    looks: int = 11
    settle_s: float = 3.0


QUICK = Scale(
    rounds=2,
    photos=2,
    images=2,
    step_images=2,
    step_s=0.01,
    waiting_s=0.2,
    tiny_files=100,
    memory_rows=1_000,
    warm_up=64,
    memory_samples=256,
    looks=3,
    settle_s=0.2,
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; all by default")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its figures mean nothing")
    chosen = parser.parse_args(arguments)
    scale = QUICK if chosen.quick else Scale()
    with tempfile.TemporaryDirectory(prefix="simmim-loading-") as folder:
        # Before datasets is imported: no network, and no cache but ours. The index is kept under XDG_CACHE_HOME.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf", "XDG_CACHE_HOME": f"{folder}/cache"}
        import torch

        torch.set_num_threads(1)
        random.seed(0)
        results: dict = {"quick": chosen.quick, "machine": machine()}
        measure = {"decoding": decoding, "waiting": waiting, "indexing": indexing, "memory": memory}
        for part in chosen.only:
            print(f"measuring {part}", file=sys.stderr, flush=True)
            results[part] = measure[part](Path(folder), scale)
    print(as_markdown(results))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
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


# --- Images -----------------------------------------------------------------------------------------------------------


def photographs(folder: Path, size: tuple[int, int], count: int, content: str = "tiled") -> list[str]:
    """`count` JPEGs of `size` (width, height), quality 90, of two real photographs of 640×427 px.

    A JPEG's decoder works by the pixel and by the bit, and decoding coarsely saves the former part alone. So two kinds
    bracket what cameras write: "tiled", the photographs continued by mirrored copies, has a shrunk picture's detail in
    every pixel (1.4 to 2.9 bits); "resized", each photograph brought to the size, has little where it is enlarged.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    folder = folder / f"{content}-{size[0]}x{size[1]}"
    paths = [folder / f"{number}.jpg" for number in range(count)]
    if folder.is_dir():
        return list(map(str, paths))
    folder.mkdir(parents=True)
    width, height = size
    for number, path in enumerate(paths):
        photo = load_sample_image(("china.jpg", "flower.jpg")[number % 2])
        if content == "resized":
            box = (4 * number, 0, 4 * number + 427 * 4 // 3, 427)  # 4:3, as all the sizes
            image = Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC, box=box)
        else:
            mirrored = np.concatenate([photo, photo[:, ::-1]], axis=1)
            mirrored = np.roll(np.concatenate([mirrored, mirrored[::-1]]), 37 * number, axis=(0, 1))
            tiles = -(-height // mirrored.shape[0]), -(-width // mirrored.shape[1]), 1
            image = Image.fromarray(np.tile(mirrored, tiles)[:height, :width])
        image.save(path, quality=90)
    return list(map(str, paths))


def undecoded(paths: list[str]):
    """Paths as the toolkit's sources give them."""
    import datasets

    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))


class Usual:
    """As an ImageFolder's users have it: decode in full, to RGB, random resized crop, flip, to float, normalize.

    Written after torchvision's default loader and its transforms RandomResizedCrop, RandomHorizontalFlip, ToTensor and
    Normalize on PIL images, operation by operation. Crops are drawn as SimMIM does, as ours are.
    """

    def __init__(self, paths: list[str]) -> None:
        from simmim.data import RandomView

        self.paths, self.view = paths, RandomView((SIDE_PX, SIDE_PX))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        import numpy as np
        import torch
        from PIL import Image

        with open(self.paths[index % len(self.paths)], "rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, right, bottom = self.view.crop_box(image.size[::-1], random)
        image = image.crop((left, top, right, bottom)).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return pixels.to(torch.float32).div(255).sub_(mean).div_(std)


def our_samples(paths: list[str]):
    """The toolkit's samples of `paths`: (epoch, index) to uint8, cropped and flipped."""
    from simmim.data import ImageSamples, RandomView

    return ImageSamples(undecoded(paths), RandomView((SIDE_PX, SIDE_PX)), channels=3, seed=0)


# --- (a) decoding -----------------------------------------------------------------------------------------------------


def decoding(folder: Path, scale: Scale) -> list[dict]:
    """Images a second per core, by processor time, so that others on a shared machine are not counted in."""
    from simmim.data import normalize

    rows = []
    for (size, goal), content in itertools.product(PHOTOS.items(), CONTENTS):
        paths = photographs(folder, size, scale.photos, content)
        usual, ours = Usual(paths), our_samples(paths)
        count = max(len(paths), round(scale.images * min(1.0, 1600 * 1200 / math.prod(size))))

        def normalized(epoch: int, index: int, ours=ours):
            return normalize(ours[epoch, index]["image"][None], IMAGENET_MEAN, IMAGENET_STD)

        arms: dict[str, Callable[[int, int], object]] = {
            "usual": lambda epoch, index, usual=usual: usual[index],
            "ours": lambda epoch, index, ours=ours: ours[epoch, index % len(ours)],
            "ours_normalized": lambda epoch, index, ours=ours: normalized(epoch, index % len(ours)),
        }
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for load in arms.values():
            load(0, 0)
        for number in range(scale.rounds):
            for name, load in arms.items():
                started = time.process_time()
                for index in range(count):
                    load(number * count + index, index)
                rates[name].append(count / max(time.process_time() - started, 1e-9))
        rows.append(
            {
                "width_px": size[0],
                "height_px": size[1],
                "content": content,
                "mean_kib": round(statistics.mean(map(os.path.getsize, paths)) / 1024),
                "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
                "ratio": median_ratio(rates["ours"], rates["usual"]),
                "ratio_normalized": median_ratio(rates["ours_normalized"], rates["usual"]),
                "goal": goal,
                "rounds": rates,
            }
        )
    return rows


def median_ratio(ours: list[float], usual: list[float]) -> float:
    """The median over the rounds of ours to usual: both sides of a round ran next to each other."""
    return statistics.median(mine / theirs for mine, theirs in zip(ours, usual))


# --- (b) waiting ------------------------------------------------------------------------------------------------------


def waiting(folder: Path, scale: Scale) -> list[dict]:
    """The share of a training loop's time that is spent waiting for the next batch.

    The step is simulated by a sleep: a GPU's step, too, leaves the processor to the loading. Batches come through the
    toolkit's loader, the usual pipeline's through a plain DataLoader with as many workers and as long a queue.
    """
    from torch.utils.data import DataLoader

    from simmim.data import EndlessBatchSampler, build_loader

    class Repeated(Usual):
        """An epoch long enough not to end while it is watched."""

        def __len__(self) -> int:
            return 10_000_000

    rows = []
    for size in PHOTOS:
        paths = photographs(folder, size, scale.photos)
        for workers in (1, 2):
            samples = our_samples(paths * 1000)  # an epoch as long as a real one
            loaders = {
                "usual": DataLoader(
                    Repeated(paths), scale.step_images, num_workers=workers, prefetch_factor=4, persistent_workers=True
                ),
                "ours": build_loader(
                    samples, workers=workers, order=EndlessBatchSampler(len(samples), scale.step_images, seed=0)
                ),
            }
            watched = {name: waiting_share(loader, scale) for name, loader in loaders.items()}
            rows.append(
                {
                    "width_px": size[0],
                    "height_px": size[1],
                    "workers": workers,
                    "step_images_per_second": scale.step_images / scale.step_s,
                    "waiting_percent": {name: 100 * share for name, (share, _) in watched.items()},
                    "worker_cores": {name: had for name, (_, had) in watched.items()},
                }
            )
    return rows


def waiting_share(loader: Iterable, scale: Scale) -> tuple[float, float]:
    """Time waited for batches over all time, once the batches that were loaded ahead of the first step are used up; and
    the cores that the workers had meanwhile.

    Waiting workers that had fewer cores than they are many shared them with others: then the machine was measured.
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
    """Processor time of a process so far."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def stop(stream) -> None:
    """End a loader's processes now: what they would still load must not disturb what is measured next. torch has no
    public way of it for loaders whose workers persist."""
    stream._shutdown_workers()


# --- (c) indexing -----------------------------------------------------------------------------------------------------


def indexing(folder: Path, scale: Scale) -> dict:
    """Files a second: our index without and with one kept from before, and `load_dataset("imagefolder")`."""
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
    time.sleep(2.5)  # an index does not trust folders that changed within the last two seconds
    cache = folder / "cache"

    def cold() -> int:
        shutil.rmtree(cache, ignore_errors=True)
        return len(index_folder(root))

    def warm() -> int:
        return len(index_folder(root))

    def imagefolder() -> int:
        place = folder / "imagefolder-cache"
        shutil.rmtree(place, ignore_errors=True)
        return len(datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(place)))

    rates: dict[str, list[float]] = {"cold": [], "warm": [], "imagefolder": []}
    for number in range(min(scale.rounds, 3)):  # imagefolder takes half a minute each time
        for name, run in {"cold": cold, "warm": warm, "imagefolder": imagefolder}.items():
            started = time.perf_counter()
            found = run()
            rates[name].append(found / (time.perf_counter() - started))
            assert found == scale.tiny_files, (name, number, found)
    return {
        "files": scale.tiny_files,
        "files_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_cold": median_ratio(rates["cold"], rates["imagefolder"]),
        "ratio_warm": median_ratio(rates["warm"], rates["imagefolder"]),
        "goal": INDEXING_GOAL,
        "rounds": rates,
    }


# --- (d) memory -------------------------------------------------------------------------------------------------------


def memory(folder: Path, scale: Scale) -> dict:
    """Memory of four loading processes that draw many samples from a large index, and by what it grows.

    The index is a memory-mapped Arrow file, as `index_folder` keeps it; its rows repeat a few real files. Three numbers
    of all processes together: resident (shared pages counted in each), proportional (shared pages divided among those
    that share them) and anonymous, the part of the proportional that was allocated: what creeps where something leaks,
    and what cannot simply be dropped, as pages of a mapped file can.
    """
    import datasets

    from simmim.data import EndlessBatchSampler, ImageSamples, RandomView, build_loader
    from simmim.data.index import write_paths

    paths = photographs(folder, (500, 375), scale.photos)
    index = folder / "large-index.arrow"
    write_paths(index, (paths[row % len(paths)] for row in range(scale.memory_rows)))
    source = datasets.Dataset.from_file(str(index))
    samples = ImageSamples(source, RandomView((SIDE_PX, SIDE_PX)), channels=3, seed=0)
    batch, workers = 32, 4
    warnings.filterwarnings("ignore", message="This DataLoader will create 4 worker")  # on fewer cores: meant so
    loader = build_loader(samples, workers=workers, order=EndlessBatchSampler(len(samples), batch, seed=0))
    stream = iter(loader)
    counts, looks = [], []
    between = math.ceil(scale.memory_samples / (scale.looks - 1) / batch)
    for look in range(scale.looks):
        for _ in range(between if look else math.ceil(scale.warm_up / batch)):
            next(stream)
        time.sleep(scale.settle_s)
        counts.append(look * between * batch)
        looks.append(workers_mib(worker.pid for worker in stream._workers))
    stop(stream)
    growth = {name: slope(counts, [look[name] for look in looks]) for name in looks[0]}
    of_mean = {name: 100 * GROWTH_SAMPLES / statistics.mean(look[name] for look in looks) for name in looks[0]}
    return {
        "workers": workers,
        "index_rows": scale.memory_rows,
        "samples": counts,
        "mib": {name: [look[name] for look in looks] for name in looks[0]},
        "growth_percent": {name: value * of_mean[name] for name, (value, _) in growth.items()},
        "growth_error_percent": {name: error * of_mean[name] for name, (_, error) in growth.items()},
        "growth_samples": GROWTH_SAMPLES,
        "goal_percent": GROWTH_GOAL_PERCENT,
    }


def slope(x: list[int], y: list[float]) -> tuple[float, float]:
    """Of the line of least squares through the points, and its standard error."""
    fit = statistics.linear_regression(x, y)
    residual = sum((value - fit.slope * place - fit.intercept) ** 2 for place, value in zip(x, y))
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
    """The figures for a reader, one line each, with what is wanted."""
    rows = []
    for row in results.get("decoding", ()):
        rate = row["images_per_second"]
        rows.append(
            (
                f"images/s per core, {row['width_px']}×{row['height_px']}, {row['content']} ({row['mean_kib']:,} KiB)",
                f"{rate['usual']:,.1f}",
                f"{rate['ours']:,.1f}; normalized too {rate['ours_normalized']:,.1f}",
                f"{row['ratio']:.2f}×; {row['ratio_normalized']:.2f}×",
                f"≥ {row['goal']:g}×",
            )
        )
    for row in results.get("waiting", ()):
        share, had = row["waiting_percent"], row["worker_cores"]
        rows.append(
            (
                f"waiting for data, {row['width_px']}×{row['height_px']}, {row['workers']} worker"
                f"{'s' * (row['workers'] > 1)}, step of {row['step_images_per_second']:,.0f} images/s",
                f"{share['usual']:.1f} % on {had['usual']:.1f} cores",
                f"{share['ours']:.1f} % on {had['ours']:.1f} cores",
                "",
                "",
            )
        )
    if "indexing" in results:
        row = results["indexing"]
        rate = row["files_per_second"]
        for name in ("cold", "warm"):
            rows.append(
                (
                    f"indexing {row['files']:,} files, files/s, {name}",
                    f"{rate['imagefolder']:,.0f}",
                    f"{rate[name]:,.0f}",
                    f"{row[f'ratio_{name}']:,.0f}×",
                    f"≥ {row['goal']:g}×",
                )
            )
    if "memory" in results:
        row = results["memory"]
        for name, growth in row["growth_percent"].items():
            rows.append(
                (
                    f"{name} memory of {row['workers']} workers, growth in {row['growth_samples']:,} samples, index of "
                    f"{row['index_rows']:,}",
                    "",
                    f"{min(row['mib'][name]):,.0f} to {max(row['mib'][name]):,.0f} MiB",
                    f"{growth:+.1f} ± {row['growth_error_percent'][name]:.1f} %",
                    f"< {row['goal_percent']:g} %",
                )
            )
    head = ("measured", "usual", "ours", "ratio or growth", "wanted")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---", *["---:"] * 4), *rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
