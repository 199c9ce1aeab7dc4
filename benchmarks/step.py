"""The training step against transformers', timm's and the authors' code, interleaved on the same machine.

    .venv/bin/python benchmarks/step.py --precision float32 bf16 --json step.json
    .venv/bin/python benchmarks/step.py --batch 48 --contenders ours canvas2 canvas3 canvas4    # several images on a canvas
    .venv/bin/python benchmarks/step.py --features              # inference: images to feature vectors
    .venv/bin/python benchmarks/step.py --authors DIR           # with the authors' published code, a checkout in DIR

Images, masks and weights are the same for all contenders (benchmarks/contenders.py). Each contender runs in a process of its
own that computes only when it is asked to, so no two compute at once. A round asks all of them in turn, each for one step
that is not timed and then for the steps that are. A step is forward, backward, and fused AdamW. On CUDA a contender gives
the memory that its step needed back to the device after each turn and keeps weights and the optimizer's state, so a batch
may be as large as the largest contender alone allows.

Each round also measures the rate of a plain matrix product (2048³ on a CPU, 8192³ on CUDA), the median over one second. The
share is the rate of the operations in a contender's own matrix products, divided by that rate; both are medians over the
rounds. Peers that are not installed are listed and left out. The authors' code is no package and no part of this repository:
DIR is a checkout of https://github.com/microsoft/Swin-Transformer, which needs timm. Prints Markdown; --json writes every
figure.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import PEERS, SHARES, Work, build_contender, canvas_of, draw_batch, missing_peers, write_weights
from processes import Worker, answer, reset_peak, resident_mib
from torch import nn

from simmim.cli.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
GEMM_SECONDS = 1.0
# Timed steps of each contender in a round. A step of a GPU takes milliseconds, and its clock rises within some of them.
STEPS_PER_ROUND = {"cpu": 1, "cuda": 20}
LOSS_TOLERANCE = 2e-3  # between contenders at the first step; bfloat16 rounds each network differently


def main(arguments: list[str] | None = None) -> int:
    """Compare the contenders and print the tables."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, Work(**json.loads(sys.stdin.readline())))
        return 0
    if options.authors and not (options.authors / "models/simmim.py").is_file():
        parser.error(f"--authors {options.authors} holds no models/simmim.py: give the root of a checkout")
    known = ("ours", *SHARES, *PEERS)
    if unknown := [name for name in options.contenders if name.partition("+")[0] not in known]:
        parser.error(f"unknown contender {unknown[0]!r}: give some of {', '.join(known)}, with +compile or without")
    for name in options.contenders:
        share = SHARES.get(name.partition("+")[0], 1)
        if share > 1 and options.features:
            parser.error(f"{name} is a way of training: leave it out with --features")
        if options.batch % share:
            parser.error(f"--batch {options.batch} for {name}: give a multiple of {share}")
    missing = missing_peers(options.authors)
    for name, reason in missing.items():
        print(f"{name} {reason}: left out", file=sys.stderr)
    names = [name for name in options.contenders if name.partition("+")[0] not in missing]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), options.preset, options.size, options.window)
        for precision in options.precision:
            work = Work(
                options.preset,
                options.size,
                options.window,
                options.batch,
                precision,
                options.device,
                weights=folder,
                threads=options.threads,
                features=options.features,
                authors=str(options.authors.resolve()) if options.authors else "",
            )
            steps = options.steps or STEPS_PER_ROUND.get(options.device, 1)
            figures[precision] = compare(names, work, options.rounds, steps, options.cold)
            print(f"\n{title(work)}\n\n{as_markdown(figures[precision], work)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=192, help="side of the images in pixels")
    parser.add_argument("--window", type=int, default=12, help="side of a window in tokens")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", default=["ours", *PEERS], help="with +compile for torch.compile")
    parser.add_argument("--authors", type=Path, metavar="DIR", help="checkout of microsoft/Swin-Transformer")
    parser.add_argument("--rounds", type=int, default=7)
    steps = "timed steps of each contender in a round; by default 1 on a CPU and 20 on CUDA"
    parser.add_argument("--steps", type=int, default=0, help=steps)
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU; by default its own choice")
    parser.add_argument("--features", action="store_true", help="inference instead of training")
    parser.add_argument("--cold", action="store_true", help="compile with an empty cache")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser


# --- A contender's process ---------------------------------------------------------------------------------------------


def serve(name: str, work: Work) -> None:
    """Run one contender: answer each line "steps N" on standard input with the time of a step, until the input ends."""
    library, _, compiled = name.partition("+")
    if work.threads:
        torch.set_num_threads(work.threads)
    if library in ("ours", *SHARES) and work.device == "cpu":
        keep_freed_memory()  # as the command does
    if library in ("timm", "authors"):  # the authors' code imports timm's layers
        sys.path.insert(0, str(ROOT / "tests"))
        from timm_stub import stub_torchvision

        stub_torchvision()
    torch.mm(torch.ones(64, 64, device=work.device), torch.ones(64, 64, device=work.device))
    peak_mib = measure_peak(work.device)
    model = build_contender(library, work).to(work.device)
    step = build_step(model, work, library, compiled=bool(compiled))
    model.train(not work.features)
    started = time.perf_counter()
    first_loss = step()
    answer({"first_step_s": time.perf_counter() - started, "loss": first_loss})
    for _ in range(2):
        step()
    peak = peak_mib()
    release_memory(work.device)
    answer({"peak_mib": peak})
    for line in sys.stdin:
        count = int(line.split()[1])
        step()  # fills the caches again, which the other contenders have used meanwhile
        started = time.perf_counter()
        for _ in range(count):
            step()
        seconds = (time.perf_counter() - started) / count
        release_memory(work.device)
        answer({"seconds": seconds})


def release_memory(device: str) -> None:
    """Give memory that is allocated but not used back to the device, for the next contender."""
    if device == "cuda":
        torch.cuda.empty_cache()


def build_step(model: nn.Module, work: Work, name: str, compiled: bool) -> Callable[[], float]:
    """A function that takes one step on the batch that all share and returns its loss.

    Args:
        name: of the contender.
        compiled: whether it is put under torch.compile.
    """
    images, mask = draw_batch(work, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    run = model.features if work.features else model
    if compiled and name in ("ours", *SHARES):
        from simmim.training.compiling import compile_blocks

        atexit.register(compile_blocks(model.model.encoder, print).close)  # as the setting `compile` does
    elif compiled:
        run = torch.compile(run)

    @torch.no_grad()
    def encode() -> float:
        """One batch to features; the mean of their squares."""
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
            return run(images).float().square().mean().item()

    def train() -> float:
        """One optimizer step; its loss."""
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
            loss = run(images, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return encode if work.features else train


def measure_peak(device: str) -> Callable[[], float]:
    """Start to measure memory; the function that is returned gives the peak in MiB: on a CPU of the process, above its
    present state; on CUDA of the tensors of this process (`torch.cuda.max_memory_allocated`)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / MIB
    if not Path("/proc/self/clear_refs").exists():
        return lambda: float("nan")
    reset_peak()
    before = resident_mib("VmRSS")
    return lambda: resident_mib("VmHWM") - before


# --- The comparison ---------------------------------------------------------------------------------------------------


def compare(names: list[str], work: Work, rounds: int, steps: int, cold: bool) -> dict[str, dict]:
    """All contenders' figures by name, and under "gemm" the rates of a matrix product, in GFLOP/s."""
    figures: dict[str, dict] = {"gemm": {"gflops": [], "device": device_name(work.device)}}
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            print(f"{name}, {work.precision}: first step", file=sys.stderr, flush=True)
            environment = dict(os.environ)
            if "+" in name and cold:
                environment["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
            worker = Worker([__file__, "--serve", name], environment)
            stack.callback(worker.close)
            figures[name] = {**worker.ask(json.dumps(vars(work))), **worker.read(), "seconds": []}
            workers[name] = worker
        same_masks = [name for name in names if name.partition("+")[0] not in SHARES]
        check_losses({name: figures[name]["loss"] for name in same_masks}, work.precision)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            figures["gemm"]["gflops"].append(gemm_gflops(work))
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order:
                figures[name]["seconds"].append(workers[name].ask(f"steps {steps}")["seconds"])
    return figures


def check_losses(losses: dict[str, float], precision: str) -> None:
    """Exit if the first losses differ: then the contenders do not compute the same."""
    low, high = min(losses.values(), default=0.0), max(losses.values(), default=0.0)
    if high - low > LOSS_TOLERANCE * (10 if precision == "bf16" else 1):
        raise SystemExit(f"the contenders' first losses differ: {losses}")


def gemm_gflops(work: Work) -> float:
    """The rate of one matrix product, the median over `GEMM_SECONDS`, about the time of a step."""
    if work.threads:
        torch.set_num_threads(work.threads)
    side = 2048 if work.device == "cpu" else 8192
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=work.device, dtype=dtype) for _ in range(2))
    seconds, until = [], time.perf_counter() + GEMM_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        if work.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    del a, b
    release_memory(work.device)
    return 2 * side**3 / statistics.median(seconds) / 1e9


def device_name(device: str) -> str:
    """A GPU's name; else that of the kind of device."""
    return torch.cuda.get_device_name(device) if device == "cuda" else device


def title(work: Work) -> str:
    """The heading of a table: what was compared."""
    return (
        f"{'features' if work.features else 'training'}, {work.preset}, {work.size} px, window {work.window}, "
        f"batch {work.batch}, {work.precision}, {device_name(work.device)}, "
        f"torch {torch.__version__.partition('+')[0]}"
    )


def as_markdown(figures: dict[str, dict], work: Work) -> str:
    """One row per contender: medians over the rounds, the shares that follow from these, and medians of the ratios within a
    round."""
    gemm = statistics.median(figures["gemm"]["gflops"])
    names = [name for name in figures if name != "gemm"]
    ours = next((name for name in names if name.startswith("ours")), names[0])
    lines = [
        f"matrix product {gemm:,.0f} GFLOP/s, {operations(work) / 1e9:.1f} GFLOP per image",
        "",
        f"| | images/s | share of the product's rate | {ours} against it | peak memory, MiB | first step, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        rate = work.batch / statistics.median(figures[name]["seconds"])
        flops = operations(work, name.partition("+")[0])
        ratios = [theirs / mine for theirs, mine in zip(figures[name]["seconds"], figures[ours]["seconds"])]
        lines.append(
            f"| {name} | {rate:.2f} | {rate * flops / 1e9 / gemm:.0%} | "
            f"{statistics.median(ratios):.2f} × | {figures[name]['peak_mib']:,.0f} | {figures[name]['first_step_s']:.1f} |"
        )
    return "\n".join(lines)


def operations(work: Work, name: str = "") -> float:
    """FLOPs of the matrix products in one image's step of a contender.

    On a CPU ours predicts only the masked pixels. What it does not compute is not counted.

    Args:
        name: of the contender; any but ours predicts all pixels.
    """
    from simmim.encoders.cost import Setup
    from simmim.encoders.swinv2 import SwinV2Config
    from simmim.methods.canvas import Canvas
    from simmim.methods.simmim import SimMIM, SimMIMSettings
    from simmim.planning.step import cost_model, step_flops

    config = SwinV2Config.from_preset(work.preset, window_size=work.window)
    size, setup = (work.size, work.size), Setup(work.batch, precision="32-true", device=work.device)
    if work.features:
        return cost_model(config).flops(config, size, setup).forward
    only_masked = work.device == "cpu" and name in ("ours", *SHARES)
    predicted = draw_batch(work, name)[1].float().mean().item() if only_masked else 1.0
    method, settings = (Canvas, canvas_of(name, work)[1]) if name in SHARES else (SimMIM, SimMIMSettings())
    return step_flops(config, size, setup, method, predicted, settings).training


if __name__ == "__main__":
    sys.exit(main())
