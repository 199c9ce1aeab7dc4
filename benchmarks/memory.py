"""Memory and time of one SimMIM training step, plain, checkpointed, sequential and both, beside the predicted memory.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memory.py --preset tiny --size 768 --window 24 --batch 1

Prints a Markdown table. Each row is measured in a new process, which takes one step of a nano encoder so that libraries are
loaded, and then measures one forward and backward pass. Linux only.
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
# Plans are for the plain lines, which run on every device. The kernels for a CPU keep less.
# glibc keeps freed blocks below a threshold for reuse, and raises the threshold with use. Fixed at 64 KiB, larger blocks
# return to the system at once, so that the resident set follows the tensors as a GPU's allocator would.
ENVIRONMENT = {"SIMMIM_KERNELS": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operators return, forward and backward, until they are freed.

    Exact, and the same in every run. Memory that operators allocate inside themselves is not counted. Views count once, as
    their storage.

    Args:
        known: tensors that exist already; they and their views are not counted.

    Attributes:
        live: bytes now.
        peak: the most bytes so far.
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
    """Measure each combination of options in its own process, and print the table."""
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
    """MiB above the state before the step, measured and predicted, and the step's processor time in seconds."""
    from simmim.encoders.cost import Setup
    from simmim.encoders.swinv2 import PRESETS
    from simmim.methods.simmim import SimMIM
    from simmim.planning.step import step_memory

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    checkpointed, sequential = MODES[chosen.child]
    at_once = chosen.windows_at_once if sequential else None
    half = chosen.precision == "bf16-mixed"
    take_step(make_model("nano", 4, checkpointed, at_once), torch.randn(1, 3, 32, 32), half)

    window = chosen.window or PRESETS[chosen.preset].for_image_size((chosen.size, chosen.size))["window_size"]
    model = make_model(chosen.preset, window, checkpointed, at_once)
    images = torch.randn(chosen.batch, 3, chosen.size, chosen.size)
    clear_caches()
    reset_peak()
    before, started = resident_mib("VmRSS"), time.process_time()
    take_step(model, images, half)
    seconds, peak = time.process_time() - started, resident_mib("VmHWM") - before

    model.zero_grad(set_to_none=True)
    clear_caches()
    with LiveBytes([*model.parameters(), images]) as live:
        take_step(model, images, half)
    setup = Setup(chosen.batch, 1, chosen.precision, "ddp", checkpointed, at_once, device="cpu")
    predicted = step_memory(model.encoder.config, images.shape[-2:], setup, SimMIM)
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


def clear_caches() -> None:
    """Empty the caches of the encoder's geometry, so that the next step fills them and is measured with them."""
    from simmim.encoders.swinv2 import geometry

    for function in vars(geometry).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def as_markdown(results: dict[str, dict[str, float]]) -> str:
    """One row per combination of options; shares are of the first."""
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
