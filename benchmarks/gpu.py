"""What no CPU can show, in one run on a GPU, in order, within nine minutes.

    .venv/bin/python benchmarks/gpu.py | tee gpu.txt
    .venv/bin/python benchmarks/gpu.py --only kernels trial        # some of the checks
    .venv/bin/python benchmarks/gpu.py --dry                       # the same checks on a CPU, in small

Each check is a process with a time limit of its own. Its output follows its heading, and a line says whether it passed; one
that fails or takes too long does not keep the next from running. The last lines repeat all results, and the exit code is 1
unless all passed.

    kernels    tests/gpu_attention.py: attention's kernels against the reference implementation in float64
    trial      what a run tries before it uses them: windows of 36 to 256 tokens in three types
    attention  their time for each stage of the encoder, forward and backward, and that of the reference implementation
    step64     benchmarks/step.py, base, batches of 64
    step128    the same, of 128
    canvas     benchmarks/step.py, base: two, three and four images on a canvas beside SimMIM
    profile    where the time of a step goes; an error where a step waits for the GPU (`torch.cuda.set_sync_debug_mode`)
    files      benchmarks/end_to_end.py: `simmim pretrain` on JPEG photographs
    resume     a pre-training that is stopped and resumed ends with the weights of one that is not, bit for bit
    ddp        pre-training under DDP on one device
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from contenders import Work, build_ours, draw_batch, write_weights

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 540
WINDOWS = (6, 8, 12, 14, 16)
TYPES = (torch.float32, torch.float16, torch.bfloat16)


class Check(NamedTuple):
    """A process of its own.

    Attributes:
        limit_s: after which it is ended.
        command: of the interpreter.
        dry: the same on a CPU, in small.
    """

    limit_s: int
    command: tuple[str, ...]
    dry: tuple[str, ...]


def part(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The commands of a check that is a function of this file."""
    return (__file__, "--part", name), (__file__, "--part", name, "--dry")


