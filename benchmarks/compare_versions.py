"""The training step of two versions of this toolkit, interleaved on the same machine.

    .venv/bin/python benchmarks/compare_versions.py --old DIR --new DIR --threads 1

DIR is a checkout of this repository, of version 0.1 or later. Each version runs in a process of its own, with the same
threads, initial weights, images and masks, and computes only when it is asked to. A round asks both for one step of
benchmarks/step.py (forward, backward, fused AdamW), in alternating order. Prints the median time of each, the median of the
rounds' ratios, and the largest difference between the losses of the same step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

from processes import Worker, answer

VERSIONS = ("old", "new")


def main(arguments: list[str] | None = None) -> int:
    """Compare both versions in each precision and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, metavar="DIR", help="checkout of one version")
    parser.add_argument("--new", type=Path, metavar="DIR", help="checkout of the other")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=192, help="side of the images in pixels")
    parser.add_argument("--window", type=int, default=12, help="side of a window in tokens")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, json.loads(sys.stdin.readline()))
        return 0
    for version in VERSIONS:
        checkout = getattr(options, version)
        if checkout is None or not (checkout / "simmim/__init__.py").is_file():
            parser.error(f"--{version} is {checkout}: give the root of a checkout of this repository")
    names = ("preset", "size", "window", "batch", "threads")
    print("| precision | old, s | new, s | new / old, median of rounds | largest difference of losses |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for precision in options.precision:
        work = {**{name: getattr(options, name) for name in names}, "precision": precision}
        steps = measure(options.old.resolve(), options.new.resolve(), work, options.rounds)
        print(as_row(precision, steps), flush=True)
    return 0


def measure(old: Path, new: Path, work: dict, rounds: int) -> dict[str, list[dict]]:
    """The steps of both versions in the order of the rounds: seconds and loss of each."""
    steps: dict[str, list[dict]] = {version: [] for version in VERSIONS}
    with contextlib.ExitStack() as stack:
        workers = {}
        for version, checkout in zip(VERSIONS, (old, new)):
            environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(work["threads"])}
            workers[version] = Worker([__file__, "--serve", str(checkout)], environment)
            stack.callback(workers[version].close)
            workers[version].ask(json.dumps(work))
        for number in range(rounds):
            for version in VERSIONS if number % 2 else VERSIONS[::-1]:
                steps[version].append(workers[version].ask("step"))
    return steps


def as_row(precision: str, steps: dict[str, list[dict]]) -> str:
    """A row of the table."""
    old, new = ([step["seconds"] for step in steps[version]] for version in VERSIONS)
    ratio = statistics.median(after / before for before, after in zip(old, new))
    difference = max(abs(before["loss"] - after["loss"]) for before, after in zip(steps["old"], steps["new"]))
    return f"| {precision} | {statistics.median(old):.3f} | {statistics.median(new):.3f} | {ratio:.3f} | {difference:.2g} |"


# --- A version's process -----------------------------------------------------------------------------------------------


def serve(checkout: Path, work: dict) -> None:
    """Run one version: take a step for each line on standard input, until the input ends."""
    import simmim

    if Path(simmim.__file__).resolve().parents[1] != checkout:
        raise SystemExit(f"simmim was imported from {simmim.__file__} and not from {checkout}")
    import torch
    from torch import nn

    torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    model, masking = build(work["preset"], work["window"])
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):  # weights of 0 would hide differences between the blocks
            nn.init.constant_(parameter, 0.5)
    shape = (work["batch"], 3, work["size"], work["size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = masking.draw(work["batch"], shape[2:], torch.Generator(), list(range(work["batch"])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> dict:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=work["precision"] == "bf16"):
            loss = model(images, mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - started, "loss": loss.item()}

    answer(step())  # compiles the kernels where they are not kept yet
    for _ in sys.stdin:
        answer(step())


def build(preset: str, window: int):
    """SimMIM in training mode, with kernels, and its masking, by the modules of this process's version."""
    try:
        from simmim.cli.allocator import keep_freed_memory
        from simmim.encoders import registry
        from simmim.methods.masking import BlockMasking
        from simmim.methods.simmim import SimMIM

        encoder = registry.build(registry.preset_config(preset, window_size=window))
    except ModuleNotFoundError:  # version 0.1
        from simmim.allocator import keep_freed_memory
        from simmim.masking import BlockMasking
        from simmim.model import SimMIM
        from simmim.swinv2 import SwinV2, SwinV2Config

        encoder = SwinV2(SwinV2Config.from_preset(preset, window_size=window))
    keep_freed_memory()  # as the command does
    return SimMIM(encoder).train(), BlockMasking()


if __name__ == "__main__":
    sys.exit(main())
