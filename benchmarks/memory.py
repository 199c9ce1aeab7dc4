"""Memory and time of one SimMIM training step, with and without the switches that save memory, beside the predicted memory.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memory.py --preset tiny --size 768 --window 24 --batch 1

Prints a Markdown table: plain, checkpointed, sequential and both. Each row is measured in a new process, which takes one
step of a nano encoder to load all libraries, and then measures one forward and backward pass. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import weakref

import torch
from processes import reset_peak, resident_mib
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
MODES = {"plain": (False, False), "checkpointed": (True, False), "sequential": (False, True), "both": (True, True)}
# Predictions are for the reference implementation, which runs on every device. The kernels for a CPU use less memory.
# glibc keeps freed blocks below a threshold for reuse, and raises the threshold with use. With the threshold fixed at 64
# KiB, larger blocks return to the system at once, so the resident set follows the tensors.
ENVIRONMENT = {"SIMMIM_KERNELS": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return, forward and backward, until they are freed.

    The count is exact and the same in every run. Temporary memory inside an operator is not counted. Views of one storage
    count once.

    Args:
        known: tensors that exist before; they and their views are not counted.

    Attributes:
        live: bytes now.
        peak: the largest number of bytes so far.
        largest: bytes of the largest tensor so far.
        total: bytes of all tensors so far, freed or not.
    """

    def __init__(self, known=()) -> None:
        super().__init__()
        self.live = self.peak = self.largest = self.total = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live, self.total = self.live + storage.nbytes(), self.total + storage.nbytes()
                    self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
                    weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def main(arguments: list[str] | None = None) -> int:
    """Measure each mode in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=192, help="side of the images in pixels")
    parser.add_argument(
        "--window", type=int, help="side of a window in tokens; by default a quarter of the first stage's map"
    )
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--windows-at-once", type=int, default=4, help="windows that sequential attention takes at once")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(options)))
        return 0
    words = sys.argv[1:] if arguments is None else arguments
    results = {}
    for mode in options.modes:
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


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Memory above the state before the step in MiB, measured and predicted, and the step's processor time in seconds."""
    from simmim.encoders.cost import Setup
    from simmim.encoders.swinv2 import PRESETS
    from simmim.methods.simmim import SimMIM
    from simmim.planning.step import step_memory

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    checkpointed, sequential = MODES[options.child]
    at_once = options.windows_at_once if sequential else None
    half = options.precision == "bf16-mixed"
    take_step(make_model("nano", 4, checkpointed, at_once), torch.randn(1, 3, 32, 32), half)

    window = options.window or PRESETS[options.preset].fields_for_size((options.size, options.size))["window_size"]
    model = make_model(options.preset, window, checkpointed, at_once)
    images = torch.randn(options.batch, 3, options.size, options.size)
    clear_caches()
    reset_peak()
    before, started = resident_mib("VmRSS"), time.process_time()
    take_step(model, images, half)
    seconds, peak = time.process_time() - started, resident_mib("VmHWM") - before

    model.zero_grad(set_to_none=True)
    clear_caches()
    with LiveBytes([*model.parameters(), images]) as live:
        take_step(model, images, half)
    setup = Setup(options.batch, 1, options.precision, "ddp", checkpointed, at_once, device="cpu")
    predicted = step_memory(model.encoder.config, images.shape[-2:], setup, SimMIM)
    above = predicted.peak - predicted.parameters - predicted.optimizer - images.nbytes
    return {"peak": peak, "tensors": live.peak / MIB, "predicted": above / MIB, "seconds": seconds}


def make_model(preset: str, window: int, checkpointed: bool, at_once: int | None) -> torch.nn.Module:
    """SimMIM around the preset's encoder, without kernels, in training mode."""
    from simmim.encoders.swinv2 import SwinV2, SwinV2Config
    from simmim.methods.simmim import SimMIM

    torch.manual_seed(0)
    return SimMIM(SwinV2(SwinV2Config.from_preset(preset, window_size=window), checkpointed, at_once)).train()


def take_step(model: torch.nn.Module, images: torch.Tensor, half: bool) -> float:
    """Run a forward and backward pass over `images` with every other column of patches masked, and return the loss."""
    side = images.shape[-1] // model.encoder.config.patch_size
    mask = (torch.arange(side) % 2 == 0).expand(len(images), side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(images, mask).loss
    loss.backward()
    return loss.item()


def clear_caches() -> None:
    """Empty the caches of the encoder's geometry, so that the next step is measured with what they hold."""
    from simmim.encoders.shifted_windows import geometry
    from simmim.encoders.swinv2.geometry import log_spaced_coords
    from simmim.encoders.vit.model import index_of_pairs

    for function in (*vars(geometry).values(), log_spaced_coords, index_of_pairs):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def as_markdown(results: dict[str, dict[str, float]]) -> str:
    """One row per mode; shares are relative to the first."""
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
