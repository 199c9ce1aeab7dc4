"""What one SimMIM training step takes in memory and time: plain, checkpointed, sequential, both; and what was predicted.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memory.py --preset tiny --size 768 --window 24 --batch 1

Prints a Markdown table. Each row is a fresh process that makes the model and the batch, takes one step of a nano encoder so
that libraries are loaded, and then measures one forward and backward pass (with `--optimizer` AdamW's step too). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
MODES = {"plain": (False, False), "checkpointed": (True, False), "sequential": (False, True), "both": (True, True)}
# The lines that every device runs are planned for, not the kernels of a CPU, which keep less.
# glibc keeps freed blocks below its threshold, which rises with use, for reuse. Fixed at 64 KiB larger ones go back to the
# system at once, so that the resident set follows the tensors, as a GPU's allocator would show them.
ENVIRONMENT = {"SIMMIM_KERNELS": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operators make, forward and backward, until they are freed.

    Exact and the same in every run; what kernels allocate inside themselves is not seen. Views count once, as their storage.

    Args:
        known: tensors made before and not to be counted, with the storages that views of them share.

    Attributes:
        live: bytes now.
        peak: most so far.
        largest: bytes of the largest tensor so far.
        made: bytes of all so far, freed or not: traffic.
    """

    def __init__(self, known=()) -> None:
        super().__init__()
        self.live = self.peak = self.largest = self.made = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live, self.made = self.live + storage.nbytes(), self.made + storage.nbytes()
                    self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
                    weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def main(arguments: list[str] | None = None) -> int:
    """Measure each mode in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=192, help="pixels")
    parser.add_argument("--window", type=int, help="tokens; by default a quarter of the first stage's map")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--windows-at-once", type=int, default=4, help="of sequential attention")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        print(json.dumps(measure(chosen)))
        return 0
    words = sys.argv[1:] if arguments is None else arguments
    results = {}
    for mode in chosen.modes:
        print(f"measuring {mode}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, __file__, *words, "--child", mode],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, **ENVIRONMENT},
        )
        results[mode] = json.loads(done.stdout)
    print(as_markdown(results))
    return 0


def measure(chosen: argparse.Namespace) -> dict[str, float]:
    """One mode: MiB above the state before the step, measured and predicted, and the step's processor time in seconds."""
    from simmim.defaults import default_window
    from simmim.encoders import swinv2
    from simmim.planning.plan import Setup, memory

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    checkpointed, sequential = MODES[chosen.child]
    at_once = chosen.windows_at_once if sequential else None
    half = chosen.precision == "bf16-mixed"
    take_step(make_model("nano", 4, checkpointed, at_once), torch.randn(1, 3, 32, 32), half)

    window = chosen.window or default_window(chosen.size, swinv2.PRESETS[chosen.preset].patch_size)
    model = make_model(chosen.preset, window, checkpointed, at_once)
    images = torch.randn(chosen.batch, 3, chosen.size, chosen.size)
    forget_caches()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark falls to what is resident now
    before, started = resident_mib("VmRSS"), time.process_time()
    take_step(model, images, half)
    seconds, peak = time.process_time() - started, resident_mib("VmHWM") - before

    model.zero_grad(set_to_none=True)
    forget_caches()
    with LiveBytes([*model.parameters(), images]) as live:
        take_step(model, images, half)
    setup = Setup(chosen.batch, 1, chosen.precision, "ddp", checkpointed, at_once, device="cpu")
    predicted = memory(model.encoder.config, images.shape[-2:], setup)
    above = predicted.peak - predicted.parameters - predicted.optimizer - images.nbytes
    return {"peak": peak, "tensors": live.peak / MIB, "predicted": above / MIB, "seconds": seconds}


def make_model(preset: str, window: int, checkpointed: bool, at_once: int | None) -> torch.nn.Module:
    """SimMIM over the preset's encoder, in training mode."""
    from simmim.encoders.swinv2 import SwinV2, SwinV2Config
    from simmim.methods.simmim import SimMIM

    torch.manual_seed(0)
    return SimMIM(SwinV2(SwinV2Config.from_preset(preset, window_size=window), checkpointed, at_once)).train()


def take_step(model: torch.nn.Module, images: torch.Tensor, half: bool) -> float:
    """Forward and backward pass over `images` with every other column of patches masked; the loss."""
    side = images.shape[-1] // model.encoder.config.patch_size
    mask = (torch.arange(side) % 2 == 0).expand(len(images), side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(images, mask).loss
    loss.backward()
    return loss.item()


def forget_caches() -> None:
    """What the encoder keeps from call to call belongs to the step that is measured."""
    from simmim.encoders import swinv2

    for name in ("log_spaced_coords", "relative_position_index", "shift_regions", "shift_mask"):
        getattr(swinv2, name).cache_clear()


def resident_mib(field: str) -> float:
    """The process's resident set, VmRSS, or its high-water mark, VmHWM, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))


def as_markdown(results: dict[str, dict[str, float]]) -> str:
    """One row a mode; shares are of the first."""
    lines = [
        "| step | peak above start, MiB | share | tensors alone, MiB | predicted, MiB | predicted / peak | processor s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = next(iter(results.values()))
    for mode, row in results.items():
        lines.append(
            f"| {mode} | {row['peak']:,.0f} | {row['peak'] / first['peak']:.0%} | {row['tensors']:,.0f} | "
            f"{row['predicted']:,.0f} | {row['predicted'] / row['peak']:.2f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