def script(name: str, words: str, small: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The commands of a check that is another benchmark."""
    path = str(ROOT / "benchmarks" / name)
    return (path, *words.split()), (path, *small.split())


STEP = "--preset base --precision bf16 --device cuda --rounds 3 --steps 20 --contenders ours timm --batch "
SMALL_STEP = "--preset nano --size 64 --window 4 --precision float32 --device cpu --rounds 1 --contenders ours --batch "
CANVAS = (
    "--preset base --precision bf16 --device cuda --rounds 2 --steps 10 --contenders ours canvas2 canvas3 canvas4 --batch 96"
)
SMALL_CANVAS = (
    "--preset pico --size 64 --window 2 --precision float32 --device cpu --rounds 1 --contenders ours canvas2 --batch 4"
)
FILES = "--preset base --batch 64 --precision bf16 --device cuda --workers 12 --images 1024 --steps 20 --rounds 1"
SMALL_FILES = "--preset nano --size 64 --window 4 --batch 4 --workers 0 --images 8 --steps 4 --rounds 1"
KERNELS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/gpu_attention.py"))
CHECKS = {
    "kernels": Check(60, KERNELS, (*KERNELS, "--collect-only")),
    "trial": Check(60, *part("trial")),
    "attention": Check(45, *part("attention")),
    "step64": Check(75, *script("step.py", STEP + "64", SMALL_STEP + "2")),
    "step128": Check(75, *script("step.py", STEP + "128", SMALL_STEP + "4")),
    "canvas": Check(60, *script("step.py", CANVAS, SMALL_CANVAS)),
    "profile": Check(35, *part("profile")),
    "files": Check(50, *script("end_to_end.py", FILES, SMALL_FILES)),
    "resume": Check(50, *part("resume")),
    "ddp": Check(30, *part("ddp")),
}


def main() -> int:
    """Run the checks, or a part of one in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--dry", action="store_true", help="on a CPU, in small")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](options.dry)
        return 0
    if not options.dry and not torch.cuda.is_available():
        parser.error("no GPU is there: give --dry for the same on a CPU, in small")
    print(f"{'a CPU' if options.dry else torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    results = {name: run_check(name, options.dry) for name in options.only}
    print("\n" + "\n".join(f"{name:<10} {result}" for name, result in results.items()))
    return int(any(not result.startswith("passed") for result in results.values()))


def run_check(name: str, dry: bool) -> str:
    """Run a check and return its result: passed, failed, or out of time, with its seconds."""
    check = CHECKS[name]
    command = [sys.executable, *(check.dry if dry else check.command)]
    print(f"\n== {name}, at most {check.limit_s} s: {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        result = "failed" if process.wait(None if dry else check.limit_s) else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started, which hold the GPU's memory
        process.wait()
        result = "out of time"
    result = f"{result} in {time.monotonic() - started:.0f} s"
    print(f"{name}: {result}", flush=True)
    return result


# --- parts -------------------------------------------------------------------------------------------------------------


def try_kernels(dry: bool) -> None:
    """What a run tries before it uses the kernels, for each window and type."""
    from simmim.encoders.swinv2.kernels.self_test import find_difference, supports_window_attention
    from simmim.encoders.swinv2.model import attend

    device, failed = torch.device("cpu" if dry else "cuda"), 0
    for side in WINDOWS:
        for dtype in TYPES:
            supported = supports_window_attention(device, dtype, side**2, 32)
            problem = find_difference(device, dtype, side**2, 32, attend) if supported else "not supported here"
            print(f"{side**2} tokens, {str(dtype).removeprefix('torch.')}: {problem or 'as the reference implementation'}")
            failed += bool(supported and problem)
    if failed and not dry:
        raise SystemExit(f"{failed} of {len(WINDOWS) * len(TYPES)} kinds of windows are refused")


def time_attention(dry: bool) -> None:
    """Milliseconds of attention alone, forward and backward, in each stage of base at 192 px, 64 images, bfloat16."""
    from simmim.encoders.base import Size
    from simmim.encoders.registry import build, preset_config
    from simmim.encoders.swinv2 import kernels

    device, images = torch.device("cpu" if dry else "cuda"), 2 if dry else 64
    config = preset_config("nano" if dry else "base", window_size=4 if dry else 12)
    encoder, size = build(config).to(device), 32 if dry else 192
    print("| stage | map | by kernels, ms | reference, ms |\n| --- | --- | ---: | ---: |")
    for number, stage in enumerate(encoder.layers):
        side = size // config.strides[number]
        window: Size = (min(side, config.window_size),) * 2
        x = torch.randn(images, side, side, config.channels[number], device=device, requires_grad=True)

        def run(block=stage.blocks[1], x=x) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                block.windowed_attention(x).float().square().mean().backward()

        by_kernels = milliseconds(run, device)
        with kernels.disabled():
            print(f"| {number + 1} | {side}², window {window[0]} | {by_kernels:.2f} | {milliseconds(run, device):.2f} |")


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """The median time of a call, after two that are not timed."""
    times = []
    for _ in range(4 if device.type == "cpu" else 22):
        wait_for(device)
        started = time.perf_counter()
        run()
        wait_for(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile_step(dry: bool) -> None:
    """Where the time of a step goes, by operator; nothing in it waits for the GPU."""
    device = torch.device("cpu" if dry else "cuda")
    work = Work("nano", 64, 4, 2, "float32", "cpu") if dry else Work("base", 192, 12, 64, "bf16", "cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), work.preset, work.size, work.window)
        model = build_ours(replace(work, weights=folder))
    model = model.to(device).train()
    images, mask = draw_batch(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=work.precision == "bf16"):
            loss = model(images, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    step()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    print("a step waits for nothing")
    with torch.profiler.profile() as profile:
        for _ in range(3):
            step()
        wait_for(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def pretrain_words(folder: Path, run: str, dry: bool, *more: str) -> list[str]:
    """A command that pre-trains nano for 40 steps on noise."""
    images = folder / "images"
    if not images.is_dir():
        write_noise(images, 32)
    words = (
        f"--preset nano --image-size 32 --batch-size 16 --epochs 20 --workers 0 --save_every_steps 10 --out {folder / run}"
    )
    accelerator = "cpu" if dry else "cuda"
    command = [sys.executable, "-m", "simmim.cli", "pretrain", "--data", str(images), *words.split(), *more]
    return [*command, "--trainer.accelerator", accelerator, "--devices", "1"]


def write_noise(folder: Path, count: int) -> None:
    """Images of random colors."""
    from PIL import Image

    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for number in range(count):
        pixels = torch.randint(256, (6, 6, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{number}.png")


def resume_run(dry: bool) -> None:
    """Pre-train once without a pause and once stopped and resumed, and compare all that is saved of the weights."""
    from simmim.training.saving import saved_steps, usable_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(pretrain_words(folder, "whole", dry), check=True)
        process = subprocess.Popen(pretrain_words(folder, "parts", dry))
        while process.poll() is None and max(saved_steps(folder / "parts"), default=0) < 10:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait()
        stopped = max(saved_steps(folder / "parts"), default=0)
        subprocess.run(pretrain_words(folder, "parts", dry, "--resume"), check=True)
        whole, parts = (torch.load(usable_checkpoint(folder / run), weights_only=True) for run in ("whole", "parts"))
    different = [key for key, value in whole["state_dict"].items() if not torch.equal(value, parts["state_dict"][key])]
    print(f"stopped at step {stopped} of {whole['global_step']}, resumed: {len(different)} tensors differ {different[:3]}")
    if different or not 0 < stopped < whole["global_step"]:
        raise SystemExit(1)


def run_ddp(dry: bool) -> None:
    """Pre-train under DDP in one process."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(pretrain_words(Path(name), "ddp", dry, "--trainer.strategy", "ddp"), check=True)


PARTS: dict[str, Callable[[bool], None]] = {
    "trial": try_kernels,
    "attention": time_attention,
    "profile": profile_step,
    "resume": resume_run,
    "ddp": run_ddp,
}

if __name__ == "__main__":
    sys.exit(main())
